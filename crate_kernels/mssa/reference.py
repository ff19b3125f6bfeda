"""MSSA in plain PyTorch, forward and backward: what every kernel of this op is checked against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import kept, seed_tensor
from .masks import beyond, by_sequence, hidden


def split_heads(w: Tensor, heads: int) -> Tensor:
    """(B, N, heads*head_dim) -> (B, heads, N, head_dim), a view."""
    return w.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(w: Tensor) -> Tensor:
    """(B, heads, N, head_dim) -> (B, N, heads*head_dim)."""
    return w.transpose(1, 2).flatten(2)


def subspace_attention(
    wh: Tensor, scale: float, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """P = softmax(scale w w^T) and its log-sum-exp, for wh (..., N, head_dim).

    Where ``hidden``, which broadcasts to (..., N, N), row i does not see column j.
    """
    s = scale * wh @ wh.mT
    if hidden is not None:
        s = s.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(s, dim=-1)
    return torch.exp(s - lse[..., None]), lse


def subspace_attention_backward(
    doh: Tensor,
    wh: Tensor,
    scale: float,
    hidden: Tensor | None = None,
    keep: Tensor | float = 1.0,
) -> Tensor:
    """Gradient of ``(P * keep) w``, P = subspace_attention(wh, ...)[0]; all (..., N, head_dim).

    ``dP = keep * dO w^T``, ``dS = P * (dP - rowsum(P * dP))``,
    ``dw = (keep * P)^T dO + scale (dS + dS^T) w``: w is query, key and value at once.
    """
    p, _ = subspace_attention(wh, scale, hidden)
    dp = keep * (doh @ wh.mT)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return (keep * p).mT @ doh + scale * (ds + ds.mT) @ wh


def keep_factor(wh: Tensor, dropout: float, seed: int | Tensor | None) -> Tensor | float:
    """(B, heads, N, N): 1 / (1 - dropout) where it keeps P, else 0; 1 without dropout."""
    if dropout == 0:
        return 1.0
    if seed is None:
        raise ValueError("tied_attention_reference: expected a seed with dropout, got None")
    heads = torch.arange(wh.shape[0] * wh.shape[1], device=wh.device).view(wh.shape[:2])
    kept_ = kept(wh.shape[2], heads, dropout, seed_tensor(seed, wh.device))
    return kept_.to(wh.dtype) / (1 - dropout)


def tied_attention_reference(
    w: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``o_h = softmax(scale w_h w_h^T) w_h`` for each head h, differentiable by autograd.

    Shapes, dtypes and options as in :func:`crate_kernels.tied_attention`, float64 included; the
    same seed drops the same weights.
    """

    def attend(w: Tensor, lengths: Tensor | None) -> tuple[Tensor]:
        wh = split_heads(w, heads)
        unseen = hidden(w.shape[1], causal, window, lengths, w.device)
        p, _ = subspace_attention(wh, default_scale(wh, scale), unseen)
        return (merge_heads((keep_factor(wh, dropout, seed) * p) @ wh),)

    sequences = lengths if cu_seqlens is None else cu_seqlens
    return by_sequence(attend, [w], sequences, max_seqlen)[0]


def tied_attention_reference_backward(
    do: Tensor,
    w: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Gradient of :func:`tied_attention_reference`: ``do`` and the result are shaped as ``w``.

    By :func:`subspace_attention_backward`, each row seeing what it saw, the same weights dropped.
    """

    def attend_backward(do: Tensor, w: Tensor, lengths: Tensor | None) -> tuple[Tensor]:
        doh, wh = split_heads(do, heads), split_heads(w, heads)
        unseen = hidden(w.shape[1], causal, window, lengths, w.device)
        keep = keep_factor(wh, dropout, seed)
        dwh = subspace_attention_backward(doh, wh, default_scale(wh, scale), unseen, keep)
        return (merge_heads(dwh),)

    sequences = lengths if cu_seqlens is None else cu_seqlens
    return by_sequence(attend_backward, [do, w], sequences, max_seqlen)[0]


def mssa_reference(
    x: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    **masks: Any,
) -> Tensor:
    """``y = tied_attention(x w_qkv^T) w_out^T + b_out``; see :func:`crate_kernels.mssa`.

    ``masks`` are those of :func:`tied_attention_reference`; rows of y past ``lengths`` are zero.
    """
    options: Any = {"heads": heads, "scale": scale, "causal": causal, **masks}
    o = tied_attention_reference(F.linear(x, w_qkv), **options)
    y = o if w_out is None else F.linear(o, w_out, b_out)
    return _without_padding(y, masks)


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
    **masks: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients ``(dx, dw_qkv, dw_out, db_out)`` of :func:`mssa_reference`; None where no input.

    ``dO = dy w_out``, ``dw_out = dy^T o``, ``db_out = sum dy``; ``dw`` by
    :func:`tied_attention_reference_backward`; ``dx = dw w_qkv``, ``dw_qkv = dw^T x``.
    """
    options: Any = {"heads": heads, "scale": scale, "causal": causal, **masks}
    dy = _without_padding(dy, masks)
    w = F.linear(x, w_qkv)
    do, dw_out, db_out = dy, None, None
    if w_out is not None:
        o = tied_attention_reference(w, **options)
        do = dy @ w_out
        dw_out = _rows(dy).mT @ _rows(o)
        db_out = None if b_out is None else _rows(dy).sum(0)
    dw = tied_attention_reference_backward(do, w, **options)
    return dw @ w_qkv, _rows(dw).mT @ _rows(x), dw_out, db_out


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _without_padding(y: Tensor, masks: dict[str, Any]) -> Tensor:
    lengths = masks.get("lengths")
    return y if lengths is None else y.masked_fill(beyond(lengths, y.shape[1]), 0)


def default_scale(wh: Tensor, scale: float | None) -> float:
    """head_dim**-0.5 unless given, the published choice."""
    return wh.shape[-1] ** -0.5 if scale is None else scale
