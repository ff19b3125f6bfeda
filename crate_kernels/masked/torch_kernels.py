"""The "reference" backend of masked_tokens and masked_loss: torch's own kernels, on any device.

Sums are in float32 or better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import wide_dtype
from .reference import masked_tokens_reference, target_patches


def tokens_forward(
    x: Tensor,
    mask: Tensor,
    mask_token: Tensor,
    cls_token: Tensor,
    positions: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """[cls; x, or where hidden the mask token] + pos, (B, 1 + n, D) in ``dtype``."""
    wide = wide_dtype(torch.promote_types(x.dtype, positions.dtype))
    given = (mask_token.to(x.dtype).to(wide), cls_token.to(wide), positions.to(wide))
    return masked_tokens_reference(x.to(wide), mask, *given).to(dtype)


def tokens_backward(
    dy: Tensor, mask: Tensor, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in ``x_dtype``, and of the mask token and the class token the sums, (D,)."""
    hidden, wide = mask[..., None] > 0, dy.to(wide_dtype(dy.dtype))
    dx = wide[:, 1:].masked_fill(hidden, 0)
    dmask_token = wide[:, 1:].where(hidden, 0).sum((0, 1))
    return dx.to(x_dtype), dmask_token, wide[:, 0].sum(0)


def loss_forward(
    predicted: Tensor, img: Tensor, mask: Tensor, count: Tensor, patch_size: int, norm_pix: bool
) -> Tensor:
    """The loss, a scalar in the dtype of ``count``, the sum of the mask. What is predicted counts
    only where the mask is not 0."""
    away = _away(predicted, img, mask, count, patch_size, norm_pix)
    return (away.square().mean(-1) * mask).sum() / count


def loss_backward(
    dloss: Tensor,
    predicted: Tensor,
    img: Tensor,
    mask: Tensor,
    count: Tensor,
    patch_size: int,
    norm_pix: bool,
) -> Tensor:
    """The gradient of predicted, contiguous, in its dtype."""
    away = _away(predicted, img, mask, count, patch_size, norm_pix)
    weight = (mask * (2 * dloss / (count * predicted.shape[-1])))[..., None]
    return (away * weight).to(predicted.dtype, memory_format=torch.contiguous_format)


def _away(
    predicted: Tensor, img: Tensor, mask: Tensor, count: Tensor, patch_size: int, norm_pix: bool
) -> Tensor:
    """predicted - target, 0 where the mask is."""
    away = predicted - target_patches(img.to(count.dtype), patch_size, norm_pix)
    return away.masked_fill(mask[..., None] == 0, 0)
