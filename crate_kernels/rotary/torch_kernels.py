"""The "reference" backend of tied_rotary: the formulas of reference.py in float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import norm_backward, rotate, rstd_of


def forward(
    w: Tensor, cos: Tensor, sin: Tensor, heads: int, norm_eps: float | None
) -> tuple[Tensor, Tensor]:
    """w (B, N, heads*head_dim) or packed -> y like w, and rstd (..., heads), empty without norm."""
    r = rotate(w.to(wide(w)).unflatten(-1, (heads, -1)), cos, sin)
    if norm_eps is None:
        return r.flatten(-2).to(w.dtype), r.new_empty(0)
    rstd = rstd_of(r, norm_eps)
    return (r * rstd).flatten(-2).to(w.dtype), rstd.squeeze(-1)


def backward(
    dy: Tensor, y: Tensor | None, rstd: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """dw like dy; y is None without norm."""
    dr = dy.to(wide(dy)).unflatten(-1, (heads, -1))
    if y is not None:
        dr = norm_backward(dr, y.to(dr.dtype).unflatten(-1, (heads, -1)), rstd[..., None])
    return rotate(dr, cos, -sin).flatten(-2).to(dy.dtype)


def wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
