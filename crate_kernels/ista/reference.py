"""ISTA in plain PyTorch, forward and backward: what every kernel of this op is checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ista_reference(
    x: Tensor, weight: Tensor, *, step_size: float = 0.1, lambd: float = 0.1
) -> Tensor:
    """``y = relu(x + eta (x W - x W^T W) - eta lambda)``, differentiable by autograd.

    Shapes and dtypes as in :func:`crate_kernels.ista`, float64 included.
    """
    residual = x - F.linear(x, weight)
    return F.relu(x + step_size * (residual @ weight) - step_size * lambd)


def ista_reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, step_size: float = 0.1, lambd: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Gradients ``(dx, dweight)`` of :func:`ista_reference`.

    ``g = dy * 1[y > 0]``, ``G = eta (W - W^T W)``, ``dx = g + g G^T``,
    ``M = x^T g`` over all tokens, ``dW = eta (M - W (M + M^T))``.
    """
    y = ista_reference(x, weight, step_size=step_size, lambd=lambd)
    g = torch.where(y <= 0, 0, dy)
    gram = gram_reference(weight, step_size)
    rows = (-1, x.shape[-1])
    m = x.reshape(rows).mT @ g.reshape(rows)
    return g + g @ gram.mT, step_size * (m - weight @ (m + m.mT))


def gram_reference(weight: Tensor, step_size: float) -> Tensor:
    """``G = eta (W - W^T W)``: the whole linear part of an ISTA step but the identity."""
    return step_size * (weight - weight.mT @ weight)
