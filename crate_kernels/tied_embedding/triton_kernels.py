"""Tied embedding in Triton: bound by memory.

    forward   x_t = E[i_t] + P[p_t]                               embed_kernel
    backward  tokens sorted by their row i of E (or p of P), then
              dE_i = dhead_i + sum of the dx_t of row i           pieces_kernel, rows_kernel

The sorted tokens are cut into pieces of PIECE. A row's program adds up its own tokens as far as the
next cut; what lies behind comes as one sum for each piece, which other programs made before: so a
row with many tokens takes as long as PIECE of them and a PIECE-th of the rest. No atomics: results
are bitwise repeatable. Contracts are those of torch_kernels.py, but that an index out of range
gives NaN in x, and adds to no row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import on_device_of

PIECE = 32
AT_ONCE = 2  # tokens that a program loads together; with 4, half as many programs have room


@triton.jit
def embed_kernel(
    IDX, E, POSITIONS, P, X, n_tokens, length, n_words, n_places,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (token < n_tokens) & (col < D)
    word = tl.load(IDX + token, mask=token < n_tokens, other=0).to(tl.int64)
    if POSITIONS is None:
        place = (token % length).to(tl.int64)
    else:
        place = tl.load(POSITIONS + token, mask=token < n_tokens, other=0).to(tl.int64)
    is_word = inside & (word >= 0) & (word < n_words)
    is_place = inside & (place >= 0) & (place < n_places)
    x = tl.load(E + word * D + col, mask=is_word, other=float("nan")).to(tl.float32)
    x += tl.load(P + place * D + col, mask=is_place, other=float("nan")).to(tl.float32)
    tl.store(X + token.to(tl.int64) * D + col, x.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _sum_rows(
    X, ORDER, first, last, col,
    D: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Rows first to last of X, or those that ORDER has in these places, summed: [BLOCK]."""
    total = tl.zeros((AT_ONCE, BLOCK), tl.float32)
    for start in range(first, last, AT_ONCE):
        at = start + tl.arange(0, AT_ONCE)[:, None]
        row = at.to(tl.int64)
        if ORDER is not None:
            row = tl.load(ORDER + at, mask=at < last, other=0).to(tl.int64)
        inside = (at < last) & (col[None, :] < D)
        total += tl.load(X + row * D + col[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def pieces_kernel(
    DX, ORDER, SORTED, STARTS, PIECES, n_rows,
    D: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """PIECES (pieces, D): of each piece the tokens that share the row of its first, summed."""
    first = tl.program_id(0) * PIECE
    col = tl.arange(0, BLOCK)
    row = tl.load(SORTED + first).to(tl.int64)
    last = tl.load(STARTS + row + 1, mask=(row >= 0) & (row < n_rows), other=0)
    last = tl.minimum(last, first + PIECE)
    total = _sum_rows(DX, ORDER, first, last, col, D, BLOCK, AT_ONCE)
    tl.store(PIECES + tl.program_id(0).to(tl.int64) * D + col, total, mask=col < D)


@triton.jit
def rows_kernel(
    DX, ORDER, STARTS, PIECES, GIVEN, OUT, skipped,
    D: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """A row of OUT a program: that of GIVEN, which may be None, and its tokens' of DX."""
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * D + col
    total = tl.zeros((BLOCK,), tl.float32)
    if GIVEN is not None:  # on its way while the tokens are looked for
        total = tl.load(GIVEN + at, mask=col < D, other=0.0).to(tl.float32)
    first = tl.load(STARTS + row)
    last = tl.where(row == skipped, first, tl.load(STARTS + row + 1))
    piece = tl.cdiv(first, PIECE)
    own = tl.minimum(last, piece * PIECE)
    total += _sum_rows(DX, ORDER, first, own, col, D, BLOCK, AT_ONCE)
    total += _sum_rows(PIECES, None, piece, tl.cdiv(last, PIECE), col, D, BLOCK, AT_ONCE)
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=col < D)


def forward(
    idx: Tensor,
    weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    n_words, d = weight.shape
    x = torch.empty(*idx.shape, d, dtype=dtype, device=weight.device)
    block = triton.next_power_of_2(d)
    if idx.numel() > 0:
        with on_device_of(weight):
            embed_kernel[(idx.numel(),)](
                idx, weight, positions, position_weight, x, idx.numel(), idx.shape[-1], n_words,
                len(position_weight), D=d, BLOCK=block, ROWS=1, num_warps=_warps(block),
            )  # fmt: skip
    return x


def add_rows(
    dx: Tensor, idx: Tensor, given: Tensor | None, rows: int, skipped: int, dtype: torch.dtype
) -> Tensor:
    n_tokens, d = dx.shape
    out = torch.empty(rows, d, dtype=dtype, device=dx.device)
    ordered, order = idx.to(torch.int32).sort(stable=True)
    each = torch.arange(rows + 1, dtype=torch.int32, device=dx.device)
    starts = torch.searchsorted(ordered, each, out_int32=True)
    pieces = torch.empty(triton.cdiv(n_tokens, PIECE), d, dtype=torch.float32, device=dx.device)
    block = triton.next_power_of_2(d)
    options: dict[str, Any] = {"D": d, "BLOCK": block, "AT_ONCE": AT_ONCE, "PIECE": PIECE}
    options["num_warps"] = _warps(block)
    with on_device_of(dx):
        if n_tokens > 0:
            pieces_kernel[(len(pieces),)](dx, order, ordered, starts, pieces, rows, **options)
        rows_kernel[(rows,)](dx, order, starts, pieces, given, out, skipped, **options)
    return out


# 8 columns a thread, which in 16 bits are one load. Not measured yet.
def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)
