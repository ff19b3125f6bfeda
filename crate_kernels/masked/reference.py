"""What CRATE-MAE does around its layers, in plain PyTorch: what is checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..patch_embedding.reference import patches_of


def masked_tokens_reference(
    x: Tensor, mask: Tensor, mask_token: Tensor, cls_token: Tensor, positions: Tensor
) -> Tensor:
    """``[cls; x, or where hidden the mask token] + pos``; differentiable by autograd.

    Arguments and result as in :func:`crate_kernels.masked.op.masked_tokens`.
    """
    x = torch.where(mask[..., None] > 0, mask_token.to(x.dtype), x)
    return torch.cat((cls_token.expand(len(x), -1, -1), x), dim=1) + positions


def masked_loss_reference(
    predicted: Tensor, img: Tensor, mask: Tensor, *, patch_size: int, norm_pix: bool = False
) -> Tensor:
    """The mean square of ``predicted - patch`` in a patch, averaged with the weights ``mask``.

    Arguments and result as in :func:`crate_kernels.masked.op.masked_loss`.
    """
    target = target_patches(img, patch_size, norm_pix)
    loss = ((predicted - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def target_patches(img: Tensor, patch_size: int, norm_pix: bool) -> Tensor:
    """The patches of img, (B, n, p*p*C); with ``norm_pix`` of mean 0 and variance 1 each."""
    patches = patches_of(img, (patch_size, patch_size))
    if not norm_pix:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6) ** 0.5
