"""The "reference" backend of overcomplete ISTA: torch's own GEMMs, on any device and dtype.

All tensors are rows, (rows, D) or (rows, M); D (D, M) and D1 (D, M) are in the dtype of the GEMMs.
``bits``, one for each element of a code and 1 where that is above 0, are what the CUDA kernels make
and read; others read the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode(
    x: Tensor, dictionary: Tensor, step_size: float, threshold: float, bits: Tensor | None = None
) -> Tensor:
    """relu(eta x D - threshold)"""
    z1 = x.new_full((x.shape[0], dictionary.shape[1]), -threshold)
    return z1.addmm_(x, dictionary, alpha=step_size).relu_()


def residual(x: Tensor, z1: Tensor, dictionary: Tensor) -> Tensor:
    """x - z1 D^T in the dtype of z1; x may be in its own."""
    if x.dtype == z1.dtype:
        return torch.addmm(x, z1, dictionary.mT, alpha=-1.0)
    return torch.sub(x, z1 @ dictionary.mT).to(z1.dtype)


def refine(
    z1: Tensor,
    r: Tensor,
    dictionary: Tensor,
    step_size: float,
    threshold: float,
    bits: Tensor | None = None,
) -> Tensor:
    """relu(z1 + eta r D - threshold)"""
    return torch.sub(z1, threshold).addmm_(r, dictionary, alpha=step_size).relu_()


def refine_backward(
    dout: Tensor, decoder: Tensor, z2: Tensor, step_size: float, bits: Tensor | None = None
) -> Tensor:
    """eta (dout D1) * 1[z2 > 0]"""
    e2 = (dout @ decoder).mul_(step_size)
    return torch.ops.aten.threshold_backward(e2, z2, 0)


def encode_backward(
    e2: Tensor,
    dr: Tensor,
    dictionary: Tensor,
    z1: Tensor,
    step_size: float,
    bits: Tensor | None = None,
) -> Tensor:
    """(e2 - eta dr D) * 1[z1 > 0]"""
    e1 = torch.addmm(e2, dr, dictionary, alpha=-step_size)
    return torch.ops.aten.threshold_backward(e1, z1, 0)


def input_gradient(dr: Tensor, e1: Tensor, dictionary: Tensor, dtype: torch.dtype) -> Tensor:
    """dr + e1 D^T in ``dtype``."""
    if dtype == dr.dtype:
        return torch.addmm(dr, e1, dictionary.mT)
    return torch.add(dr.to(dtype), e1 @ dictionary.mT)
