"""Tied attention in Triton: portable kernels, one head's row tile per program.

Query, key and value are one tensor w (B, N, heads*head_dim), read in place: no head transpose.
    forward   S = scale w w^T;  o_j = softmax(S_j) w;  lse_j = logsumexp(S_j)
    backward  dw_j = sum_i P_ij^T dO_i + scale (dS_ji + dS_ij^T) w_i

S is symmetric before the softmax, so one tile of it gives P_ji (by row j's lse) and P_ij^T (by row
i's): the backward is one loop over i, no atomics. Rows past N load as zeros, and their lse as inf,
which makes every term they touch zero. Only loaded operands are transposed, never an accumulator
(docs/hazards.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import on_device_of
from ..triton_common import dot, dot_precision

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class TileConfig:
    """Rows a program owns, rows a step visits, and Triton's launch options."""

    own: int
    visit: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# Thresholds and register caps (which let one more block share a multiprocessor) are measured on
# an H200 in bfloat16: docs/performance.md, "Tile shapes".


def forward_config(dtype: torch.dtype, head_dim: int, n: int) -> TileConfig:
    if dtype == torch.float32:
        return TileConfig(64, 32, 4, 2) if head_dim <= 128 else TileConfig(32, 16, 4, 2)
    if head_dim > 128:
        return TileConfig(64, 32, 4, 2)
    if head_dim > 64:
        return TileConfig(64, 32, 4, 3) if n <= 256 else TileConfig(64, 64, 4, 3, 168)
    return TileConfig(64, 32, 4, 3, 80) if n <= 256 else TileConfig(64, 64, 4, 3)


def backward_config(dtype: torch.dtype, head_dim: int, n: int, causal: bool) -> TileConfig:
    if dtype == torch.float32:
        return TileConfig(32, 32, 4, 2) if head_dim <= 128 else TileConfig(16, 16, 4, 2)
    if head_dim > 128:
        return TileConfig(32, 32, 4, 2)
    if head_dim > 64:
        short = n <= 512 and not causal
        return TileConfig(64, 32, 4, 2, 168) if short else TileConfig(64, 64, 4, 2)
    if causal:
        return TileConfig(64, 64, 4, 1, 168)  # three short loops: nothing to pipeline
    return TileConfig(64, 32, 4, 2, 128) if n <= 256 else TileConfig(64, 64, 4, 3, 168)


# ---- forward


@triton.jit
def _load_rows(base, rows, cols, stride_n, N, HEAD_DIM: tl.constexpr, WHOLE: tl.constexpr = False):
    """[rows, BLOCK_D] of one head; zeros past row N (WHOLE: there are none) and column HEAD_DIM."""
    pointers = base + rows[:, None] * stride_n + cols[None, :]
    if cols.shape[0] > HEAD_DIM:
        mask = (rows[:, None] < N) & (cols[None, :] < HEAD_DIM)
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif WHOLE:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=rows[:, None] < N, other=0.0)
    return tile


@triton.jit
def _visit(
    w_j, acc, m, total, base, start, rows_j, cols, stride_n, N, scale_log2,
    HEAD_DIM: tl.constexpr, VISIT: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One online-softmax step of row tile j over the rows [start, start + VISIT)."""
    rows_i = start + tl.arange(0, VISIT)
    w_i = _load_rows(base, rows_i, cols, stride_n, N, HEAD_DIM, WHOLE=not MASKED)
    s = dot(w_j, tl.trans(w_i), None, PRECISION)  # [OWN, VISIT], unscaled
    if MASKED:
        seen = rows_i[None, :] < N
        if CAUSAL:
            seen = seen & (rows_i[None, :] <= rows_j[:, None])
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - m_new[:, None])  # one FMA and one exponential each
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(p, 1)
    acc = dot(p.to(w_i.dtype), w_i, acc * shrink[:, None], PRECISION)
    return acc, m_new, total


@triton.jit
def tied_attention_forward_kernel(
    W, OUT, LSE, stride_b, stride_n, N, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, VISIT: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, OWN)
    head = tl.program_id(0) // tiles  # over batch * heads
    j = tl.program_id(0) % tiles
    if CAUSAL:
        j = tiles - 1 - j  # the longest rows first
    b = (head // heads).to(tl.int64)
    h = head % heads
    base = W + b * stride_b + h * HEAD_DIM
    rows_j = j * OWN + tl.arange(0, OWN)
    cols = tl.arange(0, BLOCK_D)
    w_j = _load_rows(base, rows_j, cols, stride_n, N, HEAD_DIM)  # [OWN, BLOCK_D]

    acc = tl.zeros((OWN, BLOCK_D), tl.float32)
    m = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    scale_log2 = scale * LOG2E
    unmasked = (j * OWN // VISIT if CAUSAL else N // VISIT) * VISIT
    end = tl.minimum(N, (j + 1) * OWN) if CAUSAL else N
    for start in range(0, unmasked, VISIT):
        acc, m, total = _visit(
            w_j, acc, m, total, base, start, rows_j, cols, stride_n, N, scale_log2,
            HEAD_DIM, VISIT, False, CAUSAL, PRECISION,
        )  # fmt: skip
    for start in range(unmasked, end, VISIT):
        acc, m, total = _visit(
            w_j, acc, m, total, base, start, rows_j, cols, stride_n, N, scale_log2,
            HEAD_DIM, VISIT, True, CAUSAL, PRECISION,
        )  # fmt: skip

    o = acc / total[:, None]
    inner = heads * HEAD_DIM
    out = OUT + b * N * inner + h * HEAD_DIM + rows_j[:, None] * inner + cols[None, :]
    tl.store(
        out, o.to(OUT.dtype.element_ty), mask=(rows_j[:, None] < N) & (cols[None, :] < HEAD_DIM)
    )
    tl.store(LSE + head.to(tl.int64) * N + rows_j, (m + tl.log2(total)) / LOG2E, mask=rows_j < N)


# ---- backward


@triton.jit
def tied_attention_delta_kernel(
    DO, OUT, DELTA, stride_b, stride_n, N, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) for each head and row: (B, heads, N)."""
    tiles = tl.cdiv(N, OWN)
    head = tl.program_id(0) // tiles
    rows = (tl.program_id(0) % tiles) * OWN + tl.arange(0, OWN)
    cols = tl.arange(0, BLOCK_D)
    b = (head // heads).to(tl.int64)
    h = head % heads
    inner = heads * HEAD_DIM
    do = _load_rows(DO + b * stride_b + h * HEAD_DIM, rows, cols, stride_n, N, HEAD_DIM)
    o = _load_rows(OUT + b * N * inner + h * HEAD_DIM, rows, cols, inner, N, HEAD_DIM)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(DELTA + head.to(tl.int64) * N + rows, delta, mask=rows < N)


@triton.jit
def _visit_backward(
    acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base, start, rows_j, cols,
    stride_n, do_stride_n, N, scale_log2, scale,
    HEAD_DIM: tl.constexpr, VISIT: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dw_j what the rows [start, start + VISIT) give it.

    PART says which halves exist: "both"; causally "before" (i < j: j attends to i), "after"
    (i > j: i attends to j) or "diagonal" (both, masked).
    """
    rows_i = start + tl.arange(0, VISIT)
    w_i = _load_rows(w_base, rows_i, cols, stride_n, N, HEAD_DIM)
    s = dot(w_j, tl.trans(w_i), None, PRECISION)  # [OWN, VISIT], unscaled
    ds = tl.zeros_like(s)  # scale (dS_ji + dS_ij^T)
    if PART != "after":
        p_ji = tl.exp2(s * scale_log2 - lse_j[:, None])  # scale P_ji: lse_j carries the scale
        if PART == "diagonal":
            p_ji = tl.where(rows_i[None, :] <= rows_j[:, None], p_ji, 0.0)
        dp_ji = dot(do_j, tl.trans(w_i), None, PRECISION)
        ds += p_ji * (dp_ji - delta_j[:, None])
    if PART != "before":
        do_i = _load_rows(do_base, rows_i, cols, do_stride_n, N, HEAD_DIM)
        lse_i = tl.load(lse_base + rows_i, mask=rows_i < N, other=float("inf")) * LOG2E
        delta_i = tl.load(delta_base + rows_i, mask=rows_i < N, other=0.0) * scale
        p_ij = tl.exp2(s * scale_log2 - lse_i[None, :])  # P_ij^T
        if PART == "diagonal":
            p_ij = tl.where(rows_j[:, None] <= rows_i[None, :], p_ij, 0.0)
        acc = dot(p_ij.to(do_i.dtype), do_i, acc, PRECISION)
        dp_ij = dot(w_j, tl.trans(do_i), None, PRECISION)  # dP_ij^T
        ds += p_ij * (dp_ij * scale - delta_i[None, :])
    return dot(ds.to(w_i.dtype), w_i, acc, PRECISION)


@triton.jit
def tied_attention_backward_kernel(
    DO, W, LSE, DELTA, DW, do_stride_b, do_stride_n, stride_b, stride_n, N, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, VISIT: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tl.static_assert(OWN % VISIT == 0, "causal tile edges must meet")
    tiles = tl.cdiv(N, OWN)
    head = tl.program_id(0) // tiles  # over batch * heads
    j = tl.program_id(0) % tiles
    b = (head // heads).to(tl.int64)
    h = head % heads
    w_base = W + b * stride_b + h * HEAD_DIM
    do_base = DO + b * do_stride_b + h * HEAD_DIM
    lse_base = LSE + head.to(tl.int64) * N
    delta_base = DELTA + head.to(tl.int64) * N
    rows_j = j * OWN + tl.arange(0, OWN)
    cols = tl.arange(0, BLOCK_D)
    w_j = _load_rows(w_base, rows_j, cols, stride_n, N, HEAD_DIM)  # [OWN, BLOCK_D]
    do_j = _load_rows(do_base, rows_j, cols, do_stride_n, N, HEAD_DIM)
    lse_j = tl.load(lse_base + rows_j, mask=rows_j < N, other=float("inf")) * LOG2E
    lse_j -= tl.log2(scale)
    delta_j = tl.load(delta_base + rows_j, mask=rows_j < N, other=0.0)

    acc = tl.zeros((OWN, BLOCK_D), tl.float32)
    scale_log2 = scale * LOG2E
    if CAUSAL:
        for start in range(0, j * OWN, VISIT):
            acc = _visit_backward(
                acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base, start,
                rows_j, cols, stride_n, do_stride_n, N, scale_log2, scale,
                HEAD_DIM, VISIT, "before", PRECISION,
            )  # fmt: skip
        for start in range(j * OWN, tl.minimum(N, (j + 1) * OWN), VISIT):
            acc = _visit_backward(
                acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base, start,
                rows_j, cols, stride_n, do_stride_n, N, scale_log2, scale,
                HEAD_DIM, VISIT, "diagonal", PRECISION,
            )  # fmt: skip
        for start in range((j + 1) * OWN, N, VISIT):
            acc = _visit_backward(
                acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base, start,
                rows_j, cols, stride_n, do_stride_n, N, scale_log2, scale,
                HEAD_DIM, VISIT, "after", PRECISION,
            )  # fmt: skip
    else:
        for start in range(0, N, VISIT):
            acc = _visit_backward(
                acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base, start,
                rows_j, cols, stride_n, do_stride_n, N, scale_log2, scale,
                HEAD_DIM, VISIT, "both", PRECISION,
            )  # fmt: skip

    inner = heads * HEAD_DIM
    out = DW + b * N * inner + h * HEAD_DIM + rows_j[:, None] * inner + cols[None, :]
    tl.store(
        out, acc.to(DW.dtype.element_ty), mask=(rows_j[:, None] < N) & (cols[None, :] < HEAD_DIM)
    )


# ---- launchers


def forward(w: Tensor, heads: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """w (B, N, heads*head_dim) -> o like w, and the log-sum-exp (B, heads, N) in float32."""
    batch, n, width = w.shape
    w = _rows_in_place(w)
    o = w.new_empty(w.shape)
    lse = w.new_empty(batch, heads, n, dtype=torch.float32)
    if batch == 0:
        return o, lse
    head_dim = width // heads
    config = forward_config(w.dtype, head_dim, n)
    with on_device_of(w):
        tied_attention_forward_kernel[(batch * heads * triton.cdiv(n, config.own),)](
            w, o, lse, w.stride(0), w.stride(1), n, heads, scale,
            HEAD_DIM=head_dim, BLOCK_D=_block_d(head_dim), OWN=config.own, VISIT=config.visit,
            CAUSAL=causal, PRECISION=dot_precision(w.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=config.max_registers,
        )  # fmt: skip
    return o, lse


def backward(
    do: Tensor, w: Tensor, o: Tensor, lse: Tensor, heads: int, scale: float, causal: bool
) -> Tensor:
    """dw, shaped as w, from do, shaped as o."""
    batch, n, width = w.shape
    w, do = _rows_in_place(w), _rows_in_place(do)
    dw = w.new_empty(w.shape)
    if batch == 0:
        return dw
    head_dim = width // heads
    config = backward_config(w.dtype, head_dim, n, causal)
    delta = torch.empty_like(lse)
    with on_device_of(w):
        tied_attention_delta_kernel[(batch * heads * triton.cdiv(n, 64),)](
            do, o, delta, do.stride(0), do.stride(1), n, heads,
            HEAD_DIM=head_dim, BLOCK_D=_block_d(head_dim), OWN=64,
        )  # fmt: skip
        tied_attention_backward_kernel[(batch * heads * triton.cdiv(n, config.own),)](
            do, w, lse, delta, dw, do.stride(0), do.stride(1), w.stride(0), w.stride(1),
            n, heads, scale,
            HEAD_DIM=head_dim, BLOCK_D=_block_d(head_dim), OWN=config.own, VISIT=config.visit,
            CAUSAL=causal, PRECISION=dot_precision(w.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=config.max_registers,
        )  # fmt: skip
    return dw


def _rows_in_place(t: Tensor) -> Tensor:
    """t itself where its rows are contiguous, and near enough for 32 bits, else a copy."""
    near = t.shape[1] * t.stride(1) < 2**31
    return t if t.stride(-1) == 1 and near else t.contiguous()


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))
