"""Decoding in Triton: the cached tokens of an item are split among programs, each read once.

    decode_one_kernel   T = 1    heads side by side in a warp; multiplies and adds
    decode_rows_kernel  T > 1    a tile of new tokens against a tile of the cache on tensor cores
    combine_kernel      the parts of one token and head, added in a fixed order

A part is (m, total, acc): the largest score in bits, sum of exp2(score - m), the same sum with the
rows; it covers cached tokens alone, which no program writes. The last part has the new tokens too,
from w, and its programs write them: no program reads what another writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import on_device_of
from ..triton_common import dot, dot_precision, early_start, multiprocessors, wait_if_early

LOG2E = tl.constexpr(1.4426950408889634)
# Below every score, and finite: the difference of two of them is 0, not NaN.
LEAST = tl.constexpr(-1e38)
# Programs (one warp) for each multiprocessor that the context is split into; what keeps it busy.
PROGRAMS, AT_ONCE = 48, 12
# Columns that the program of one new token has side by side: 16 bytes of bfloat16 for each lane.
COLUMNS = 256
# Shorter parts are not worth their start and end (264 bytes of sums for 32 KB of rows), but where
# multiprocessors would go without; then they are as short as four visits of a program.
LEAST_ROWS, LEAST_VISITS = 128, 4


@dataclass(frozen=True)
class DecodeConfig:
    """Rows of the cache a step visits, new tokens of a program, and Triton's launch options."""

    visit: int
    rows: int
    num_warps: int
    num_stages: int


def decode_config(dtype: torch.dtype, head_dim: int, n_new: int, heads: int) -> DecodeConfig:
    if n_new == 1:  # a lane has 128 bytes of the next visit on their way (docs/decode.md)
        rows_of_slot = 4 if dtype == torch.float32 else 8
        return DecodeConfig(rows_of_slot * side_by_side(head_dim, heads)[1], 1, 1, 1)
    rows = 16 if n_new <= 16 else 64
    if dtype == torch.float32 or head_dim > 128:
        return DecodeConfig(32, min(rows, 32), 4, 2)
    return DecodeConfig(64, rows, 4, 3)


def block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def side_by_side(head_dim: int, heads: int) -> tuple[int, int]:
    """Heads that a program of one new token takes, and slots: rows, where heads do not fill it."""
    pieces = max(1, COLUMNS // block_d(head_dim))
    taken = math.gcd(heads, pieces)
    return taken, pieces // taken


def splits_for(programs: int, capacity: int, visit: int, n_processors: int) -> int:
    """Into how many parts to split the context where there are ``programs`` without."""
    fills = min(AT_ONCE * n_processors // programs, triton.cdiv(capacity, LEAST_VISITS * visit))
    most = max(triton.cdiv(capacity, LEAST_ROWS), fills)
    return max(1, min(PROGRAMS * n_processors // programs, most))


@triton.jit
def _part(LENGTHS, b, split, capacity, SPLITS: tl.constexpr, VISIT: tl.constexpr):
    """length; the cached rows [first, last) of this part, whole visits but for the last one."""
    length = tl.load(LENGTHS + b)
    cached = tl.minimum(tl.maximum(length, 0), capacity)
    share = tl.cdiv(tl.cdiv(cached, SPLITS), VISIT) * VISIT
    first = tl.minimum(split * share, cached)
    return length, first, tl.minimum(first + share, cached)


@triton.jit
def _load_rows(base, rows, cols, stride_n, n, HEAD_DIM: tl.constexpr):
    """[rows, BLOCK_D] of one head; zeros past row n and column HEAD_DIM."""
    mask = rows[:, None] < n
    if cols.shape[0] > HEAD_DIM:
        mask = mask & (cols[None, :] < HEAD_DIM)
    return tl.load(base + rows[:, None] * stride_n + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _visit(w_j, acc, m, total, w_i, seen, scale_log2, PRECISION: tl.constexpr):
    """One online-softmax step of the rows w_j over the rows w_i, where ``seen``."""
    s = tl.where(seen, dot(w_j, tl.trans(w_i), None, PRECISION), float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(p, 1)
    acc = dot(p.to(w_i.dtype), w_i, acc * shrink[:, None], PRECISION)
    return acc, m_new, total


@triton.jit
def decode_one_kernel(
    W, CACHE, LENGTHS, OUT, SUMS, STATS, w_stride_b, cache_stride_b, cache_stride_n, capacity,
    heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VISIT: tl.constexpr, SPLITS: tl.constexpr,
    TAKEN: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One new token, TAKEN heads: SUMS (B, heads, SPLITS, HEAD_DIM), STATS (.., 2), or OUT.

    A piece is a head of a slot, and a slot every SLOTS-th row with a softmax of its own. Of the
    axes [pieces, rows, columns] Triton gives the first and last to the lanes and the rows to each
    thread, so that sums over the rows of a visit exchange nothing.
    """
    groups = heads // TAKEN
    h = tl.program_id(0) % groups * TAKEN  # fastest: neighbours read the same rows of the cache
    split = tl.program_id(0) // groups % SPLITS
    b = (tl.program_id(0) // groups // SPLITS).to(tl.int64)
    length, first, last = _part(LENGTHS, b, split, capacity, SPLITS, VISIT)
    pieces = tl.arange(0, TAKEN * SLOTS)[:, None, None]
    rows = tl.arange(0, VISIT // SLOTS)[None, :, None] * SLOTS + pieces // TAKEN
    cols = tl.arange(0, BLOCK_D)[None, None, :]
    columns = pieces % TAKEN * HEAD_DIM + cols
    inside = cols < HEAD_DIM
    new = W + b * w_stride_b + h * HEAD_DIM
    query = tl.load(new + columns, mask=inside, other=0.0).to(tl.float32)
    query *= scale * LOG2E  # scores in bits

    base = CACHE + b * cache_stride_b + h * HEAD_DIM
    acc = tl.zeros((TAKEN * SLOTS, 1, BLOCK_D), tl.float32)
    m = tl.full((TAKEN * SLOTS, 1, 1), LEAST, tl.float32)
    total = tl.zeros((TAKEN * SLOTS, 1, 1), tl.float32)
    at = base + first.to(tl.int64) * cache_stride_n + rows * cache_stride_n + columns
    ahead = tl.load(at, mask=inside & (rows < last - first), other=0.0)
    for start in range(first, last, VISIT):
        w = ahead.to(tl.float32)  # [pieces, rows, columns]
        at += VISIT * cache_stride_n
        ahead = tl.load(at, mask=inside & (rows < last - start - VISIT), other=0.0)
        s = tl.sum(w * query, 2, keep_dims=True)
        s = tl.where(start + rows < last, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1, keep_dims=True))
        p = tl.exp2(s - m_new)
        shrink = tl.exp2(m - m_new)
        total = total * shrink + tl.sum(p, 1, keep_dims=True)
        acc = acc * shrink + tl.sum(p * w, 1, keep_dims=True)
        m = m_new

    # The slots of a head, and the new token, which is in the last part.
    is_last = split == SPLITS - 1
    taken, cols = tl.arange(0, TAKEN), tl.arange(0, BLOCK_D)[None, :]
    columns, inside = taken[:, None] * HEAD_DIM + cols, cols < HEAD_DIM
    w = tl.load(new + columns, mask=inside, other=0.0)  # [TAKEN, BLOCK_D]
    own = tl.sum(w.to(tl.float32) * w.to(tl.float32), 1) * (scale * LOG2E)
    own = tl.where(is_last, own, float("-inf"))
    m_of = tl.reshape(m, (SLOTS, TAKEN))
    m_part = tl.maximum(tl.max(m_of, 0), own)
    p_own = tl.exp2(own - m_part)
    weight = tl.exp2(m_of - m_part[None, :])
    total_part = tl.sum(tl.reshape(total, (SLOTS, TAKEN)) * weight, 0) + p_own
    o = tl.sum(tl.reshape(acc, (SLOTS, TAKEN, BLOCK_D)) * weight[:, :, None], 0)
    o += tl.where(is_last, p_own[:, None] * w.to(tl.float32), 0.0)

    fits = (length >= 0) & (length < capacity)
    to = base + length.to(tl.int64) * cache_stride_n + columns
    tl.store(to, w, mask=inside & fits & is_last)
    of_head = b * heads + h + taken
    if SPLITS == 1:
        o = tl.where(fits, o / total_part[:, None], float("nan"))
        out = OUT + of_head[:, None] * HEAD_DIM + cols
        tl.store(out, o.to(OUT.dtype.element_ty), mask=inside)
    else:
        part = of_head * SPLITS + split
        tl.store(SUMS + part[:, None] * HEAD_DIM + cols, o, mask=inside)
        tl.store(STATS + part * 2, m_part)
        tl.store(STATS + part * 2 + 1, total_part)


@triton.jit
def decode_rows_kernel(
    W, CACHE, LENGTHS, OUT, SUMS, STATS, w_stride_b, w_stride_n, cache_stride_b, cache_stride_n,
    capacity, n_new, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VISIT: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS new tokens: SUMS (B, heads, T, SPLITS, HEAD_DIM), STATS (.., 2), or OUT."""
    tiles = tl.cdiv(n_new, ROWS)
    h = tl.program_id(0) % heads
    j = tl.program_id(0) // heads % tiles
    split = tl.program_id(0) // heads // tiles % SPLITS
    b = (tl.program_id(0) // heads // tiles // SPLITS).to(tl.int64)
    length, first, last = _part(LENGTHS, b, split, capacity, SPLITS, VISIT)
    cols = tl.arange(0, BLOCK_D)
    rows_j = j * ROWS + tl.arange(0, ROWS)
    new = W + b * w_stride_b + h * HEAD_DIM
    base = CACHE + b * cache_stride_b + h * HEAD_DIM
    w_j = _load_rows(new, rows_j, cols, w_stride_n, n_new, HEAD_DIM)  # [ROWS, BLOCK_D]

    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    scale_log2 = scale * LOG2E
    steps = tl.arange(0, VISIT)
    here = base + first.to(tl.int64) * cache_stride_n
    for start in range(first, last, VISIT):
        w_i = _load_rows(here, steps, cols, cache_stride_n, last - start, HEAD_DIM)
        seen = (start + steps < last)[None, :]
        acc, m, total = _visit(w_j, acc, m, total, w_i, seen, scale_log2, PRECISION)
        here += VISIT * cache_stride_n
    is_last = split == SPLITS - 1
    for start in range(0, tl.where(is_last, tl.minimum(n_new, (j + 1) * ROWS), 0), VISIT):
        rows_i = start + steps
        w_i = _load_rows(new, rows_i, cols, w_stride_n, n_new, HEAD_DIM)
        seen = (rows_i[None, :] < n_new) & (rows_i[None, :] <= rows_j[:, None])
        acc, m, total = _visit(w_j, acc, m, total, w_i, seen, scale_log2, PRECISION)

    fits = (length >= 0) & (length < capacity - rows_j)
    inside = (rows_j[:, None] < n_new) & (cols[None, :] < HEAD_DIM)
    to = base + (length + rows_j).to(tl.int64)[:, None] * cache_stride_n + cols[None, :]
    tl.store(to, w_j, mask=inside & fits[:, None] & is_last)
    if SPLITS == 1:
        o = tl.where(fits[:, None], acc / total[:, None], float("nan"))
        out = OUT + ((b * n_new + rows_j[:, None]) * heads + h) * HEAD_DIM + cols[None, :]
        tl.store(out, o.to(OUT.dtype.element_ty), mask=inside)
    else:
        part = ((b * heads + h) * n_new + rows_j) * SPLITS + split
        tl.store(SUMS + part[:, None] * HEAD_DIM + cols[None, :], acc, mask=inside)
        tl.store(STATS + part * 2, m, mask=rows_j < n_new)
        tl.store(STATS + part * 2 + 1, total, mask=rows_j < n_new)


@triton.jit
def combine_kernel(
    SUMS, STATS, LENGTHS, OUT, capacity, n_new, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """o of one new token and head from its parts; NaN where it does not fit into the cache."""
    wait_if_early(EARLY)
    row = tl.program_id(0).to(tl.int64)  # over (B, heads, T)
    b, h, t = row // n_new // heads, row // n_new % heads, row % n_new
    cols = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    most, total = LEAST, 0.0
    for first in range(0, SPLITS, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)
        part = row * SPLITS + splits
        m = tl.load(STATS + part * 2, mask=splits < SPLITS, other=float("-inf"))
        totals = tl.load(STATS + part * 2 + 1, mask=splits < SPLITS, other=0.0)
        inside = (splits[:, None] < SPLITS) & (cols[None, :] < HEAD_DIM)
        sums = tl.load(SUMS + part[:, None] * HEAD_DIM + cols[None, :], mask=inside, other=0.0)
        m_new = tl.maximum(most, tl.max(m, 0))
        weight, shrink = tl.exp2(m - m_new), tl.exp2(most - m_new)
        acc = acc * shrink + tl.sum(sums * weight[:, None], 0)
        total = total * shrink + tl.sum(totals * weight, 0)
        most = m_new
    length = tl.load(LENGTHS + b)
    o = tl.where((length >= 0) & (length < capacity - t), acc / total, float("nan"))
    out = OUT + ((b * n_new + t) * heads + h) * HEAD_DIM + cols
    tl.store(out, o.to(OUT.dtype.element_ty), mask=cols < HEAD_DIM)


def decode(w: Tensor, cache: Tensor, lengths: Tensor, heads: int, scale: float) -> Tensor:
    """w (B, T, heads*head_dim) -> o like w, contiguous; writes w into cache (B, capacity, ...)."""
    batch, n_new, width = w.shape
    capacity, head_dim = cache.shape[1], width // heads
    near = n_new * w.stride(1) < 2**31
    w = w if w.stride(2) == 1 and near else w.contiguous()
    lengths = lengths.contiguous()
    o = w.new_empty(w.shape)
    if batch == 0:
        return o
    config = decode_config(w.dtype, head_dim, n_new, heads)
    taken, slots = side_by_side(head_dim, heads) if n_new == 1 else (1, 1)
    programs = batch * (heads // taken) * triton.cdiv(n_new, config.rows)
    splits = splits_for(programs, capacity, config.visit, multiprocessors(w))
    sums = stats = o  # not touched
    if splits > 1:
        parts = batch * heads * n_new * splits
        sums = w.new_empty(parts * head_dim, dtype=torch.float32)
        stats = w.new_empty(parts * 2, dtype=torch.float32)
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": block_d(head_dim), "SPLITS": splits}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    with on_device_of(w):
        if n_new == 1:
            decode_one_kernel[(programs * splits,)](
                w, cache, lengths, o, sums, stats, w.stride(0), cache.stride(0), cache.stride(1),
                capacity, heads, scale, VISIT=config.visit, TAKEN=taken, SLOTS=slots,
                **sizes, **options,
            )  # fmt: skip
        else:
            decode_rows_kernel[(programs * splits,)](
                w, cache, lengths, o, sums, stats, w.stride(0), w.stride(1),
                cache.stride(0), cache.stride(1), capacity, n_new, heads, scale,
                VISIT=config.visit, ROWS=config.rows, PRECISION=dot_precision(w.dtype),
                **sizes, **options,
            )  # fmt: skip
        if splits > 1:
            warps = 1 if splits <= 32 else 4
            at_once = 64 * 32 * warps // sizes["BLOCK_D"]  # 64 elements a thread
            combine_kernel[(batch * heads * n_new,)](
                sums, stats, lengths, o, capacity, n_new, heads,
                BLOCK_S=min(at_once, triton.next_power_of_2(splits)), num_warps=warps,
                **sizes, **early_start(w),
            )  # fmt: skip
    return o
