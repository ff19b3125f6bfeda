"""Which attention weights dropout keeps: random bits from their place, in plain PyTorch.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; the
fewest that pass its tests): the seed is the key, (min(i, j), max(i, j), head, 0) the counter, head
counted over batch * heads. Of the four words the first is P_ij's for i >= j, the second P_ij's for
i < j, so that one call serves P_ij and P_ji. triton_dropout.py draws the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words from four, 32 bits each in int64; ``seed`` is one int64."""
    a, b, c, d = counter
    keys = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # 64 bits, in two's complement
        a, c = (second >> 32) & WORD ^ b ^ keys[0], (first >> 32) & WORD ^ d ^ keys[1]
        b, d = second & WORD, first & WORD
        keys = [(key + step) & WORD for key, step in zip(keys, WEYL, strict=True)]
    return a, b, c, d


def kept(n: int, heads: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """(..., n, n): True where dropout keeps P_ij; heads (...) are the numbers of the heads."""
    i = torch.arange(n, device=heads.device)[:, None]
    j = torch.arange(n, device=heads.device)
    head = heads[..., None, None]
    counter = (torch.minimum(i, j), torch.maximum(i, j), head, torch.zeros_like(head))
    later, earlier, _, _ = philox(seed.reshape(()), counter)
    return torch.where(i >= j, later, earlier) >> 1 >= threshold(dropout)


def threshold(dropout: float) -> int:
    """Of draws of 31 bits, those below it drop."""
    return int(dropout * 2**31)


def seed_tensor(seed: Any, device: torch.device) -> Tensor:
    """(1,) in int64 on ``device``; None draws one from torch's generator there."""
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)
