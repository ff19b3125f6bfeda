"""A CRATE layer in plain PyTorch, forward and backward: what the fused layer is checked against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ista.reference import ista_reference, ista_reference_backward
from ..mssa.reference import mssa_reference, mssa_reference_backward


def crate_block_reference(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None,
    b_out: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    eps: float = 1e-5,
    step_size: float = 0.1,
    lambd: float = 0.1,
) -> Tensor:
    """``z = x + MSSA(LN(x)); y = ISTA(LN(z))``, differentiable by autograd.

    Shapes and dtypes as in :func:`crate_kernels.crate_block`, float64 included.
    """
    h = F.layer_norm(x, x.shape[-1:], norm1_weight, norm1_bias, eps)
    z = x + mssa_reference(h, w_qkv, w_out, b_out, heads=heads, scale=scale, causal=causal)
    u = F.layer_norm(z, z.shape[-1:], norm2_weight, norm2_bias, eps)
    return ista_reference(u, weight, step_size=step_size, lambd=lambd)


def crate_block_reference_backward(
    dy: Tensor,
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None,
    b_out: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    eps: float = 1e-5,
    step_size: float = 0.1,
    lambd: float = 0.1,
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`crate_block_reference`, of x and then of the parameters in its order."""
    mssa_options: Any = {"heads": heads, "scale": scale, "causal": causal}
    h = F.layer_norm(x, x.shape[-1:], norm1_weight, norm1_bias, eps)
    z = x + mssa_reference(h, w_qkv, w_out, b_out, **mssa_options)
    u = F.layer_norm(z, z.shape[-1:], norm2_weight, norm2_bias, eps)
    du, dweight = ista_reference_backward(dy, u, weight, step_size=step_size, lambd=lambd)
    dz, dnorm2_weight, dnorm2_bias = layer_norm_backward(du, z, norm2_weight, eps)
    dh, *d_mssa = mssa_reference_backward(dz, h, w_qkv, w_out, b_out, **mssa_options)
    dx, dnorm1_weight, dnorm1_bias = layer_norm_backward(dh, x, norm1_weight, eps)
    norms = ((dnorm1_weight, dnorm1_bias), (dnorm2_weight, dnorm2_bias))
    return dx + dz, *norms[0], *d_mssa, *norms[1], dweight


def layer_norm_backward(
    dh: Tensor, z: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(dz, dgamma, dbeta)`` of ``h = gamma zhat + beta``, ``zhat = (z - mean) rstd``.

    ``dz = rstd (t - mean(t) - zhat mean(t zhat))`` with ``t = gamma dh``, the means over a row;
    ``dgamma = sum dh zhat`` and ``dbeta = sum dh`` over all rows.
    """
    rstd = torch.rsqrt(z.var(-1, correction=0, keepdim=True) + eps)
    zhat = (z - z.mean(-1, keepdim=True)) * rstd
    t = gamma * dh
    dz = rstd * (t - t.mean(-1, keepdim=True) - zhat * (t * zhat).mean(-1, keepdim=True))
    d = z.shape[-1]
    return dz, (dh * zhat).reshape(-1, d).sum(0), dh.reshape(-1, d).sum(0)
