"""Tied embedding in plain PyTorch, forward and backward: what is checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tied_embedding_reference(
    idx: Tensor,
    weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None = None,
    *,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``x_t = E[i_t] + P[p_t]`` and E; differentiable by autograd.

    Shapes as in :func:`crate_kernels.tied_embedding`, float64 included; both in E's dtype.
    """
    p = position_weight if positions is None else F.embedding(positions, position_weight)
    return F.embedding(idx, weight, padding_idx) + p, weight


def tied_embedding_reference_backward(
    dx: Tensor,
    dhead: Tensor | None,
    idx: Tensor,
    words: int,
    places: int,
    positions: Tensor | None = None,
    *,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients ``(dE, dP)`` of :func:`tied_embedding_reference`, (words, D) and (places, D).

    ``dE_v = dhead_v + sum of dx_t where i_t = v``, without that sum for v = padding_idx, and
    ``dP_p = sum of dx_t where p_t = p``. ``dhead`` is the gradient of the second result, None for
    zeros.
    """
    if positions is None:
        positions = torch.arange(places, device=idx.device).expand(idx.shape)
    rows = dx.reshape(-1, dx.shape[-1])
    is_word = (idx.reshape(-1, 1) == torch.arange(words, device=idx.device)).to(dx.dtype)
    if padding_idx is not None:
        is_word[:, padding_idx] = 0
    is_place = (positions.reshape(-1, 1) == torch.arange(places, device=idx.device)).to(dx.dtype)
    dweight = is_word.mT @ rows
    return dweight if dhead is None else dweight + dhead, is_place.mT @ rows
