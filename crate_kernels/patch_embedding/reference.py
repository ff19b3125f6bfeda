"""The stem in plain PyTorch, forward and backward: what its kernels are checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block.reference import layer_norm_backward


def patches_of(img: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) -> patches (B, n, ph*pw*C), row by row, channels innermost."""
    ph, pw = patch_size
    b, c, height, width = img.shape
    grid = img.reshape(b, c, height // ph, ph, width // pw, pw)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, ph * pw * c)


def image_of(patches: Tensor, patch_size: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """The images (B, C, H, W) = ``shape`` that :func:`patches_of` cuts into ``patches``."""
    ph, pw = patch_size
    b, c, height, width = shape
    grid = patches.reshape(b, height // ph, width // pw, ph, pw, c)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(shape)


def patch_embedding_reference(
    img: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    cls_token: Tensor | None = None,
    pos_embedding: Tensor | None = None,
    *,
    patch_size: tuple[int, int],
    eps: float = 1e-5,
) -> Tensor:
    """``t = LN2(LN1(patches) W^T + b); x = [cls; t] + pos``, differentiable by autograd.

    Shapes and dtypes as in :func:`crate_kernels.patch_embedding`, float64 included.
    """
    patches = patches_of(img, patch_size)
    h = F.layer_norm(patches, patches.shape[-1:], norm1_weight, norm1_bias, eps)
    e = F.linear(h, weight, bias)
    t = F.layer_norm(e, e.shape[-1:], norm2_weight, norm2_bias, eps)
    if cls_token is None or pos_embedding is None:
        return t
    return torch.cat((cls_token.expand(len(t), -1, -1), t), dim=1) + pos_embedding


def patch_embedding_reference_backward(
    dx: Tensor,
    img: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    cls_token: Tensor | None = None,
    pos_embedding: Tensor | None = None,
    *,
    patch_size: tuple[int, int],
    eps: float = 1e-5,
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`patch_embedding_reference`, of img and then of the rest in its order."""
    patches = patches_of(img, patch_size)
    h = F.layer_norm(patches, patches.shape[-1:], norm1_weight, norm1_bias, eps)
    dcls = dpos = None
    if cls_token is not None:
        dpos = dx.sum(0, keepdim=True)
        dcls, dx = dpos[:, :1].clone(), dx[:, 1:]
    de, dnorm2_weight, dnorm2_bias = layer_norm_backward(
        dx, F.linear(h, weight, bias), norm2_weight, eps
    )
    dweight = de.flatten(0, 1).mT @ h.flatten(0, 1)
    dp, dnorm1_weight, dnorm1_bias = layer_norm_backward(de @ weight, patches, norm1_weight, eps)
    return (
        image_of(dp, patch_size, tuple(img.shape)), dnorm1_weight, dnorm1_bias,
        dweight, de.sum((0, 1)), dnorm2_weight, dnorm2_bias, dcls, dpos,
    )  # fmt: skip
