"""Decoding in plain PyTorch without a host sync: what the kernels of it are checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mssa.reference import default_scale, merge_heads, split_heads


def tied_attention_decode_reference(
    w: Tensor, cache: Tensor, lengths: Tensor, *, heads: int, scale: float | None = None
) -> Tensor:
    """Write ``w`` into ``cache`` at ``lengths``; ``o_t = softmax(scale w_t c^T) c`` over c, the
    rows of ``cache`` up to token t's own.

    Shapes, dtypes and what does not fit as in :func:`crate_kernels.tied_attention_decode`.
    """
    write_tokens(w, cache, lengths)
    return attend(w, cache, lengths, heads, scale)


def write_tokens(w: Tensor, cache: Tensor, lengths: Tensor) -> None:
    """cache[b, lengths[b] + t] = w[b, t] for the tokens that fit."""
    capacity, n_new = cache.shape[1], w.shape[1]
    position, _ = _positions(w, cache, lengths)
    at = position.clamp(0, capacity - 1)
    # What does not fit writes to the nearest row what is written there anyway, or is there already.
    token = at - lengths[:, None]
    inside = (token >= 0) & (token < n_new) & (lengths[:, None] >= 0)
    item = torch.arange(len(w), device=w.device)[:, None]
    new = w[item, token.clamp(0, n_new - 1)]
    cache[item, at] = torch.where(inside[..., None], new, cache[item, at])


def attend(
    w: Tensor, cache: Tensor, lengths: Tensor, heads: int, scale: float | None = None
) -> Tensor:
    """o (B, T, heads*head_dim) of tokens w that are in the cache already; NaN for the others."""
    position, fits = _positions(w, cache, lengths)
    row = torch.arange(cache.shape[1], device=w.device)
    seen = row <= position[..., None]  # (B, T, capacity)
    in_use = seen.any(1, keepdim=True).mT  # the rest may hold anything, NaN too
    rows = split_heads(cache.masked_fill(~in_use, 0), heads)  # (B, heads, capacity, head_dim)
    wh = split_heads(w, heads)
    s = default_scale(wh, scale) * wh @ rows.mT
    p = torch.softmax(s.masked_fill(~seen[:, None], float("-inf")), dim=-1)
    return merge_heads(p @ rows).masked_fill(~fits[..., None], float("nan"))


def _positions(w: Tensor, cache: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The row of the cache that each token (B, T) belongs to, and whether there is one."""
    position = lengths[:, None] + torch.arange(w.shape[1], device=w.device)
    return position, (lengths[:, None] >= 0) & (position < cache.shape[1])
