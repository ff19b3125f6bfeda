"""The passes of the stem in Triton: bound by memory, each tensor read once.

    forward   W' = W diag(gamma), b + W beta                           fold_kernel
              zhat = (patch - mean) rstd                               normalise_patches_kernel
              x = [cls; gamma (e' - mean) rstd + beta] + pos           embed_kernel
    backward  t = gamma dx, zhat = (e' - mean) rstd, e' = e + shift    embed_backward_kernel
              de = rstd (t - mean(t) - zhat mean(t zhat))
              dgamma = sum dx zhat, db = sum de, dpos = sum dx over the batch

A program of the backward pass stays at one position and goes through images, so that its sum of dx
is a part of dpos. Parts are added in a fixed order: results are bitwise repeatable. The contracts
are those of torch_kernels.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block.triton_kernels import sum_partials
from ..library import on_device_of
from ..triton_common import multiprocessors
from .torch_kernels import normalise_patches_backward  # seldom wanted: torch's own

__all__ = ["embed", "embed_backward", "fold", "normalise_patches", "normalise_patches_backward"]

PROGRAMS = 3  # of the backward pass, for each multiprocessor


FEW = 8  # rows for each multiprocessor: so few are bound by latency


def _rows_and_warps(d: int, few: bool = False) -> tuple[int, int]:
    """Rows a program takes at once, and its warps: 32 to 64 elements a thread, 8 of few rows."""
    block = triton.next_power_of_2(d)
    if few:
        return 1, max(1, min(8, block // 256))
    return (2 if block <= 1024 else 1), max(1, min(8, block // 1024))


@triton.jit
def fold_kernel(
    W, GAMMA, BETA, BIAS, FOLDED, SHIFT, P,
    PIXELS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of W (D, P) a program."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)  # in the order of the image: channel, pixel
    inside = k < P
    at = k % PIXELS * C + k // PIXELS
    w = tl.load(W + row.to(tl.int64) * P + at, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(GAMMA + at, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(BETA + at, mask=inside, other=0.0).to(tl.float32)
    to = FOLDED + row.to(tl.int64) * P + k
    tl.store(to, (w * gamma).to(FOLDED.dtype.element_ty), mask=inside)
    tl.store(SHIFT + row, tl.load(BIAS + row).to(tl.float32) + tl.sum(w * beta, 0))


@triton.jit
def normalise_patches_kernel(
    IMG, ZHAT, n_rows, n, grid_w, stride_b, stride_c, stride_h, stride_w, eps,
    C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # a patch of an image
    b, i = row // n, row % n
    y, x = i // grid_w, i % grid_w
    k = tl.arange(0, BLOCK)[None, :]  # in the order of the image: channel, row, column
    inside = (row < n_rows) & (k < C * PH * PW)
    at = b.to(tl.int64) * stride_b + (k // (PH * PW)).to(tl.int64) * stride_c
    at += (y * PH + (k // PW) % PH).to(tl.int64) * stride_h + (x * PW + k % PW) * stride_w
    patch = tl.load(IMG + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(patch, 1, keep_dims=True) / (C * PH * PW)
    away = tl.where(inside, patch - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(away * away, 1, keep_dims=True) / (C * PH * PW) + eps)
    out = ZHAT + row.to(tl.int64) * (C * PH * PW) + k
    tl.store(out, (away * rstd).to(ZHAT.dtype.element_ty), mask=inside)


@triton.jit
def embed_kernel(
    E, SHIFT, GAMMA, BETA, CLS, POS, OUT, n_rows, tokens, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_CLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # of OUT
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (col < D)
    given = inside
    at = row.to(tl.int64) * D + col  # of E
    if HAS_CLS:
        i = row % tokens
        given = inside & (i > 0)
        at -= (row // tokens + 1).to(tl.int64) * D
    e = tl.load(E + at, mask=given, other=0.0).to(tl.float32)
    e += tl.load(SHIFT + col, mask=col < D, other=0.0).to(tl.float32)
    gamma = tl.load(GAMMA + col, mask=col < D, other=0.0).to(tl.float32)
    beta = tl.load(BETA + col, mask=col < D, other=0.0).to(tl.float32)
    mean = tl.sum(e, 1, keep_dims=True) / D
    away = tl.where(col < D, e - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(away * away, 1, keep_dims=True) / D + eps)
    x = gamma * (away * rstd) + beta
    if HAS_CLS:
        cls = tl.load(CLS + col, mask=col < D, other=0.0).to(tl.float32)
        x = tl.where(i > 0, x, cls)
        x += tl.load(POS + i * D + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row.to(tl.int64) * D + col, x.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def embed_backward_kernel(
    DX, E, SHIFT, GAMMA, DE, DPOS, SUMS, batch, tokens, parts, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_CLS: tl.constexpr,
):  # fmt: skip
    """DPOS (parts, tokens, D); SUMS (parts, tokens, 2, D): shares of dgamma and of db."""
    i = tl.program_id(0) % tokens
    part = tl.program_id(0) // tokens
    col = tl.arange(0, BLOCK)[None, :]
    shift = tl.load(SHIFT + col, mask=col < D, other=0.0).to(tl.float32)
    gamma = tl.load(GAMMA + col, mask=col < D, other=0.0).to(tl.float32)
    sum_dx = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_gamma = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_de = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(part * ROWS, batch, parts * ROWS):
        b = first + tl.arange(0, ROWS)[:, None]
        inside = (b < batch) & (col < D)
        row = b.to(tl.int64) * tokens + i
        dx = tl.load(DX + row * D + col, mask=inside, other=0.0).to(tl.float32)
        sum_dx += dx
        given = inside
        if HAS_CLS:
            given = inside & (i > 0)
            dx = tl.where(given, dx, 0.0)
            row -= b + 1
        e = tl.load(E + row * D + col, mask=given, other=0.0).to(tl.float32) + shift
        mean = tl.sum(e, 1, keep_dims=True) / D
        away = tl.where(col < D, e - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(away * away, 1, keep_dims=True) / D + eps)
        zhat = away * rstd
        t = gamma * dx
        along = tl.sum(t, 1, keep_dims=True) / D
        across = tl.sum(t * zhat, 1, keep_dims=True) / D
        de = tl.where(given, rstd * (t - along - zhat * across), 0.0)
        tl.store(DE + row * D + col, de.to(DE.dtype.element_ty), mask=given)
        sum_gamma += dx * zhat
        sum_de += de
    to = tl.program_id(0) * D + tl.arange(0, BLOCK)
    within = tl.arange(0, BLOCK) < D
    tl.store(DPOS + to, tl.sum(sum_dx, 0), mask=within)
    sums = SUMS + tl.program_id(0) * (2 * D) + tl.arange(0, BLOCK)
    tl.store(sums, tl.sum(sum_gamma, 0), mask=within)
    tl.store(sums + D, tl.sum(sum_de, 0), mask=within)


# ---- launchers


def fold(
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    channels: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    given = [t.contiguous() for t in (weight, norm_weight, norm_bias, bias)]
    d, patch = weight.shape
    folded = torch.empty(d, patch, dtype=dtype, device=weight.device)
    shift = torch.empty(d, dtype=torch.float32, device=weight.device)
    with on_device_of(weight):
        fold_kernel[(d,)](
            *given, folded, shift, patch,
            PIXELS=patch // channels, C=channels, BLOCK=triton.next_power_of_2(patch),
        )  # fmt: skip
    return folded, shift


def normalise_patches(
    img: Tensor, patch_size: tuple[int, int], eps: float, dtype: torch.dtype
) -> Tensor:
    batch, channels, height, width = img.shape
    ph, pw = patch_size
    n, d = (height // ph) * (width // pw), channels * ph * pw
    zhat = torch.empty(batch, n, d, dtype=dtype, device=img.device)
    rows, num_warps = _rows_and_warps(d, batch * n <= FEW * multiprocessors(img))
    if batch > 0:
        with on_device_of(img):
            normalise_patches_kernel[(triton.cdiv(batch * n, rows),)](
                img, zhat, batch * n, n, width // pw, *img.stride(), eps,
                C=channels, PH=ph, PW=pw, BLOCK=triton.next_power_of_2(d), ROWS=rows,
                num_warps=num_warps,
            )  # fmt: skip
    return zhat


def embed(
    e: Tensor,
    shift: Tensor,
    gamma: Tensor,
    beta: Tensor,
    cls_token: Tensor | None,
    pos_embedding: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    batch, n, d = e.shape
    has_cls = cls_token is not None
    gamma, beta = gamma.contiguous(), beta.contiguous()
    if cls_token is not None and pos_embedding is not None:
        cls_token, pos_embedding = cls_token.contiguous(), pos_embedding.contiguous()
    x = torch.empty(batch, n + has_cls, d, dtype=dtype, device=e.device)
    n_rows = batch * (n + has_cls)
    rows, num_warps = _rows_and_warps(d, n_rows <= FEW * multiprocessors(e))
    if batch > 0:
        with on_device_of(e):
            embed_kernel[(triton.cdiv(n_rows, rows),)](
                e, shift, gamma, beta, cls_token, pos_embedding, x, n_rows, n + has_cls, eps,
                D=d, BLOCK=triton.next_power_of_2(d), ROWS=rows, HAS_CLS=has_cls,
                num_warps=num_warps,
            )  # fmt: skip
    return x


def embed_backward(
    dx: Tensor, e: Tensor, shift: Tensor, gamma: Tensor, has_cls: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, d = e.shape
    dx, gamma, tokens = dx.contiguous(), gamma.contiguous(), n + has_cls
    rows, num_warps = _rows_and_warps(d)
    parts = triton.cdiv(PROGRAMS * multiprocessors(e), tokens)
    parts = max(1, min(parts, triton.cdiv(batch, rows)))
    de = torch.empty_like(e)
    dpos = torch.empty(parts, tokens, d, dtype=torch.float32, device=e.device)
    sums = torch.empty(parts * tokens, 2, d, dtype=torch.float32, device=e.device)
    with on_device_of(e):
        embed_backward_kernel[(parts * tokens,)](
            dx, e, shift, gamma, de, dpos, sums, batch, tokens, parts, eps,
            D=d, BLOCK=triton.next_power_of_2(d), ROWS=rows, HAS_CLS=has_cls,
            num_warps=4 * num_warps,
        )  # fmt: skip
    dgamma, db, _ = sum_partials(sums)
    return de, db, dgamma, dpos.sum(0)
