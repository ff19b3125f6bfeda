"""Residual and LayerNorm in plain PyTorch, forward and backward: what is checked against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..block.reference import layer_norm_backward


def residual_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None = None,
    scale: Tensor | float | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``z = x + scale * y``, ``h = LayerNorm(z)``; differentiable by autograd.

    Shapes as in :func:`crate_kernels.residual_norm`, float64 included; h is in z's dtype.
    """
    z = _sum(x, y, scale)
    return z, F.layer_norm(z, z.shape[-1:], weight, bias, eps)


def residual_norm_reference_backward(
    dz: Tensor | None,
    dh: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    scale: Tensor | float | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor | None, ...]:
    """Gradients ``(dx, dweight, dbias, dy, dscale)`` of :func:`residual_norm_reference`.

    ``dx = dz + LayerNorm'(dh)``, ``dy = scale * dx``, ``dscale = sum dx * y`` over all rows; dz is
    the gradient of the first result, None for zeros. What there is no argument for is None.
    """
    dx, dweight, dbias = layer_norm_backward(dh, _sum(x, y, scale), weight, eps)
    dx = dx if dz is None else dx + dz
    if y is None:
        return dx, dweight, dbias, None, None
    if not isinstance(scale, Tensor):
        return dx, dweight, dbias, dx if scale is None else scale * dx, None
    return dx, dweight, dbias, scale * dx, (dx * y).reshape(-1, y.shape[-1]).sum(0)


def _sum(x: Tensor, y: Tensor | None, scale: Tensor | float | None) -> Tensor:
    if y is None:
        return x
    return x + (y if scale is None else scale * y)
