"""The "reference" backend of tied_embedding: torch's own kernels, on any device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..library import wide_dtype


def forward(
    idx: Tensor,
    weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x (B, T, D) in ``dtype`` = rows of ``weight`` and of ``position_weight`` by idx and positions
    (B, T), or by the token's place, added in float32 or better."""
    wide = wide_dtype(weight.dtype)
    p = position_weight if positions is None else F.embedding(positions, position_weight)
    return (F.embedding(idx, weight).to(wide) + p.to(wide)).to(dtype)


def add_rows(
    dx: Tensor, idx: Tensor, given: Tensor | None, rows: int, skipped: int, dtype: torch.dtype
) -> Tensor:
    """(rows, D) in ``dtype``: ``given``, if there is one, and to row i each row t of dx (n, D) with
    idx_t = i, but to row ``skipped``; summed in float32 or better, in an order of its own."""
    wide = dx.to(wide_dtype(dx.dtype))
    total = torch.ops.aten.embedding_dense_backward(wide, idx.long(), rows, skipped, False)
    return (total if given is None else total + given).to(dtype)
