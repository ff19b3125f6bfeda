"""Sequences of several lengths: which ones are measured, and what one has for them without ours.

padded   (batch, tokens, width), item b of a random length from 1 to tokens
    eager, sdpa    the published form, or SDPA, with a boolean mask
packed   (T, width), the crops of ``batch`` images as DINO makes them: 2 of ``tokens``, then 8 of
         CROP_TOKENS for each image
    eager, sdpa-looped    one call for each size of crop
    sdpa                  laid out as padded, with a boolean mask
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .workloads import Workload

CROP_TOKENS = 37
LARGE, SMALL = 2, 8  # crops of an image


@functools.cache
def lengths_of(w: Workload) -> tuple[int, ...]:
    if w.sequences == "packed":
        return (w.tokens,) * LARGE * w.batch + (CROP_TOKENS,) * SMALL * w.batch
    draw = random.Random(0)
    return tuple(draw.randint(1, w.tokens) for _ in range(w.batch))


def sequences_of(w: Workload, device: torch.device) -> Tensor:
    """What tells an op the lengths: themselves, or their sums."""
    lengths = lengths_of(w)
    if w.sequences == "packed":
        lengths = (0, *itertools.accumulate(lengths))
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def past_the_lengths(w: Workload, sequences: Tensor) -> Tensor | None:
    """(B, N, 1): True at the rows of padding; None where there is none."""
    if w.sequences == "packed":
        return None
    return (torch.arange(w.tokens, device=sequences.device) >= sequences[:, None])[..., None]


def ours(w: Workload, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    from ..mssa.op import tied_attention

    options = functools.partial(tied_attention, heads=w.heads, causal=w.causal, backend=backend)
    if w.sequences == "packed":
        longest = max(lengths_of(w))
        return lambda t, ends: options(t, cu_seqlens=ends, max_seqlen=longest)
    return lambda t, lengths: options(t, lengths=lengths)


def masked(attend: Callable[..., Tensor], w: Workload) -> Callable[[Tensor, Tensor], Tensor]:
    """By ``attend(w (B, N, width), seen)`` with a boolean mask, on padded tokens."""
    if w.sequences == "packed":
        padded, longest = masked(attend, replace(w, sequences="padded")), max(lengths_of(w))

        def laid_out(t: Tensor, ends: Tensor) -> Tensor:
            lengths = ends.diff()
            rows = ends[:-1, None] + torch.arange(longest, device=t.device)
            o = padded(t[rows.clamp(max=t.shape[0] - 1)], lengths)
            at = torch.arange(t.shape[0], device=t.device)
            item = torch.searchsorted(ends, at.to(ends.dtype), right=True) - 1
            return o[item, at - ends[item]]

        return laid_out

    def attention(t: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(t.shape[1], device=t.device)
        seen = (place < lengths[:, None])[:, None, None]
        if w.causal:
            seen = seen & (place <= place[:, None])
        return attend(t, seen)

    return attention


def looped(attend: Callable[..., Tensor], w: Workload) -> Callable[[Tensor, Tensor], Tensor]:
    """By ``attend(w (B, N, width))`` of all packed sequences of one length at a time."""
    large = LARGE * w.batch * w.tokens

    def attention(t: Tensor, ends: Tensor) -> Tensor:
        crops = t[:large].unflatten(0, (-1, w.tokens)), t[large:].unflatten(0, (-1, CROP_TOKENS))
        return torch.cat([attend(each).flatten(0, 1) for each in crops])

    return attention


def published_masked(t: Tensor, heads: int, seen: Tensor) -> Tensor:
    wh = t.unflatten(-1, (heads, -1)).transpose(1, 2)
    dots = torch.matmul(wh, wh.transpose(-1, -2)) * wh.shape[-1] ** -0.5
    p = dots.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.matmul(p, wh).transpose(1, 2).flatten(2)


def sdpa_masked(t: Tensor, heads: int, seen: Tensor) -> Tensor:
    wh = t.unflatten(-1, (heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(wh, wh, wh, attn_mask=seen).transpose(1, 2).flatten(2)


def parts(w: Workload, sequences: Tensor, at_once: int) -> Iterator[tuple[slice, dict]]:
    """Rows or items of a few sequences at a time, and the options of tied_attention for them."""
    count = len(lengths_of(w))
    for first in range(0, count, at_once):
        last = min(count, first + at_once)
        if w.sequences == "packed":
            ends = sequences[first : last + 1]
            longest = max(lengths_of(w)[first:last])
            options = {"cu_seqlens": ends - ends[0], "max_seqlen": longest}
            yield slice(int(ends[0]), int(ends[-1])), options
        else:
            yield slice(first, last), {"lengths": sequences[first:last]}
