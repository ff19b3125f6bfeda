"""Where sequences and their heads lie, and their rows: what the attention kernels load and store.

LAYOUT says how sequences lie in w: "equal", each of N rows; "padded", N rows each, of which item b
uses SEQUENCES[b]; "packed", one after the other in (T, heads*head_dim), sequence b from row
SEQUENCES[b] up to SEQUENCES[b + 1], none longer than N.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence(SEQUENCES, b, N, LAYOUT: tl.constexpr):
    """The first row of sequence b (0 where each has its N rows), and its length."""
    row = 0
    length = N
    if LAYOUT == "padded":
        length = tl.minimum(tl.load(SEQUENCES + b).to(tl.int32), N)
    if LAYOUT == "packed":
        row = tl.load(SEQUENCES + b).to(tl.int64)
        length = tl.minimum((tl.load(SEQUENCES + b + 1) - row).to(tl.int32), N)
    return row, length


@triton.jit
def head_base(T, row, b, h, stride_b, stride_n, HEAD_DIM: tl.constexpr, LAYOUT: tl.constexpr):
    """Where head h of sequence b starts in T, rows of tokens."""
    if LAYOUT == "packed":
        base = T + row * stride_n + h * HEAD_DIM
    else:
        base = T + b * stride_b + h * HEAD_DIM
    return base


@triton.jit
def statistics(T, row, head, h, N, rows_in_all, LAYOUT: tl.constexpr):
    """The same in T = lse or delta: (B, heads, N), packed (heads, T)."""
    if LAYOUT == "packed":
        base = T + h.to(tl.int64) * rows_in_all + row
    else:
        base = T + head.to(tl.int64) * N
    return base


@triton.jit
def load_rows(base, rows, cols, stride_n, N, HEAD_DIM: tl.constexpr, WHOLE: tl.constexpr = False):
    """[rows, BLOCK_D] of one head; zeros past row N (WHOLE: there are none) and column HEAD_DIM."""
    pointers = base + rows[:, None] * stride_n + cols[None, :]
    if cols.shape[0] > HEAD_DIM:
        mask = (rows[:, None] < N) & (cols[None, :] < HEAD_DIM)
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif WHOLE:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=rows[:, None] < N, other=0.0)
    return tile


@triton.jit
def store_rows(
    T, tile, row, b, h, rows, cols, heads, N, length, HEAD_DIM: tl.constexpr, LAYOUT: tl.constexpr
):
    """One head's rows of T = o or dw, contiguous; in a padded batch zeros past length."""
    inner = heads * HEAD_DIM
    end = length
    if LAYOUT == "padded":
        tile = tl.where(rows[:, None] < length, tile, 0.0)
        end = N
    first = row if LAYOUT == "packed" else b * N
    pointers = T + first * inner + h * HEAD_DIM + rows[:, None] * inner + cols[None, :]
    mask = (rows[:, None] < end) & (cols[None, :] < HEAD_DIM)
    tl.store(pointers, tile.to(T.dtype.element_ty), mask=mask)


@triton.jit
def store_lse(base, m, total, rows, N, length, LAYOUT: tl.constexpr):
    """One head's rows of lse, from base 2; in a padded batch inf past length."""
    if LAYOUT == "padded":
        lse = tl.where(rows < length, (m + tl.log2(total)) / LOG2E, float("inf"))
        tl.store(base + rows, lse, mask=rows < N)
    else:
        tl.store(base + rows, (m + tl.log2(total)) / LOG2E, mask=rows < length)
