"""The passes over rows of a CRATE layer in Triton: bound by memory, each tensor read once.

    forward   z = x (+ s p + b), h = gamma (z - mean) rstd + beta          normalise_kernel
              in place of h: U diag(gamma), its row sums and U beta        fold_kernel
              in place of u: diag(gamma) (I + G), column sums, beta (I + G)  fold_gram_kernel
              in place of a pass over x or z: mean, rstd from moments      statistics_kernel
              the weights in the dtype of the GEMMs                        round_kernel
    backward  t = gamma dh, zhat = (z - mean) rstd                         normalise_backward_kernel
              dz = rstd (t - mean(t) - zhat mean(t zhat)) (+ skip; 0 where z is), and h again
              dp = s dz, dgamma = sum dh zhat, dbeta = sum dh              and sum_partials_kernel
              db = sum dz (of skip, where there is one) or ds = sum dz p

There is no s here: crate_kernels/residual_norm has one, a tensor or a number.

A program of the backward pass keeps its part of the three sums in registers; the parts are added
in a fixed order, so results are bitwise repeatable. The contracts are those of torch_kernels.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import on_device_of
from ..triton_common import multiprocessors


@dataclass(frozen=True)
class RowsConfig:
    """Rows a program takes at once, warps, and (backward) programs for each multiprocessor."""

    rows: int
    num_warps: int
    programs: int = 0


# Measured on an H200 in bfloat16: docs/performance.md, "The passes over rows".
def forward_config(d: int, adds: bool) -> RowsConfig:
    if not adds:
        return RowsConfig(rows=2, num_warps=1)
    return RowsConfig(rows=1, num_warps=2 if d > 576 else 1)


def backward_config(d: int) -> RowsConfig:
    return RowsConfig(rows=2 if d > 512 else 4, num_warps=4, programs=3)


@triton.jit
def normalise_kernel(
    X, P, SCALE, BIAS, GAMMA, BETA, Z, H, STATS, n_rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr, ADD_BIAS: tl.constexpr, WRITE_Z: tl.constexpr, WRITE_H: tl.constexpr,
    FACTOR: tl.constexpr = 1.0,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    at = row.to(tl.int64) * D + col
    inside = (row < n_rows) & (col < D)
    if WRITE_H:
        gamma = tl.load(GAMMA + col, mask=col < D, other=0.0).to(tl.float32)
        beta = tl.load(BETA + col, mask=col < D, other=0.0).to(tl.float32)
    z = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        p = tl.load(P + at, mask=inside, other=0.0).to(tl.float32)
        if SCALE is not None:
            p *= tl.load(SCALE + col, mask=col < D, other=0.0).to(tl.float32)
        if FACTOR != 1:
            p *= FACTOR
        z += p
    if ADD_BIAS:
        z += tl.load(BIAS + col, mask=col < D, other=0.0).to(tl.float32)
    if WRITE_Z:
        tl.store(Z + at, z.to(Z.dtype.element_ty), mask=inside)
    mean = tl.sum(z, 1, keep_dims=True) / D
    away = tl.where(col < D, z - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(away * away, 1, keep_dims=True) / D + eps)
    if WRITE_H:
        h = gamma * (away * rstd) + beta
        tl.store(H + at, h.to(H.dtype.element_ty), mask=inside)
    tl.store(STATS + 2 * row, mean, mask=row < n_rows)
    tl.store(STATS + 2 * row + 1, rstd, mask=row < n_rows)


@triton.jit
def fold_kernel(
    U, GAMMA, BETA, FOLDED, SUMS, SHIFT,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """FOLDED = U diag(gamma) in its dtype, SUMS its sum and SHIFT = U beta, a row a program."""
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    u = tl.load(U + row.to(tl.int64) * D + col, mask=col < D, other=0.0).to(tl.float32)
    gamma = tl.load(GAMMA + col, mask=col < D, other=0.0).to(tl.float32)
    beta = tl.load(BETA + col, mask=col < D, other=0.0).to(tl.float32)
    folded = (u * gamma).to(FOLDED.dtype.element_ty)
    tl.store(FOLDED + row.to(tl.int64) * D + col, folded, mask=col < D)
    tl.store(SUMS + row, tl.sum(folded.to(tl.float32), 0))
    tl.store(SHIFT + row, tl.sum(u * beta, 0))


@triton.jit
def fold_gram_kernel(
    G, GAMMA, BETA, FOLDED, SCALES, SUMS, SHIFT,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """FOLDED^T = diag(gamma) (I + G) diag(1 / SCALES) in its dtype, SUMS its column sums, SHIFT =
    beta (I + G), BLOCK_N columns a program. With the scales the diagonal is exact, and a small
    gamma does not make the rest too small for the dtype."""
    all_gamma = tl.load(GAMMA + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < D, other=0.0)
    largest = tl.max(tl.abs(all_gamma.to(tl.float32)), 0)
    unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where((unit > 0) & (unit < float("inf")), unit, 1.0)  # a power of two
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    diagonal = 1 + tl.load(G + col.to(tl.int64) * (D + 1), mask=col < D, other=0.0).to(tl.float32)
    diagonal *= tl.load(GAMMA + col, mask=col < D, other=0.0).to(tl.float32) / unit
    rounded = diagonal.to(FOLDED.dtype.element_ty).to(tl.float32)
    scale = unit * tl.where(rounded == 0, 1.0, diagonal / tl.where(rounded == 0, 1.0, rounded))
    sums = tl.zeros((BLOCK_N,), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    for first in tl.static_range(0, D, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[:, None]
        at = k.to(tl.int64) * D + col[None, :]
        inside = (k < D) & (col[None, :] < D)
        g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
        on_diagonal = k == col[None, :]
        g += tl.where(on_diagonal, 1.0, 0.0)
        gamma = tl.load(GAMMA + k, mask=k < D, other=0.0).to(tl.float32)
        beta = tl.load(BETA + k, mask=k < D, other=0.0).to(tl.float32)
        folded = tl.where(on_diagonal, rounded[None, :], gamma * g / scale[None, :])
        folded = folded.to(FOLDED.dtype.element_ty)
        tl.store(FOLDED + col[None, :].to(tl.int64) * D + k, folded, mask=inside)
        sums += tl.sum(folded.to(tl.float32), 0)
        shift += tl.sum(beta * g, 0)
    tl.store(SCALES + col, scale, mask=col < D)
    tl.store(SUMS + col, sums, mask=col < D)
    tl.store(SHIFT + col, shift, mask=col < D)


@triton.jit
def statistics_kernel(
    MOMENTS, STATS, n_rows, eps, n_spans,
    D: tl.constexpr, SPANS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """STATS (rows, 2): mean and rstd, of MOMENTS (n_spans, rows, 2)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    span = tl.arange(0, SPANS)[:, None]
    inside = (row < n_rows) & (span < n_spans)
    at = MOMENTS + 2 * (span.to(tl.int64) * n_rows + row)
    mean = tl.sum(tl.load(at, mask=inside, other=0.0), 0, keep_dims=True) / D
    square = tl.sum(tl.load(at + 1, mask=inside, other=0.0), 0, keep_dims=True) / D
    variance = tl.maximum(square - mean * mean, 0.0)
    tl.store(STATS + 2 * row, mean, mask=row < n_rows)
    tl.store(STATS + 2 * row + 1, tl.rsqrt(variance + eps), mask=row < n_rows)


@triton.jit
def round_kernel(
    A, B, C, OUT, n_a, n_b, n_c,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT = A, B (may be None) and C, one after another, in its dtype."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(A + at, mask=at < n_a, other=0.0).to(tl.float32)
    left = at - n_a
    if B is not None:
        value += tl.load(B + left, mask=(left >= 0) & (left < n_b), other=0.0).to(tl.float32)
        left -= n_b
    value += tl.load(C + left, mask=(left >= 0) & (left < n_c), other=0.0).to(tl.float32)
    tl.store(OUT + at, value.to(OUT.dtype.element_ty), mask=left < n_c)


@triton.jit
def _load_rows(
    DH, Z, STATS, SKIP, P, row, col, n_rows,
    D: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    at = row.to(tl.int64) * D + col
    inside = (row < n_rows) & (col < D)
    dh = tl.load(DH + at, mask=inside, other=0.0)
    z = tl.load(Z + at, mask=inside, other=0.0)
    skip = tl.load(SKIP + at, mask=inside, other=0.0) if ADD else dh
    p = dh if P is None else tl.load(P + at, mask=inside, other=0.0)
    mean = tl.load(STATS + 2 * row, mask=row < n_rows, other=0.0)
    rstd = tl.load(STATS + 2 * row + 1, mask=row < n_rows, other=0.0)
    return dh, z, skip, p, mean, rstd


@triton.jit
def normalise_backward_kernel(
    DH, Z, STATS, GAMMA, BETA, SKIP, P, SCALE, DZ, DP, H, PARTIALS, n_rows,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr, WRITE_H: tl.constexpr, SUM_DZ: tl.constexpr, MASK: tl.constexpr,
    FACTOR: tl.constexpr = 1.0,
):  # fmt: skip
    """PARTIALS (programs, 2 or 3, D): shares of dgamma, of dbeta and of the sum of dz P, else of
    SKIP, else of dz."""
    col = tl.arange(0, BLOCK)[None, :]
    gamma = tl.load(GAMMA + col, mask=col < D, other=0.0).to(tl.float32)
    if WRITE_H:
        beta = tl.load(BETA + col, mask=col < D, other=0.0).to(tl.float32)
    if SCALE is not None:
        scale = tl.load(SCALE + col, mask=col < D, other=0.0).to(tl.float32)
    sum_gamma = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_beta = tl.zeros((ROWS, BLOCK), tl.float32)
    if SUM_DZ:
        sum_dz = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0) * ROWS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    dh_next, z_next, skip_next, p_next, mean_next, rstd_next = _load_rows(
        DH, Z, STATS, SKIP, P, row, col, n_rows, D, ADD
    )
    for first in range(tl.program_id(0) * ROWS, n_rows, step):
        dh, z, skip = dh_next.to(tl.float32), z_next.to(tl.float32), skip_next
        p, mean, rstd = p_next, mean_next, rstd_next
        row = first + tl.arange(0, ROWS)[:, None]
        dh_next, z_next, skip_next, p_next, mean_next, rstd_next = _load_rows(
            DH, Z, STATS, SKIP, P, row + step, col, n_rows, D, ADD
        )
        at = row.to(tl.int64) * D + col
        inside = (row < n_rows) & (col < D)
        zhat = tl.where(inside, (z - mean) * rstd, 0.0)
        t = gamma * dh
        along = tl.sum(t, 1, keep_dims=True) / D
        across = tl.sum(t * zhat, 1, keep_dims=True) / D
        dz = rstd * (t - along - zhat * across)
        if ADD:
            dz += skip.to(tl.float32)
        if MASK:
            dz = tl.where(z == 0, 0.0, dz)
        tl.store(DZ + at, dz.to(DZ.dtype.element_ty), mask=inside)
        if DP is not None:
            dp = dz if SCALE is None else dz * scale
            if FACTOR != 1:
                dp *= FACTOR
            tl.store(DP + at, dp.to(DP.dtype.element_ty), mask=inside)
        if WRITE_H:
            tl.store(H + at, (gamma * zhat + beta).to(H.dtype.element_ty), mask=inside)
        sum_gamma += dh * zhat
        sum_beta += dh
        if SUM_DZ:
            if P is not None:
                dz *= p.to(tl.float32)
            elif ADD:
                dz = skip.to(tl.float32)
            sum_dz += tl.where(inside, dz, 0.0)
    sums = 3 if SUM_DZ else 2
    to = PARTIALS + tl.program_id(0) * (sums * D) + tl.arange(0, BLOCK)
    within = tl.arange(0, BLOCK) < D
    tl.store(to, tl.sum(sum_gamma, 0), mask=within)
    tl.store(to + D, tl.sum(sum_beta, 0), mask=within)
    if SUM_DZ:
        tl.store(to + 2 * D, tl.sum(sum_dz, 0), mask=within)


@triton.jit
def sum_partials_kernel(
    PARTIALS, OUT0, OUT1, OUT2, n_parts,
    D: tl.constexpr, SUMS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT0, OUT1, OUT2 (D,), as many as SUMS: PARTIALS (n_parts, SUMS, D) summed over the parts."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, n_parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        at = (part * SUMS + which) * D + col[None, :]
        total += tl.load(PARTIALS + at, mask=(part < n_parts) & (col[None, :] < D), other=0.0)
    sums = tl.sum(total, 0)
    if which == 0:
        tl.store(OUT0 + col, sums.to(OUT0.dtype.element_ty), mask=col < D)
    # Apart, since SUMS decides while compiling: OUT1 and OUT2 may be None.
    if SUMS > 1:  # noqa: SIM102
        if which == 1:
            tl.store(OUT1 + col, sums.to(OUT1.dtype.element_ty), mask=col < D)
    if SUMS > 2:  # noqa: SIM102
        if which == 2:
            tl.store(OUT2 + col, sums.to(OUT2.dtype.element_ty), mask=col < D)


def normalise(
    x: Tensor,
    p: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    x, gamma, beta = x.contiguous(), gamma.contiguous(), beta.contiguous()
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    z, stats = _launch_normalise(x, p, bias, gamma, beta, h, eps, dtype)
    return z, h, stats


def statistics(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in ``dtype``, and mean and rstd of its rows: :func:`normalise` without h."""
    return _launch_normalise(x.contiguous(), None, None, None, None, None, eps, dtype)


def _launch_normalise(
    x: Tensor,
    p: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    h: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """z and the statistics; writes h where there is one."""
    d = x.shape[-1]
    n_rows = x.numel() // d
    bias = None if bias is None else bias.contiguous()
    writes_z = p is not None or x.dtype != dtype
    z = torch.empty(x.shape, dtype=dtype, device=x.device) if writes_z else x
    stats = torch.empty(n_rows, 2, dtype=torch.float32, device=x.device)
    config = forward_config(d, p is not None)
    if n_rows > 0:
        with on_device_of(x):
            normalise_kernel[(triton.cdiv(n_rows, config.rows),)](
                x, p, None, bias, gamma, beta, z, h, stats, n_rows, eps,
                D=d, BLOCK=triton.next_power_of_2(d), ROWS=config.rows,
                ADD=p is not None, ADD_BIAS=bias is not None, WRITE_Z=writes_z,
                WRITE_H=h is not None, num_warps=config.num_warps,
            )  # fmt: skip
    return z, stats


def statistics_of_moments(moments: Tensor, d: int, eps: float) -> Tensor:
    """The same statistics, of rows of d elements, from the moments that a GEMM of csrc/ista wrote.

    The variance is a mean square less a squared mean, which loses no more where a mean is far from
    zero than the rounding of the row itself does.
    """
    n_spans, n_rows, _ = moments.shape
    stats = torch.empty(n_rows, 2, dtype=torch.float32, device=moments.device)
    rows = 128
    with on_device_of(moments):
        statistics_kernel[(triton.cdiv(n_rows, rows),)](
            moments, stats, n_rows, eps, n_spans, D=d, SPANS=triton.next_power_of_2(n_spans),
            ROWS=rows, num_warps=4,
        )  # fmt: skip
    return stats


def fold(
    w: Tensor, gamma: Tensor, beta: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """For LN(x) w^T without the normed rows: w diag(gamma) in ``dtype``, its row sums, w beta."""
    rows, d = w.shape
    folded = torch.empty(w.shape, dtype=dtype, device=w.device)
    sums, shift = torch.empty(2, rows, dtype=torch.float32, device=w.device)
    with on_device_of(w):
        fold_kernel[(rows,)](
            w.contiguous(), gamma.contiguous(), beta.contiguous(), folded, sums, shift,
            D=d, BLOCK=triton.next_power_of_2(d), num_warps=2,
        )  # fmt: skip
    return folded, sums, shift


def fold_gram(gram: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For LN(z) (I + G) without the normed rows: B^T of B = diag(gamma) (I + G) diag(1 / e), in the
    dtype of G, then e, the column sums of B, and beta (I + G)."""
    d = gram.shape[0]
    folded = torch.empty_like(gram)
    scales, sums, shift = torch.empty(3, d, dtype=torch.float32, device=gram.device)
    with on_device_of(gram):
        fold_gram_kernel[(triton.cdiv(d, 8),)](
            gram, gamma.contiguous(), beta.contiguous(), folded, scales, sums, shift,
            D=d, BLOCK=triton.next_power_of_2(d), BLOCK_K=256, BLOCK_N=8, num_warps=4,
        )  # fmt: skip
    return folded, scales, sums, shift


def rounded(w_qkv: Tensor, w_out: Tensor | None, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Their elements in ``dtype``, one tensor after another."""
    given = [None if t is None else t.contiguous() for t in (w_qkv, w_out, weight)]
    sizes = [0 if t is None else t.numel() for t in given]
    out = torch.empty(sum(sizes), dtype=dtype, device=weight.device)
    block = 2048
    with on_device_of(weight):
        round_kernel[(triton.cdiv(out.numel(), block),)](
            *given, out, *sizes, BLOCK=block, num_warps=4
        )
    return out


def normalise_backward(
    dh: Tensor,
    z: Tensor,
    stats: Tensor,
    gamma: Tensor,
    beta: Tensor,
    skip: Tensor | None,
    wants_h: bool,
    wants_sum: bool,
    masks: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    d = z.shape[-1]
    n_rows = z.numel() // d
    gamma, beta = gamma.contiguous(), beta.contiguous()
    dz = torch.empty_like(z)
    h = torch.empty_like(z) if wants_h else None
    config, n_sums = backward_config(d), 3 if wants_sum else 2
    programs = min(triton.cdiv(n_rows, config.rows), config.programs * multiprocessors(z))
    partials = torch.empty(programs, n_sums, d, dtype=torch.float32, device=z.device)
    if n_rows > 0:
        with on_device_of(z):
            normalise_backward_kernel[(programs,)](
                dh, z, stats, gamma, beta, skip, None, None, dz, None, h, partials, n_rows,
                D=d, BLOCK=triton.next_power_of_2(d), ROWS=config.rows,
                ADD=skip is not None, WRITE_H=wants_h, SUM_DZ=wants_sum, MASK=masks,
                num_warps=config.num_warps,
            )  # fmt: skip
    return dz, h, *sum_partials(partials)


def sum_partials(partials: Tensor) -> tuple[Tensor, Any, Any]:
    """(parts, 1 to 3, D) summed over the parts, in order: as many of (D,), then None."""
    parts, n_sums, d = partials.shape
    sums: Any = [torch.empty(d, dtype=torch.float32, device=partials.device) for _ in range(n_sums)]
    sums += [None] * (3 - n_sums)
    with on_device_of(partials):
        sum_partials_kernel[(triton.cdiv(d, 32), n_sums)](
            partials, *sums, parts, D=d, SUMS=n_sums, PARTS=128, BLOCK=32, num_warps=4,
        )  # fmt: skip
    return tuple(sums)
