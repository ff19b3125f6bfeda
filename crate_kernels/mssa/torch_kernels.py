"""The "reference" backend of tied attention: torch's own kernels, on any device and dtype.

On the CPU these are the fused kernels behind ``scaled_dot_product_attention``; elsewhere the
formulas of reference.py, a few heads at a time so that memory stays bounded.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

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
    check_values(w, mask)
    if _by_fused_kernels(w, mask):
        if mask.sequences is None:
            return _fused_forward(w, heads, scale, causal, mask.window)
        o = torch.zeros_like(w, memory_format=torch.contiguous_format)
        lse = w.new_full((*w.shape[:-1], heads), float("inf"), dtype=lse_dtype(w))
        for same in _same_lengths(w, mask.sequences):
            some_o, some_lse = _fused_forward(same(w), heads, scale, causal, mask.window)
            same(o).copy_(some_o)
            same(lse).copy_(some_lse.mT)
        return o, lse.mT.contiguous()

    def rows_first(w: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        o, lse = _forward(w, heads, scale, causal, mask, lengths)
        return o, lse.mT

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
    if _by_fused_kernels(w, mask):
        if mask.sequences is None:
            return _fused_backward(do, w, o, lse, heads, scale, causal, mask.window)
        dw = torch.zeros_like(w, memory_format=torch.contiguous_format)
        for same in _same_lengths(w, mask.sequences):
            saved = (same(do), same(w), same(o), same(lse.mT).mT)
            same(dw).copy_(_fused_backward(*saved, heads, scale, causal, mask.window))
        return dw

    def rows_first(do: Tensor, w: Tensor, lengths: Tensor | None) -> tuple[Tensor]:
        return (_backward(do, w, lse.dtype, heads, scale, causal, mask, lengths),)

    return by_sequence(rows_first, [do, w], mask.sequences, mask.longest)[0].contiguous()


# ---- on the CPU: the kernels behind SDPA, which have no dropout


def _by_fused_kernels(w: Tensor, mask: Mask) -> bool:
    return w.device.type == "cpu" and mask.seed is None and w.numel() > 0


def _fused_forward(
    w: Tensor, heads: int, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    wh = split_heads(w.contiguous(), heads)
    far = _far_apart(w, causal, window)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        wh, wh, wh, 0.0, causal and far is None, attn_mask=far, scale=scale
    )
    return merge_heads(o).contiguous(), lse.to(lse_dtype(w)).contiguous()


def _fused_backward(
    do: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    heads: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    wh, doh, oh = (split_heads(t.contiguous(), heads) for t in (w, do, o))
    far = _far_apart(w, causal, window)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        doh,
        wh,
        wh,
        wh,
        oh,
        lse.contiguous(),
        0.0,
        causal and far is None,
        attn_mask=far,
        scale=scale,
    )
    return merge_heads(dq.add_(dk).add_(dv)).contiguous()


def _far_apart(w: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """With a window what is added to the scores: -inf where unseen."""
    n = w.shape[1]
    unseen = None if window is None else hidden(n, causal, window, None, w.device)
    if unseen is None:
        return None
    return torch.zeros(n, n, dtype=w.dtype).masked_fill_(unseen, float("-inf"))


def _same_lengths(w: Tensor, sequences: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """For each run of sequences of one length its view (count, length, width) of tensors as w."""
    lengths = (sequences if w.dim() == 3 else sequences.diff()).tolist()
    first = 0
    for n, run in itertools.groupby(lengths):
        count = len(list(run))
        if w.dim() == 3:
            rows = slice(first, first + count)
            view = functools.partial(lambda t, rows, n: t[rows, :n], rows=rows, n=n)
            first += count
        else:
            rows = slice(first, first + count * n)
            view = functools.partial(
                lambda t, rows, n: t[rows].unflatten(0, (-1, n)), rows=rows, n=n
            )
            first += count * n
        if n > 0:
            yield view


# ---- elsewhere: the formulas of reference.py


def _forward(
    w: Tensor, heads: int, scale: float, causal: bool, mask: Mask, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, n, _ = w.shape
    wh = split_heads(w.contiguous(), heads)
    o = torch.empty_like(wh, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, n, dtype=lse_dtype(w), device=w.device)
    for rows in _steps(batch, heads, n, mask):
        part = wh[rows].to(lse.dtype)
        unseen = hidden(n, causal, mask.window, _of(rows, lengths), w.device)
        p, lse[rows] = subspace_attention(part, scale, unseen)
        o[rows] = ((p * _keep(rows, batch, heads, n, mask, part)) @ part).to(w.dtype)
    return merge_heads(o), lse


def _backward(
    do: Tensor,
    w: Tensor,
    dtype: torch.dtype,
    heads: int,
    scale: float,
    causal: bool,
    mask: Mask,
    lengths: Tensor | None,
) -> Tensor:
    batch, n, _ = w.shape
    wh, doh = (split_heads(t.contiguous(), heads) for t in (w, do))
    dwh = torch.empty_like(wh, memory_format=torch.contiguous_format)
    for rows in _steps(batch, heads, n, mask):
        unseen = hidden(n, causal, mask.window, _of(rows, lengths), w.device)
        doh_, wh_ = doh[rows].to(dtype), wh[rows].to(dtype)
        keep = _keep(rows, batch, heads, n, mask, wh_)
        dwh[rows] = subspace_attention_backward(doh_, wh_, scale, unseen, keep).to(w.dtype)
    return merge_heads(dwh)


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
