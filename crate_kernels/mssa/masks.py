"""Which token sees which, beyond causal order: the options, their checks, and plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_number, refuse


@dataclass(frozen=True)
class Mask:
    """What the backends take beside ``causal``.

    sequences: of w (B, N, ...) the lengths (B,), or None for N throughout; of packed w (T, ...)
        the cumulative lengths (S+1,), no sequence longer than ``longest``.
    window: token i sees the tokens j with abs(i - j) <= window; None sees all.
    dropout, seed: which share of the attention weights is dropped, and the int64 (1,) that says
        which ones (dropout.py); None drops none.
    """

    sequences: Tensor | None = None
    longest: int = 0
    window: int | None = None
    dropout: float = 0.0
    seed: Tensor | None = None


FULL = Mask()


def lse_shape(w: Tensor, heads: int) -> tuple[int, ...]:
    """Of a log-sum-exp for each head and row: (B, heads, N), packed (heads, T)."""
    return (w.shape[0], heads, w.shape[1]) if w.dim() == 3 else (heads, w.shape[0])


# ---- checks, of what the host knows


def check_masks(
    op: str,
    x: Tensor,
    lengths: Any,
    cu_seqlens: Any,
    max_seqlen: Any,
    window: Any,
    dropout: Any,
    seed: Any,
) -> tuple[str, ...]:
    """The names of the options in use; x is (B, N, ...) or, with cu_seqlens, (T, ...)."""
    check_number(op, "dropout", dropout)
    if dropout >= 1:
        refuse(op, "dropout < 1", dropout)
    used = ["dropout"] if dropout > 0 else []
    if seed is not None:
        _check_seed(op, seed, x)
    if lengths is not None and cu_seqlens is not None:
        refuse(op, "either lengths or cu_seqlens", "both")
    if lengths is not None:
        used.append("lengths")
        _check_integers(op, "lengths", lengths, x)
        if lengths.shape != x.shape[:1]:
            refuse(op, f"lengths of shape (B,) = {(x.shape[0],)}", tuple(lengths.shape))
    if (cu_seqlens is None) != (max_seqlen is None):
        refuse(op, "cu_seqlens and max_seqlen together", "one of them")
    if cu_seqlens is not None:
        used.append("cu_seqlens")
        _check_integers(op, "cu_seqlens", cu_seqlens, x)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            refuse(op, "cu_seqlens of shape (S+1,)", tuple(cu_seqlens.shape))
        _check_count(op, "max_seqlen", max_seqlen)
    if window is not None:
        used.append("window")
        _check_count(op, "window", window)
    return tuple(used)


def _check_seed(op: str, seed: Any, x: Tensor) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            got = f"{tuple(seed.shape)}, {seed.dtype}, {seed.device}"
            refuse(op, f"a seed tensor of one int64 on {x.device}", got)
    elif not isinstance(seed, int) or isinstance(seed, bool):
        refuse(op, "seed to be an int or a torch.Tensor", type(seed).__name__, TypeError)
    elif not -(2**63) <= seed < 2**63:
        refuse(op, "seed of 64 bits", seed)


def _check_integers(op: str, name: str, t: Any, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        refuse(op, f"{name} to be a torch.Tensor", type(t).__name__, TypeError)
    if t.dtype not in (torch.int32, torch.int64):
        refuse(op, f"{name} of dtype int32 or int64", t.dtype, TypeError)
    if t.device != x.device:
        refuse(op, f"{name} on the device of the tokens, {x.device}", t.device)


def _check_count(op: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        refuse(op, f"{name} to be an int", type(value).__name__, TypeError)
    if value < 0:
        refuse(op, f"{name} >= 0", value)


def check_values(w: Tensor, mask: Mask) -> None:
    """What the values of sequences must be, where the host can read them without waiting."""
    sequences = mask.sequences
    if sequences is None or sequences.device.type != "cpu":
        return
    if w.dim() == 3 and bool(((sequences < 0) | (sequences > w.shape[1])).any()):
        refuse("mssa", f"lengths from 0 to N = {w.shape[1]}", sequences.tolist())
    if w.dim() == 2:
        steps = sequences.diff()
        ends = int(sequences[0]) == 0 and int(sequences[-1]) == w.shape[0]
        if not ends or bool(((steps < 0) | (steps > mask.longest)).any()):
            expected = f"cu_seqlens from 0 to T = {w.shape[0]} in steps of 0 to {mask.longest}"
            refuse("mssa", expected, sequences.tolist())


# ---- in plain PyTorch, without a look at the values of sequences


def hidden(
    n: int, causal: bool, window: int | None, lengths: Tensor | None, device: torch.device
) -> Tensor | None:
    """True where row i does not see column j: (n, n), or (B, 1, n, n) of lengths; None: nowhere.

    Every row sees itself, also past the length, so that no softmax is empty.
    """
    i, j = torch.arange(n, device=device)[:, None], torch.arange(n, device=device)
    found = []
    if causal:
        found.append(j > i)
    if window is not None:
        found.append((i - j).abs() > window)
    if lengths is not None:
        found.append((j >= lengths[:, None, None, None]) & (i != j))
    return functools.reduce(torch.logical_or, found) if found else None


def beyond(lengths: Tensor, n: int) -> Tensor:
    """(B, n, 1): True at the rows past each item's length."""
    return (torch.arange(n, device=lengths.device) >= lengths[:, None])[..., None]


def by_sequence(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    sequences: Tensor | None,
    longest: int | None,
) -> tuple[Tensor, ...]:
    """``function(*tensors, lengths)``, rows past the lengths zero in what it is given and returns.

    It knows (B, N, width) alone: packed tensors (T, width), of which ``sequences`` are the
    cumulative lengths, are laid out so, none longer than ``longest``, and its results are packed.
    """
    if sequences is None:
        return function(*tensors, None)
    if tensors[0].dim() == 3:
        past = beyond(sequences, tensors[0].shape[1])
        results = function(*(t.masked_fill(past, 0) for t in tensors), sequences)
        return tuple(t.masked_fill(past, 0) for t in results)
    total = tensors[0].shape[0]
    start, lengths = sequences[:-1].long(), sequences.diff()
    place = start[:, None] + torch.arange(longest or 0, device=start.device)
    laid_out = [F.pad(t, (0, 0, 0, 1))[place.clamp(max=total)] for t in tensors]
    results = by_sequence(function, laid_out, lengths, None)
    rows = torch.arange(total, device=start.device)
    sequence = torch.searchsorted(sequences.long(), rows, right=True) - 1
    return tuple(t[sequence, rows - start[sequence]] for t in results)
