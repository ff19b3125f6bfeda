"""What CRATE-MAE does around its layers in Triton: bound by memory, each tensor read once.

    forward   x = [cls; e, or where hidden the mask token] + pos       tokens_kernel
              loss = mean over hidden patches of mean (p - target)^2   loss_kernel
    backward  de = dx where shown, else 0, dmask_token = sum dx where  tokens_backward_kernel
              hidden, dcls = sum dx of the class token
              dp = 2 (p - target) dloss mask / (sum mask, pixels)      loss_backward_kernel

Of the tokens a program stays at one position and goes through images, so that what is added stays
in its registers, and its sum of dx is the class token's or a part of the mask token's: parts are
added in a fixed order, results are bitwise repeatable. The images are read where they lie, and
neither they nor predictions where nothing is hidden. The contracts are those of torch_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import on_device_of
from ..triton_common import multiprocessors

PROGRAMS, ROWS = 8, 4  # of the tokens: for each multiprocessor; rows at once. Not measured yet.


@triton.jit
def tokens_kernel(
    E, MASK, MASK_TOKEN, CLS, POS, X, batch, tokens, parts,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) % tokens
    part = tl.program_id(0) // tokens
    col = tl.arange(0, BLOCK)[None, :]
    pos = tl.load(POS + i * D + col, mask=col < D, other=0.0).to(tl.float32)
    token = tl.load(MASK_TOKEN + col, mask=col < D, other=0.0).to(E.dtype.element_ty)
    cls = tl.load(CLS + col, mask=col < D, other=0.0).to(tl.float32)
    given = tl.where(i > 0, token.to(tl.float32), cls)
    for first in range(part * ROWS, batch, parts * ROWS):
        b = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        at = b * (tokens - 1) + i - 1
        patch = (b < batch) & (i > 0)
        shown = patch & ~(tl.load(MASK + at, mask=patch, other=0.0) > 0)
        e = tl.load(E + at * D + col, mask=shown & (col < D), other=0.0).to(tl.float32)
        x = tl.where(shown, e, given) + pos
        to = X + (b * tokens + i) * D + col
        tl.store(to, x.to(X.dtype.element_ty), mask=(b < batch) & (col < D))


@triton.jit
def tokens_backward_kernel(
    DX, MASK, DE, SUMS, batch, tokens, parts,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """SUMS (parts, tokens, D): of dx over the images where it is not that of a patch shown."""
    i = tl.program_id(0) % tokens
    part = tl.program_id(0) // tokens
    col = tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(part * ROWS, batch, parts * ROWS):
        b = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        at = b * (tokens - 1) + i - 1
        patch = (b < batch) & (i > 0)
        inside = (b < batch) & (col < D)
        dx = tl.load(DX + (b * tokens + i) * D + col, mask=inside, other=0.0).to(tl.float32)
        shown = patch & ~(tl.load(MASK + at, mask=patch, other=0.0) > 0)
        de = tl.where(shown, dx, 0.0)
        tl.store(DE + at * D + col, de.to(DE.dtype.element_ty), mask=patch & (col < D))
        sums += tl.where(shown, 0.0, dx)
    to = SUMS + tl.program_id(0) * D + tl.arange(0, BLOCK)
    tl.store(to, tl.sum(sums, 0), mask=tl.arange(0, BLOCK) < D)


@triton.jit
def _away(
    P, IMG, weight, n, grid_w, stride_batch, stride_row, stride_b, stride_c, stride_h, stride_w,
    C: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Prediction less target, of the patch of this program; 0 where the weight is."""
    b = (tl.program_id(0) // n).to(tl.int64)
    patch = tl.program_id(0) % n
    y, x = patch // grid_w, patch % grid_w
    k = tl.arange(0, BLOCK)  # pixels row by row, channels innermost
    inside = k < tl.where(weight != 0, C * SIZE * SIZE, 0)
    at = b * stride_b + (k % C).to(tl.int64) * stride_c
    at += (y * SIZE + k // (C * SIZE)).to(tl.int64) * stride_h
    at += (x * SIZE + (k // C) % SIZE).to(tl.int64) * stride_w
    p = tl.load(P + b * stride_batch + patch.to(tl.int64) * stride_row + k, mask=inside, other=0.0)
    target = tl.load(IMG + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        target -= tl.sum(target, 0) / (C * SIZE * SIZE)
        target = tl.where(inside, target, 0.0)
        target *= tl.rsqrt(tl.sum(target * target, 0) / (C * SIZE * SIZE - 1) + 1e-6)
    return p.to(tl.float32) - target


@triton.jit
def loss_kernel(
    P, IMG, MASK, LOSS, n, grid_w,
    stride_batch, stride_row, stride_b, stride_c, stride_h, stride_w,
    C: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """LOSS (B*n,): weighted with the mask, to be summed."""
    weight = tl.load(MASK + tl.program_id(0))
    away = _away(
        P, IMG, weight, n, grid_w, stride_batch, stride_row, stride_b, stride_c, stride_h,
        stride_w, C, SIZE, BLOCK, NORM,
    )  # fmt: skip
    tl.store(LOSS + tl.program_id(0), weight * (tl.sum(away * away, 0) / (C * SIZE * SIZE)))


@triton.jit
def loss_backward_kernel(
    DLOSS, COUNT, P, IMG, MASK, DP, n, grid_w,
    stride_batch, stride_row, stride_b, stride_c, stride_h, stride_w,
    C: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    weight = tl.load(MASK + tl.program_id(0))
    scale = 2 * tl.load(DLOSS) / (tl.load(COUNT) * (C * SIZE * SIZE))
    away = _away(
        P, IMG, weight, n, grid_w, stride_batch, stride_row, stride_b, stride_c, stride_h,
        stride_w, C, SIZE, BLOCK, NORM,
    )  # fmt: skip
    k = tl.arange(0, BLOCK)
    to = DP + tl.program_id(0).to(tl.int64) * (C * SIZE * SIZE) + k
    tl.store(to, (away * (weight * scale)).to(DP.dtype.element_ty), mask=k < C * SIZE * SIZE)


# ---- launchers


def _parts(batch: int, tokens: int, t: Tensor) -> int:
    """Into how many programs the images of a position are divided."""
    parts = triton.cdiv(PROGRAMS * multiprocessors(t), tokens)
    return max(1, min(parts, triton.cdiv(batch, ROWS)))


def tokens_forward(
    x: Tensor,
    mask: Tensor,
    mask_token: Tensor,
    cls_token: Tensor,
    positions: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    batch, n, d = x.shape
    out = torch.empty(batch, 1 + n, d, dtype=dtype, device=x.device)
    parts = _parts(batch, 1 + n, x)
    if batch > 0:
        with on_device_of(x):
            tokens_kernel[(parts * (1 + n),)](
                x, mask, mask_token, cls_token, positions, out, batch, 1 + n, parts,
                D=d, BLOCK=triton.next_power_of_2(d), ROWS=ROWS, num_warps=4,
            )  # fmt: skip
    return out


def tokens_backward(
    dy: Tensor, mask: Tensor, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, d = dy.shape
    dx = torch.empty(batch, tokens - 1, d, dtype=x_dtype, device=dy.device)
    parts = _parts(batch, tokens, dy)
    sums = torch.empty(parts, tokens, d, dtype=torch.float32, device=dy.device)
    with on_device_of(dy):
        tokens_backward_kernel[(parts * tokens,)](
            dy, mask, dx, sums, batch, tokens, parts,
            D=d, BLOCK=triton.next_power_of_2(d), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return dx, sums[:, 1:].sum((0, 1)), sums[:, 0].sum(0)


def loss_forward(
    predicted: Tensor, img: Tensor, mask: Tensor, count: Tensor, patch_size: int, norm_pix: bool
) -> Tensor:
    losses = torch.empty(mask.numel(), dtype=torch.float32, device=mask.device)
    if mask.numel() > 0:
        with on_device_of(mask):
            loss_kernel[(mask.numel(),)](
                predicted, img, mask, losses, **_options(predicted, img, patch_size, norm_pix)
            )
    return losses.sum() / count


def loss_backward(
    dloss: Tensor,
    predicted: Tensor,
    img: Tensor,
    mask: Tensor,
    count: Tensor,
    patch_size: int,
    norm_pix: bool,
) -> Tensor:
    dp = torch.empty(predicted.shape, dtype=predicted.dtype, device=predicted.device)
    if mask.numel() > 0:
        with on_device_of(mask):
            loss_backward_kernel[(mask.numel(),)](
                dloss, count, predicted, img, mask, dp,
                **_options(predicted, img, patch_size, norm_pix),
            )  # fmt: skip
    return dp


def _options(predicted: Tensor, img: Tensor, patch_size: int, norm_pix: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(predicted.shape[2])
    batch, row, _ = predicted.stride()
    b, c, h, w = img.stride()
    return {
        "n": predicted.shape[1], "grid_w": img.shape[3] // patch_size,
        "stride_batch": batch, "stride_row": row,
        "stride_b": b, "stride_c": c, "stride_h": h, "stride_w": w,
        "C": img.shape[1], "SIZE": patch_size, "BLOCK": block, "NORM": norm_pix,
        "num_warps": max(1, min(8, block // 256)),
    }  # fmt: skip
