"""Rotary embedding and RMSNorm in Triton: bound by memory, each tensor read and written once.

    forward   r = rotate(w),  y = rstd r                             tied_rotary_forward_kernel
    backward  dr = rstd (dy - y mean(dy y)),  dw = rotate back(dr)   tied_rotary_backward_kernel

A program takes some rows, keeps their angles and goes through the heads. Columns c and
c + head_dim/2 are loaded as two tiles, so that a pair meets in one thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import on_device_of

# Elements of one tile, 16 bytes in bfloat16 for each of 128 threads: not measured yet.
TILE = 1024


@triton.jit
def _angles(COS, SIN, n, inside, col, HALF: tl.constexpr):
    at = n * HALF + col
    mask = inside & (col < HALF)
    cos = tl.load(COS + at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(SIN + at, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _load_pair(base, mask, HALF: tl.constexpr):
    a = tl.load(base, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base + HALF, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def tied_rotary_forward_kernel(
    W, COS, SIN, Y, RSTD, stride_b, stride_n, n_rows, N, heads, eps,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = row < n_rows
    mask = inside & (col < HALF)
    n = row % N
    cos, sin = _angles(COS, SIN, n, inside, col, HALF)  # [ROWS, BLOCK]
    w = W + (row // N) * stride_b + n * stride_n + col
    y = Y + row * (2 * HALF * heads) + col
    for h in range(heads):
        a, b = _load_pair(w + h * (2 * HALF), mask, HALF)
        ra = a * cos + b * sin
        rb = b * cos - a * sin
        if NORM:
            rstd = tl.rsqrt(tl.sum(ra * ra + rb * rb, 1, keep_dims=True) / (2 * HALF) + eps)
            tl.store(RSTD + row * heads + h, rstd, mask=inside)
            ra *= rstd
            rb *= rstd
        out = y + h * (2 * HALF)
        tl.store(out, ra.to(Y.dtype.element_ty), mask=mask)
        tl.store(out + HALF, rb.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def tied_rotary_backward_kernel(
    DY, Y, RSTD, COS, SIN, DW, stride_b, stride_n, n_rows, N, heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = row < n_rows
    mask = inside & (col < HALF)
    n = row % N
    cos, sin = _angles(COS, SIN, n, inside, col, HALF)  # [ROWS, BLOCK]
    dy = DY + (row // N) * stride_b + n * stride_n + col
    at = row * (2 * HALF * heads) + col
    for h in range(heads):
        da, db = _load_pair(dy + h * (2 * HALF), mask, HALF)
        if NORM:
            ya, yb = _load_pair(Y + at + h * (2 * HALF), mask, HALF)
            rstd = tl.load(RSTD + row * heads + h, mask=inside, other=0.0)
            mean = tl.sum(da * ya + db * yb, 1, keep_dims=True) / (2 * HALF)
            da = rstd * (da - ya * mean)
            db = rstd * (db - yb * mean)
        out = DW + at + h * (2 * HALF)
        tl.store(out, (da * cos - db * sin).to(DW.dtype.element_ty), mask=mask)
        tl.store(out + HALF, (db * cos + da * sin).to(DW.dtype.element_ty), mask=mask)


# ---- launchers


def forward(
    w: Tensor, cos: Tensor, sin: Tensor, heads: int, norm_eps: float | None
) -> tuple[Tensor, Tensor]:
    """w (B, N, heads*head_dim) or packed -> y like w, and rstd (..., heads), empty without norm."""
    y = w.new_empty(w.shape)
    norm = norm_eps is not None
    rstd = w.new_empty((*w.shape[:-1], heads) if norm else 0, dtype=torch.float32)
    if w.numel() == 0:
        return y, rstd
    w = _rows_in_place(w)
    with on_device_of(w):
        grid, sizes, options = _launch(w, heads)
        tied_rotary_forward_kernel[grid](
            w, cos.contiguous(), sin.contiguous(), y, rstd, *sizes, norm_eps or 0.0,
            NORM=norm, **options,
        )  # fmt: skip
    return y, rstd


def backward(
    dy: Tensor, y: Tensor | None, rstd: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """dw like dy; y is None without norm."""
    dw = dy.new_empty(dy.shape)
    if dy.numel() == 0:
        return dw
    dy = _rows_in_place(dy)
    with on_device_of(dy):
        grid, sizes, options = _launch(dy, heads)
        tied_rotary_backward_kernel[grid](
            dy, y, rstd, cos.contiguous(), sin.contiguous(), dw, *sizes,
            NORM=y is not None, **options,
        )  # fmt: skip
    return dw


def _launch(t: Tensor, heads: int) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """The grid, the kernels' integers and their constants for t (..., N, heads*head_dim)."""
    half = t.shape[-1] // heads // 2
    block = triton.next_power_of_2(half)
    rows = max(1, TILE // block)
    n_rows, n = t.numel() // t.shape[-1], t.shape[-2]
    stride_b = t.stride(0) if t.dim() == 3 else 0
    sizes = (stride_b, t.stride(-2), n_rows, n, heads)
    return (triton.cdiv(n_rows, rows),), sizes, {"HALF": half, "BLOCK": block, "ROWS": rows}


def _rows_in_place(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
