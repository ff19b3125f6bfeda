"""Rotation and norm in plain PyTorch, forward and backward: what kernels are checked against."""

from __future__ import annotations

import torch
from torch import Tensor


def tied_rotary_reference(
    w: Tensor, cos: Tensor, sin: Tensor, *, heads: int, norm_eps: float | None = None
) -> Tensor:
    """``y = r / sqrt(mean(r^2) + norm_eps)``, r the rotated w, for each head and row.

    Arguments and result as in :func:`crate_kernels.tied_rotary`, differentiable by autograd.
    """
    r = rotate(w.unflatten(-1, (heads, -1)), cos, sin)
    y = r if norm_eps is None else r * rstd_of(r, norm_eps)
    return y.flatten(-2)


def tied_rotary_reference_backward(
    dy: Tensor, w: Tensor, cos: Tensor, sin: Tensor, *, heads: int, norm_eps: float | None = None
) -> Tensor:
    """Gradient of :func:`tied_rotary_reference`: ``dy`` and the result are shaped as ``w``.

    ``dr = rstd (dy - y mean(dy * y))``, rotated back: by -sin.
    """
    dr = dy.unflatten(-1, (heads, -1))
    if norm_eps is not None:
        r = rotate(w.unflatten(-1, (heads, -1)), cos, sin)
        rstd = rstd_of(r, norm_eps)
        dr = norm_backward(dr, r * rstd, rstd)
    return rotate(dr, cos, -sin).flatten(-2)


def rotate(w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """w (..., N, heads, head_dim): columns c and c + head_dim/2 are a pair, turned by its angle."""
    cos, sin = cos[:, None].to(w.dtype), sin[:, None].to(w.dtype)
    a, b = w.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def rstd_of(r: Tensor, norm_eps: float) -> Tensor:
    return torch.rsqrt(r.square().mean(-1, keepdim=True) + norm_eps)


def norm_backward(dy: Tensor, y: Tensor, rstd: Tensor) -> Tensor:
    return rstd * (dy - y * (dy * y).mean(-1, keepdim=True))
