"""ISTA in plain PyTorch, forward and backward: what every kernel of this op is checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ista_reference(
    x: Tensor,
    weight: Tensor,
    *,
    step_size: float | Tensor = 0.1,
    lambd: float | Tensor = 0.1,
    signed: bool = False,
) -> Tensor:
    """``y = relu(v - eta lambda)``, ``v = x + eta (x W - x W^T W)``, differentiable by autograd.

    Where ``signed``, ``y = sign(v) relu(|v| - eta lambda)``. Shapes and dtypes as in
    :func:`crate_kernels.ista`, float64 included.
    """
    residual = x - F.linear(x, weight)
    v = x + step_size * (residual @ weight)
    if signed:
        return v.sign() * F.relu(v.abs() - step_size * lambd)
    return F.relu(v - step_size * lambd)


def ista_reference_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    step_size: float | Tensor = 0.1,
    lambd: float | Tensor = 0.1,
    signed: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients ``(dx, dweight)`` of :func:`ista_reference`, and of step_size and lambd if tensors.

    ``g = dy * 1[y != 0]``, ``A = W - W^T W``, ``G = A diag(eta)``, ``dx = g + g G^T``,
    ``M = x^T g`` over all tokens, ``N = M diag(eta)``, ``dW = N - W (N + N^T)``,
    ``s = sum g sign(y)``, ``d eta_c = sum_j A_jc M_jc - lambda_c s_c``, ``d lambda = -eta s``.
    """
    y = ista_reference(x, weight, step_size=step_size, lambd=lambd, signed=signed)
    g = torch.where(y == 0, 0, dy)
    a = gram_reference(weight, 1.0)
    rows = (-1, x.shape[-1])
    m = x.reshape(rows).mT @ g.reshape(rows)
    n = m * step_size
    s = (g * y.sign()).reshape(rows).sum(0)
    gradients = [g + (g * step_size) @ a.mT, n - weight @ (n + n.mT)]
    if isinstance(step_size, Tensor):
        gradients.append(((a * m).sum(0) - lambd * s).sum_to_size(step_size.shape))
    if isinstance(lambd, Tensor):
        gradients.append((-step_size * s).sum_to_size(lambd.shape))
    return tuple(gradients)


def gram_reference(weight: Tensor, step_size: float) -> Tensor:
    """``G = eta (W - W^T W)``: the whole linear part of an ISTA step but the identity."""
    return step_size * (weight - weight.mT @ weight)
