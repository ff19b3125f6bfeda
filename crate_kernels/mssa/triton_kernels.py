"""Tied attention in Triton: portable kernels, one head's row tile per program.

Query, key and value are one tensor w (B, N, heads*head_dim), read in place: no head transpose.
    forward   S = scale w w^T;  o_j = softmax(S_j) w;  lse_j = logsumexp(S_j)
    backward  dw_j = sum_i P_ij^T dO_i + scale (dS_ji + dS_ij^T) w_i

S is symmetric before the softmax, so one tile of it gives P_ji (by row j's lse) and P_ij^T (by row
i's): the backward is one loop over i, no atomics. Rows past the end load as zeros, and their lse as
inf, which makes every term they touch zero. Only loaded operands are transposed, never an
accumulator (docs/hazards.md).

How sequences lie (LAYOUT) is in triton_rows.py; a program whose tile is past its sequence's end
returns. With a window, tiles outside it are not visited (docs/mssa_masks.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import on_device_of
from ..triton_common import add_dot, dot, dot_precision
from .dropout import threshold
from .masks import FULL, Mask, lse_shape
from .triton_dropout import dropped, grown
from .triton_rows import (
    LOG2E,
    head_base,
    load_rows,
    sequence,
    statistics,
    store_lse,
    store_rows,
)


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
        return TileConfig(64, 32, 8, 2) if head_dim <= 128 else TileConfig(32, 16, 8, 2)
    if head_dim > 128:
        return TileConfig(64, 32, 4, 2)
    if head_dim > 64:
        return TileConfig(64, 32, 4, 3) if n <= 256 else TileConfig(64, 64, 4, 3, 168)
    return TileConfig(64, 32, 4, 3, 80) if n <= 256 else TileConfig(64, 64, 4, 3)


def backward_config(
    dtype: torch.dtype, head_dim: int, n: int, causal: bool, more: bool = False
) -> TileConfig:
    """``more``: with a window or dropout."""
    if dtype == torch.float32:
        small = head_dim <= 128 and not more
        return TileConfig(32, 32, 8, 2) if small else TileConfig(16, 16, 8, 2)
    if head_dim > 128:
        return TileConfig(32, 32, 4, 2)
    if more:  # without spilt registers; not measured yet
        return TileConfig(64, 32, 4, 2, 168) if head_dim <= 64 else TileConfig(64, 32, 4, 2)
    if head_dim > 64:
        short = n <= 512 and not causal
        return TileConfig(64, 32, 4, 2, 168) if short else TileConfig(64, 64, 4, 2)
    if causal:
        return TileConfig(64, 64, 4, 1, 168)  # three short loops: nothing to pipeline
    return TileConfig(64, 32, 4, 2, 128) if n <= 256 else TileConfig(64, 64, 4, 3, 168)


# ---- forward


@triton.jit
def _visit(
    w_j, acc, m, total, base, start, rows_j, cols, stride_n, N, scale_log2, window,
    head, seed, below,
    HEAD_DIM: tl.constexpr, VISIT: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One online-softmax step of row tile j over the rows [start, start + VISIT)."""
    rows_i = start + tl.arange(0, VISIT)
    w_i = load_rows(base, rows_i, cols, stride_n, N, HEAD_DIM, WHOLE=not MASKED)
    s = dot(w_j, tl.trans(w_i), None, PRECISION)  # [OWN, VISIT], unscaled
    if MASKED:
        seen = rows_i[None, :] < N
        if CAUSAL:
            seen = seen & (rows_i[None, :] <= rows_j[:, None])
        if window is not None:
            seen = seen & (tl.abs(rows_i[None, :] - rows_j[:, None]) <= window)
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - m_new[:, None])  # one FMA and one exponential each
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(p, 1)
    if seed is not None:
        p = tl.where(dropped(rows_j, rows_i, head, seed, below)[0], 0.0, p)
    acc = add_dot(p.to(w_i.dtype), w_i, acc * shrink[:, None], PRECISION)
    return acc, m_new, total


@triton.jit
def tied_attention_forward_kernel(
    W, OUT, LSE, SEQUENCES, stride_b, stride_n, N, rows_in_all, window, SEED, below,
    heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, VISIT: tl.constexpr,
    CAUSAL: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, OWN)
    head = tl.program_id(0) // tiles  # over batch * heads
    j = tl.program_id(0) % tiles
    if CAUSAL:
        j = tiles - 1 - j  # the longest rows first
    b = (head // heads).to(tl.int64)
    h = head % heads
    row, length = sequence(SEQUENCES, b, N, LAYOUT)
    base = head_base(W, row, b, h, stride_b, stride_n, HEAD_DIM, LAYOUT)
    rows_j = j * OWN + tl.arange(0, OWN)
    cols = tl.arange(0, BLOCK_D)
    if LAYOUT != "equal":  # noqa: SIM102 (decided at compilation)
        if j * OWN >= length:
            if LAYOUT == "padded":
                zeros = tl.zeros((OWN, BLOCK_D), tl.float32)
                store_rows(OUT, zeros, row, b, h, rows_j, cols, heads, N, length, HEAD_DIM, LAYOUT)
                lse_base = statistics(LSE, row, head, h, N, rows_in_all, LAYOUT)
                ones = tl.full((OWN,), 1.0, tl.float32)
                store_lse(lse_base, ones, ones, rows_j, N, length, LAYOUT)
            return
    w_j = load_rows(base, rows_j, cols, stride_n, length, HEAD_DIM)  # [OWN, BLOCK_D]

    acc = tl.zeros((OWN, BLOCK_D), tl.float32)
    m = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    scale_log2 = scale * LOG2E
    seed = None
    if SEED is not None:
        seed = tl.load(SEED)
    # Tiles from ``whole`` to ``unmasked`` are seen in full by all rows j.
    whole = 0
    unmasked = (j * OWN // VISIT if CAUSAL else length // VISIT) * VISIT
    end = tl.minimum(length, (j + 1) * OWN) if CAUSAL else length
    if window is not None:
        m = tl.full((OWN,), -1e38, tl.float32)  # a row may see nothing of the first tile
        first = tl.maximum(j * OWN - window, 0) // VISIT * VISIT
        whole = tl.cdiv(tl.maximum((j + 1) * OWN - 1 - window, 0), VISIT) * VISIT
        unmasked = tl.minimum(unmasked, (j * OWN + window + 1) // VISIT * VISIT)
        unmasked = tl.maximum(unmasked, whole)
        end = tl.minimum(end, (j + 1) * OWN + window)
        for start in range(first, tl.minimum(whole, end), VISIT):
            acc, m, total = _visit(
                w_j, acc, m, total, base, start, rows_j, cols, stride_n, length, scale_log2,
                window, head, seed, below, HEAD_DIM, VISIT, True, CAUSAL, PRECISION,
            )  # fmt: skip
    for start in range(whole, unmasked, VISIT):
        acc, m, total = _visit(
            w_j, acc, m, total, base, start, rows_j, cols, stride_n, length, scale_log2,
            window, head, seed, below, HEAD_DIM, VISIT, False, CAUSAL, PRECISION,
        )  # fmt: skip
    for start in range(unmasked, end, VISIT):
        acc, m, total = _visit(
            w_j, acc, m, total, base, start, rows_j, cols, stride_n, length, scale_log2,
            window, head, seed, below, HEAD_DIM, VISIT, True, CAUSAL, PRECISION,
        )  # fmt: skip

    if SEED is not None:
        acc *= grown(below)
    o = acc / total[:, None]
    store_rows(OUT, o, row, b, h, rows_j, cols, heads, N, length, HEAD_DIM, LAYOUT)
    lse_base = statistics(LSE, row, head, h, N, rows_in_all, LAYOUT)
    store_lse(lse_base, m, total, rows_j, N, length, LAYOUT)


# ---- backward


@triton.jit
def tied_attention_delta_kernel(
    DO, OUT, DELTA, SEQUENCES, stride_b, stride_n, N, rows_in_all, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) for each head and row, laid out as lse."""
    tiles = tl.cdiv(N, OWN)
    head = tl.program_id(0) // tiles
    rows = (tl.program_id(0) % tiles) * OWN + tl.arange(0, OWN)
    cols = tl.arange(0, BLOCK_D)
    b = (head // heads).to(tl.int64)
    h = head % heads
    row, length = sequence(SEQUENCES, b, N, LAYOUT)
    inner = heads * HEAD_DIM
    do_base = head_base(DO, row, b, h, stride_b, stride_n, HEAD_DIM, LAYOUT)
    do = load_rows(do_base, rows, cols, stride_n, length, HEAD_DIM)
    first = row if LAYOUT == "packed" else b * N
    o = load_rows(OUT + first * inner + h * HEAD_DIM, rows, cols, inner, length, HEAD_DIM)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(
        statistics(DELTA, row, head, h, N, rows_in_all, LAYOUT) + rows, delta, mask=rows < length
    )


@triton.jit
def _visit_backward(
    acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base, first, end, rows_j, cols,
    stride_n, do_stride_n, N, scale_log2, scale, window, head, seed, below,
    HEAD_DIM: tl.constexpr, VISIT: tl.constexpr, PART: tl.constexpr, BAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dw_j what the tiles of rows from first to end give it.

    PART says which halves exist: "both"; causally "before" (i < j: j attends to i), "after"
    (i > j: i attends to j) or "diagonal" (both, masked). BAND: some pairs are further apart than
    the window.
    """
    for start in range(first, end, VISIT):
        rows_i = start + tl.arange(0, VISIT)
        w_i = load_rows(w_base, rows_i, cols, stride_n, N, HEAD_DIM)
        s = dot(w_j, tl.trans(w_i), None, PRECISION)  # [OWN, VISIT], unscaled
        ds = tl.zeros_like(s)  # scale (dS_ji + dS_ij^T)
        if seed is not None:
            drop_ji, drop_ij = dropped(rows_j, rows_i, head, seed, below)
            growth = grown(below)
        if PART != "after":
            p_ji = tl.exp2(s * scale_log2 - lse_j[:, None])  # scale P_ji: lse_j carries the scale
            if PART == "diagonal":
                p_ji = tl.where(rows_i[None, :] <= rows_j[:, None], p_ji, 0.0)
            if BAND:
                p_ji = tl.where(tl.abs(rows_i[None, :] - rows_j[:, None]) <= window, p_ji, 0.0)
            dp_ji = dot(do_j, tl.trans(w_i), None, PRECISION)
            if seed is not None:
                dp_ji = tl.where(drop_ji, 0.0, dp_ji * growth)
            ds += p_ji * (dp_ji - delta_j[:, None])
        if PART != "before":
            do_i = load_rows(do_base, rows_i, cols, do_stride_n, N, HEAD_DIM)
            lse_i = tl.load(lse_base + rows_i, mask=rows_i < N, other=float("inf")) * LOG2E
            delta_i = tl.load(delta_base + rows_i, mask=rows_i < N, other=0.0) * scale
            p_ij = tl.exp2(s * scale_log2 - lse_i[None, :])  # P_ij^T
            if PART == "diagonal":
                p_ij = tl.where(rows_j[:, None] <= rows_i[None, :], p_ij, 0.0)
            if BAND:
                p_ij = tl.where(tl.abs(rows_i[None, :] - rows_j[:, None]) <= window, p_ij, 0.0)
            v_ij = p_ij
            if seed is not None:
                v_ij = tl.where(drop_ij, 0.0, p_ij * growth)
            acc = add_dot(v_ij.to(do_i.dtype), do_i, acc, PRECISION)
            dp_ij = dot(w_j, tl.trans(do_i), None, PRECISION)  # dP_ij^T
            if seed is not None:
                dp_ij = tl.where(drop_ij, 0.0, dp_ij * growth)
            ds += p_ij * (dp_ij * scale - delta_i[None, :])
        acc = add_dot(ds.to(w_i.dtype), w_i, acc, PRECISION)
    return acc


@triton.jit
def tied_attention_backward_kernel(
    DO, W, LSE, DELTA, DW, SEQUENCES, do_stride_b, do_stride_n, stride_b, stride_n, N, rows_in_all,
    window, SEED, below, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, VISIT: tl.constexpr,
    CAUSAL: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tl.static_assert(OWN % VISIT == 0, "causal tile edges must meet")
    tiles = tl.cdiv(N, OWN)
    head = tl.program_id(0) // tiles  # over batch * heads
    j = tl.program_id(0) % tiles
    b = (head // heads).to(tl.int64)
    h = head % heads
    row, length = sequence(SEQUENCES, b, N, LAYOUT)
    w_base = head_base(W, row, b, h, stride_b, stride_n, HEAD_DIM, LAYOUT)
    do_base = head_base(DO, row, b, h, do_stride_b, do_stride_n, HEAD_DIM, LAYOUT)
    lse_base = statistics(LSE, row, head, h, N, rows_in_all, LAYOUT)
    delta_base = statistics(DELTA, row, head, h, N, rows_in_all, LAYOUT)
    rows_j = j * OWN + tl.arange(0, OWN)
    cols = tl.arange(0, BLOCK_D)
    if LAYOUT != "equal":  # noqa: SIM102 (decided at compilation)
        if j * OWN >= length:
            if LAYOUT == "padded":
                zeros = tl.zeros((OWN, BLOCK_D), tl.float32)
                store_rows(DW, zeros, row, b, h, rows_j, cols, heads, N, length, HEAD_DIM, LAYOUT)
            return
    w_j = load_rows(w_base, rows_j, cols, stride_n, length, HEAD_DIM)  # [OWN, BLOCK_D]
    do_j = load_rows(do_base, rows_j, cols, do_stride_n, length, HEAD_DIM)
    lse_j = tl.load(lse_base + rows_j, mask=rows_j < length, other=float("inf")) * LOG2E
    lse_j -= tl.log2(scale)
    delta_j = tl.load(delta_base + rows_j, mask=rows_j < length, other=0.0)

    acc = tl.zeros((OWN, BLOCK_D), tl.float32)
    scale_log2 = scale * LOG2E
    seed = None
    if SEED is not None:
        seed = tl.load(SEED)
    own = j * OWN
    after = (j + 1) * OWN
    # Tiles from ``whole`` to ``edge`` are no further than the window from any row j.
    whole = 0
    edge = length
    if window is not None:
        first = tl.maximum(own - window, 0) // VISIT * VISIT
        whole = tl.cdiv(tl.maximum(after - 1 - window, 0), VISIT) * VISIT
        end = tl.minimum(length, after + window)
        edge = tl.minimum(end, (own + window + 1) // VISIT * VISIT)
        acc = _visit_backward(
            acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base, first,
            tl.minimum(whole, own if CAUSAL else end), rows_j, cols,
            stride_n, do_stride_n, length, scale_log2, scale, window, head, seed, below,
            HEAD_DIM, VISIT, "before" if CAUSAL else "both", True, PRECISION,
        )  # fmt: skip
    if CAUSAL:
        acc = _visit_backward(
            acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base, whole, own,
            rows_j, cols, stride_n, do_stride_n, length, scale_log2, scale, window, head, seed,
            below, HEAD_DIM, VISIT, "before", False, PRECISION,
        )  # fmt: skip
        acc = _visit_backward(
            acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base, own,
            tl.minimum(length, after), rows_j, cols, stride_n, do_stride_n, length, scale_log2,
            scale, window, head, seed, below, HEAD_DIM, VISIT, "diagonal", window is not None,
            PRECISION,
        )  # fmt: skip
        acc = _visit_backward(
            acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base, after, edge,
            rows_j, cols, stride_n, do_stride_n, length, scale_log2, scale, window, head, seed,
            below, HEAD_DIM, VISIT, "after", False, PRECISION,
        )  # fmt: skip
    else:
        acc = _visit_backward(
            acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base, whole, edge,
            rows_j, cols, stride_n, do_stride_n, length, scale_log2, scale, window, head, seed,
            below, HEAD_DIM, VISIT, "both", False, PRECISION,
        )  # fmt: skip
    if window is not None:
        acc = _visit_backward(
            acc, w_j, do_j, lse_j, delta_j, w_base, do_base, lse_base, delta_base,
            tl.maximum(edge, after if CAUSAL else whole), end, rows_j, cols,
            stride_n, do_stride_n, length, scale_log2, scale, window, head, seed, below,
            HEAD_DIM, VISIT, "after" if CAUSAL else "both", True, PRECISION,
        )  # fmt: skip

    store_rows(DW, acc, row, b, h, rows_j, cols, heads, N, length, HEAD_DIM, LAYOUT)


# ---- launchers


def forward(
    w: Tensor, heads: int, scale: float, causal: bool, mask: Mask = FULL
) -> tuple[Tensor, Tensor]:
    """w (B, N, heads*head_dim) -> o like w, and the log-sum-exp (B, heads, N) in float32.

    Packed: w (T, heads*head_dim) -> o like w, and (heads, T).
    """
    batch, n, rows_in_all, layout = _sizes(w, mask)
    w = _rows_in_place(w, n)
    o = w.new_empty(w.shape)
    lse = w.new_empty(lse_shape(w, heads), dtype=torch.float32)
    if batch == 0 or n == 0:
        return o, lse
    head_dim = w.shape[-1] // heads
    config = forward_config(w.dtype, head_dim, n)
    with on_device_of(w):
        tied_attention_forward_kernel[(batch * heads * triton.cdiv(n, config.own),)](
            w, o, lse, mask.sequences, *_strides(w), n, rows_in_all, _reach(mask, n),
            mask.seed, _below(mask), heads, scale,
            HEAD_DIM=head_dim, BLOCK_D=_block_d(head_dim), OWN=config.own, VISIT=config.visit,
            CAUSAL=causal, LAYOUT=layout, PRECISION=dot_precision(w.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=config.max_registers,
        )  # fmt: skip
    return o, lse


def backward(
    do: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    heads: int,
    scale: float,
    causal: bool,
    mask: Mask = FULL,
) -> Tensor:
    """dw, shaped as w, from do, shaped as o."""
    batch, n, rows_in_all, layout = _sizes(w, mask)
    w, do = _rows_in_place(w, n), _rows_in_place(do, n)
    dw = w.new_empty(w.shape)
    if batch == 0 or n == 0:
        return dw
    head_dim = w.shape[-1] // heads
    more = mask.window is not None or mask.seed is not None
    config = backward_config(w.dtype, head_dim, n, causal, more)
    delta = torch.empty_like(lse)
    with on_device_of(w):
        tied_attention_delta_kernel[(batch * heads * triton.cdiv(n, 64),)](
            do, o, delta, mask.sequences, *_strides(do), n, rows_in_all, heads,
            HEAD_DIM=head_dim, BLOCK_D=_block_d(head_dim), OWN=64, LAYOUT=layout,
        )  # fmt: skip
        tied_attention_backward_kernel[(batch * heads * triton.cdiv(n, config.own),)](
            do, w, lse, delta, dw, mask.sequences, *_strides(do), *_strides(w),
            n, rows_in_all, _reach(mask, n),
            mask.seed, _below(mask), heads, scale,
            HEAD_DIM=head_dim, BLOCK_D=_block_d(head_dim), OWN=config.own, VISIT=config.visit,
            CAUSAL=causal, LAYOUT=layout, PRECISION=dot_precision(w.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=config.max_registers,
        )  # fmt: skip
    return dw


def _sizes(w: Tensor, mask: Mask) -> tuple[int, int, int | None, str]:
    """Sequences, rows of the longest, rows in all (of packed sequences), and LAYOUT."""
    if mask.sequences is None:
        return w.shape[0], w.shape[1], None, "equal"
    if w.dim() == 3:
        return w.shape[0], w.shape[1], None, "padded"
    return len(mask.sequences) - 1, min(mask.longest, len(w)), len(w), "packed"


def _reach(mask: Mask, n: int) -> int | None:
    """The window, no wider than it can be, so that 32 bits hold it."""
    return None if mask.window is None else min(mask.window, n)


def _below(mask: Mask) -> int | None:
    """The draws below it drop."""
    return None if mask.seed is None else threshold(mask.dropout)


def _strides(t: Tensor) -> tuple[int | None, int]:
    """Between items of a batch (packed sequences have none) and between rows."""
    return (t.stride(0), t.stride(1)) if t.dim() == 3 else (None, t.stride(0))


def _rows_in_place(t: Tensor, n: int) -> Tensor:
    """t itself where its rows are contiguous, and n near enough for 32 bits, else a copy."""
    near = n * t.stride(-2) < 2**31
    return t if t.stride(-1) == 1 and near else t.contiguous()


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))
