"""The random bits of dropout.py in Triton; ``below`` is its threshold."""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import ROUNDS

PHILOX_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def dropped(rows_j, rows_i, head, seed, below):
    """[rows_j, rows_i] twice: where P_ji is dropped, and where P_ij is."""
    j, i = rows_j[:, None], rows_i[None, :]
    lesser, greater = tl.minimum(i, j), tl.maximum(i, j)
    later, earlier, _, _ = tl.philox(seed, lesser, greater, head, 0, PHILOX_ROUNDS)
    later = (later >> 1).to(tl.int32) < below
    earlier = (earlier >> 1).to(tl.int32) < below
    return tl.where(j >= i, later, earlier), tl.where(i >= j, later, earlier)


@triton.jit
def grown(below):
    """1 / (1 - dropout)."""
    return 2147483648.0 / (2147483648.0 - below)
