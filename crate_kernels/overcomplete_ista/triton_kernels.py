"""Overcomplete ISTA in Triton: ISTA's GEMM, whose epilogue thresholds, subtracts and masks.

    forward   z1 = relu(eta x D - t)                    act(alpha A B - t)
              r  = x - z1 D^T                           beta C + alpha A B
              z2 = relu(z1 + eta r D - t)               act(beta C + alpha A B - t)
    backward  e2 = eta (dout D1) * 1[z2 > 0]            alpha A B, masked by z2
              e1 = (e2 - eta dr D) * 1[z1 > 0]          beta C + alpha A B, masked by z1
              dx = dr + e1 D^T                          beta C + alpha A B

The products with nothing around them (z2 D1^T, e2 D^T and the dictionaries' gradients) are the
library's: op.py. The contracts are those of torch_kernels.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ista.triton_kernels import _gemm


def encode(
    x: Tensor, dictionary: Tensor, step_size: float, threshold: float, bits: Tensor | None = None
) -> Tensor:
    z1 = x.new_empty(x.shape[0], dictionary.shape[1])
    _gemm(None, x, dictionary, z1, alpha=step_size, threshold=threshold, act="relu")
    return z1


def residual(x: Tensor, z1: Tensor, dictionary: Tensor) -> Tensor:
    r = torch.empty_like(x, dtype=z1.dtype)
    _gemm(x, z1, dictionary.mT, r, alpha=-1.0)
    return r


def refine(
    z1: Tensor,
    r: Tensor,
    dictionary: Tensor,
    step_size: float,
    threshold: float,
    bits: Tensor | None = None,
) -> Tensor:
    z2 = torch.empty_like(z1)
    _gemm(z1, r, dictionary, z2, alpha=step_size, threshold=threshold, act="relu")
    return z2


def refine_backward(
    dout: Tensor, decoder: Tensor, z2: Tensor, step_size: float, bits: Tensor | None = None
) -> Tensor:
    e2 = torch.empty_like(z2)
    _gemm(None, dout, decoder, e2, alpha=step_size, mask="result", y=z2)
    return e2


def encode_backward(
    e2: Tensor,
    dr: Tensor,
    dictionary: Tensor,
    z1: Tensor,
    step_size: float,
    bits: Tensor | None = None,
) -> Tensor:
    e1 = torch.empty_like(e2)
    _gemm(e2, dr, dictionary, e1, alpha=-step_size, mask="result", y=z1)
    return e1


def input_gradient(dr: Tensor, e1: Tensor, dictionary: Tensor, dtype: torch.dtype) -> Tensor:
    dx = torch.empty_like(dr, dtype=dtype)
    _gemm(dr, e1, dictionary.mT, dx)
    return dx
