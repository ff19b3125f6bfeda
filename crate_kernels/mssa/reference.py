"""MSSA in plain PyTorch, forward and backward: what every kernel of this op is checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def split_heads(w: Tensor, heads: int) -> Tensor:
    """(B, N, heads*head_dim) -> (B, heads, N, head_dim), a view."""
    return w.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(w: Tensor) -> Tensor:
    """(B, heads, N, head_dim) -> (B, N, heads*head_dim)."""
    return w.transpose(1, 2).flatten(2)


def subspace_attention(wh: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """P = softmax(scale w w^T) and its log-sum-exp, for wh (..., N, head_dim)."""
    s = scale * wh @ wh.mT
    if causal:
        future = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(future, float("-inf"))
    lse = torch.logsumexp(s, dim=-1)
    return torch.exp(s - lse[..., None]), lse


def tied_attention_reference(
    w: Tensor, *, heads: int, scale: float | None = None, causal: bool = False
) -> Tensor:
    """``o_h = softmax(scale w_h w_h^T) w_h`` for each head h, differentiable by autograd.

    Shapes and dtypes as in :func:`crate_kernels.tied_attention`, float64 included.
    """
    wh = split_heads(w, heads)
    p, _ = subspace_attention(wh, default_scale(wh, scale), causal)
    return merge_heads(p @ wh)


def tied_attention_reference_backward(
    do: Tensor, w: Tensor, *, heads: int, scale: float | None = None, causal: bool = False
) -> Tensor:
    """Gradient of :func:`tied_attention_reference`: ``do`` and the result are shaped as ``w``.

    ``dP = dO w^T``, ``dS = P * (dP - rowsum(P * dP))``,
    ``dw = P^T dO + scale (dS + dS^T) w``: w is query, key and value at once.
    """
    wh, doh = split_heads(w, heads), split_heads(do, heads)
    scale = default_scale(wh, scale)
    p, _ = subspace_attention(wh, scale, causal)
    dp = doh @ wh.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return merge_heads(p.mT @ doh + scale * (ds + ds.mT) @ wh)


def mssa_reference(
    x: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """``y = tied_attention(x w_qkv^T) w_out^T + b_out``; see :func:`crate_kernels.mssa`."""
    o = tied_attention_reference(F.linear(x, w_qkv), heads=heads, scale=scale, causal=causal)
    return o if w_out is None else F.linear(o, w_out, b_out)


def mssa_reference_backward(
    dy: Tensor,
    x: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients ``(dx, dw_qkv, dw_out, db_out)`` of :func:`mssa_reference`; None where no input.

    ``dO = dy w_out``, ``dw_out = dy^T o``, ``db_out = sum dy``; ``dw`` by
    :func:`tied_attention_reference_backward`; ``dx = dw w_qkv``, ``dw_qkv = dw^T x``.
    """
    w = F.linear(x, w_qkv)
    do, dw_out, db_out = dy, None, None
    if w_out is not None:
        o = tied_attention_reference(w, heads=heads, scale=scale, causal=causal)
        do = dy @ w_out
        dw_out = dy.flatten(0, 1).mT @ o.flatten(0, 1)
        db_out = None if b_out is None else dy.sum((0, 1))
    dw = tied_attention_reference_backward(do, w, heads=heads, scale=scale, causal=causal)
    return dw @ w_qkv, dw.flatten(0, 1).mT @ x.flatten(0, 1), dw_out, db_out


def default_scale(wh: Tensor, scale: float | None) -> float:
    """head_dim**-0.5 unless given, the published choice."""
    return wh.shape[-1] ** -0.5 if scale is None else scale
