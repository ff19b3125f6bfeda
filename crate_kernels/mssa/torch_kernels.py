"""The "reference" backend of tied attention: torch's own kernels, on any device and dtype.

On the CPU these are the fused kernels behind ``scaled_dot_product_attention``; elsewhere the
formulas of reference.py, a few heads at a time so that memory stays bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import kept
from .masks import FULL, Mask, beyond, by_sequence, check_values, hidden
from .reference import (
    merge_heads,
    split_heads,
    subspace_attention,
    subspace_attention_backward,
)

# The largest score tensor one step may hold, in elements (256 MB in float32).
MAX_SCORES = 1 << 26


def forward(
    w: Tensor, heads: int, scale: float, causal: bool, mask: Mask = FULL
) -> tuple[Tensor, Tensor]:
    """w (B, N, heads*head_dim) -> o like w, and the log-sum-exp (B, heads, N).

    Packed: w (T, heads*head_dim) -> o like w, and (heads, T).
    """

    def rows_first(w: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        o, lse = _forward(w, heads, scale, causal, mask, lengths)
        return o, lse.mT

    check_values(w, mask)
    o, lse = by_sequence(rows_first, [w], mask.sequences, mask.longest)
    if mask.sequences is not None and w.dim() == 3:
        lse = lse.masked_fill(beyond(mask.sequences, w.shape[1]), float("inf"))
    return o.contiguous(), lse.mT.contiguous()


def backward(
    do: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    heads: int,
    scale: float,
    causal: bool,
    mask: Mask = FULL,
) -> Tensor:
    """dw, shaped as w, from do, shaped as o."""

    def rows_first(
        do: Tensor, w: Tensor, o: Tensor, lse: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor]:
        return (_backward(do, w, o, lse.mT, heads, scale, causal, mask, lengths),)

    tensors = [do, w, o, lse.mT]
    return by_sequence(rows_first, tensors, mask.sequences, mask.longest)[0].contiguous()


def _forward(
    w: Tensor, heads: int, scale: float, causal: bool, mask: Mask, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, n, _ = w.shape
    wh = split_heads(w.contiguous(), heads)
    on_cpu = w.device.type == "cpu" and mask.seed is None  # by the kernels behind SDPA
    if on_cpu and batch > 0 and mask.window is None and lengths is None:
        o, lse = _cpu_forward(wh, causal, scale)
        return merge_heads(o), lse.to(lse_dtype(w))
    o = torch.empty_like(wh, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, n, dtype=lse_dtype(w), device=w.device)
    for rows in _steps(batch, heads, n, mask):
        part = wh[rows]
        unseen = hidden(n, causal, mask.window, _of(rows, lengths), w.device)
        if on_cpu:
            o[rows], lse[rows] = _cpu_forward(part, False, scale, _additive(unseen, w))
        else:
            p, lse[rows] = subspace_attention(part.to(lse.dtype), scale, unseen)
            p = p * _keep(rows, batch, heads, n, mask, lse)
            o[rows] = (p @ part.to(lse.dtype)).to(w.dtype)
    return merge_heads(o), lse


def _backward(
    do: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    heads: int,
    scale: float,
    causal: bool,
    mask: Mask,
    lengths: Tensor | None,
) -> Tensor:
    batch, n, _ = w.shape
    wh, doh, oh = (split_heads(t, heads) for t in (w.contiguous(), do.contiguous(), o))
    on_cpu = w.device.type == "cpu" and mask.seed is None  # by the kernels behind SDPA
    if on_cpu and batch > 0 and mask.window is None and lengths is None:
        return merge_heads(_cpu_backward(doh, wh, oh, lse, causal, scale))
    dwh = torch.empty_like(wh, memory_format=torch.contiguous_format)
    for rows in _steps(batch, heads, n, mask):
        unseen = hidden(n, causal, mask.window, _of(rows, lengths), w.device)
        if on_cpu:
            saved = (doh[rows], wh[rows], oh[rows], lse[rows])
            dwh[rows] = _cpu_backward(*saved, False, scale, _additive(unseen, w))
        else:
            doh_, wh_ = doh[rows].to(lse.dtype), wh[rows].to(lse.dtype)
            keep = _keep(rows, batch, heads, n, mask, lse)
            dwh[rows] = subspace_attention_backward(doh_, wh_, scale, unseen, keep).to(w.dtype)
    return merge_heads(dwh)


def _cpu_forward(
    wh: Tensor, causal: bool, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        wh, wh, wh, 0.0, causal, attn_mask=bias, scale=scale
    )


def _cpu_backward(
    doh: Tensor,
    wh: Tensor,
    oh: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        doh, wh, wh, wh, oh, lse, 0.0, causal, attn_mask=bias, scale=scale
    )
    return dq.add_(dk).add_(dv)


def _keep(
    rows: tuple[slice, slice], batch: int, heads: int, n: int, mask: Mask, like: Tensor
) -> Tensor | float:
    """What dropout multiplies P by in these heads, in the dtype of ``like``."""
    if mask.seed is None:
        return 1.0
    numbers = torch.arange(batch * heads, device=like.device).view(batch, heads)[rows]
    return kept(n, numbers, mask.dropout, mask.seed).to(like.dtype) / (1 - mask.dropout)


def _of(rows: tuple[slice, slice], lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths[rows[0]]


def _additive(unseen: Tensor | None, w: Tensor) -> Tensor | None:
    """What SDPA's kernels add to the scores: -inf where unseen."""
    if unseen is None:
        return None
    return torch.zeros(unseen.shape, dtype=w.dtype).masked_fill_(unseen, float("-inf"))


def _steps(batch: int, heads: int, n: int, mask: Mask = FULL) -> list[tuple[slice, slice]]:
    """Slices over (batch, heads) that keep each step's scores under MAX_SCORES.

    Under an eighth of it with dropout, whose random bits are several tensors of 64 bits.
    """
    scores = MAX_SCORES if mask.seed is None else MAX_SCORES // 8
    per_step = max(1, scores // max(1, n * n))
    if per_step >= heads:
        images = per_step // heads
        return [(slice(b, b + images), slice(None)) for b in range(0, batch, images)]
    return [
        (slice(b, b + 1), slice(h, h + per_step))
        for b in range(batch)
        for h in range(0, heads, per_step)
    ]


def lse_dtype(w: Tensor) -> torch.dtype:
    """float32, or float64 for float64: the dtype statistics and sums are kept in."""
    return torch.promote_types(w.dtype, torch.float32)
