"""Overcomplete ISTA in plain PyTorch, forward and backward: what kernels are checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def overcomplete_ista_reference(
    x: Tensor,
    dictionary: Tensor,
    decoder: Tensor | None = None,
    *,
    step_size: float = 0.1,
    lambd: float = 0.1,
) -> Tensor:
    """``z2 D1^T``, ``z1 = relu(eta x D - eta lambda)``,
    ``z2 = relu(z1 + eta (x - z1 D^T) D - eta lambda)``; differentiable by autograd.

    Shapes and dtypes as in :func:`crate_kernels.overcomplete_ista`, float64 included.
    """
    _, _, z2 = _codes(x, dictionary, step_size, lambd)
    return z2 @ (dictionary if decoder is None else decoder).mT


def overcomplete_ista_reference_backward(
    dout: Tensor,
    x: Tensor,
    dictionary: Tensor,
    decoder: Tensor | None = None,
    *,
    step_size: float = 0.1,
    lambd: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients ``(dx, ddictionary, ddecoder)`` of :func:`overcomplete_ista_reference`.

    ``e2 = eta (dout D1) * 1[z2 > 0]``, ``dr = e2 D^T``, ``e1 = (e2 - eta dr D) * 1[z1 > 0]``,
    ``dx = dr + e1 D^T``, ``dD = x^T e1 + r^T e2 - dr^T z1``, ``dD1 = dout^T z2``, the last three
    over all tokens. Without a decoder dD has both, and ddecoder is None.
    """
    shape, d = x.shape, dictionary.shape[0]
    x, dout = x.reshape(-1, d), dout.reshape(-1, d)
    d1 = dictionary if decoder is None else decoder
    z1, r, z2 = _codes(x, dictionary, step_size, lambd)
    e2 = torch.where(z2 <= 0, 0, step_size * (dout @ d1))
    dr = e2 @ dictionary.mT
    e1 = torch.where(z1 <= 0, 0, e2 - step_size * (dr @ dictionary))
    ddictionary = x.mT @ e1 + r.mT @ e2 - dr.mT @ z1
    ddecoder = dout.mT @ z2
    dx = (dr + e1 @ dictionary.mT).view(shape)
    if decoder is None:
        return dx, ddictionary + ddecoder, None
    return dx, ddictionary, ddecoder


def _codes(
    x: Tensor, dictionary: Tensor, step_size: float, lambd: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z1 (..., M), the residual r = x - z1 D^T (..., D), and z2 (..., M)."""
    z1 = F.relu(step_size * (x @ dictionary) - step_size * lambd)
    r = x - z1 @ dictionary.mT
    return z1, r, F.relu(z1 + step_size * (r @ dictionary) - step_size * lambd)
