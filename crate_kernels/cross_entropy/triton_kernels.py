"""Cross-entropy in Triton: bound by memory, logits read once in either pass.

    forward   m = max x, l = log sum exp(x - m), loss = l - (x_label - m)   forward kernel
    backward  dx = (exp(x - m - l) - onehot) dloss / count                  backward kernel
              and, of a bias, the sums of its columns

A program has a row and goes through it by tiles [LANES, GROUP], or where columns are summed it has
a tile and goes through rows; the programs' sums are added in a fixed order. GROUP columns are one
load of 16 bytes of one thread, which keeps the maximum and the sum of its own columns: no exchange
before the end of the row, and 1 + 1 / GROUP exponentials for each element. Rows that do not count
are not read. Contracts are those of torch_kernels.py, but that a label which is none gives NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import on_device_of

# The least float32 and no -inf: the difference of two would be nan.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@dataclass(frozen=True)
class RowConfig:
    """Of a row's tiles: groups of columns, columns of a group, and warps."""

    lanes: int
    group: int
    num_warps: int


# Rows of a program that sums columns: what it writes and others read of sums is 1/32 of its logits'
# bytes in 16 bits, and a large batch still has several programs for each place. Not measured yet.
SUMMED_ROWS = 128


# Not measured yet: 16 elements a thread, two loads in flight, for large vocabularies.
def row_config(vocab_size: int, element_size: int) -> RowConfig:
    group = 16 // element_size
    block = min(max(triton.next_power_of_2(vocab_size), 32 * group), 4096)
    return RowConfig(block // group, group, max(block // 512, 1))


@triton.jit
def _columns(LANES: tl.constexpr, GROUP: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _add_tile(x, largest, total):
    """Each lane's maximum and sum of exp(x - maximum), with x [LANES, GROUP] among them."""
    higher = tl.maximum(largest, tl.max(x, 1))
    total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
    return higher, total


@triton.jit
def cross_entropy_forward_kernel(
    X, LABELS, LOSS, STATS, stride, V, IGNORED,
    LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row).to(tl.int64)
    counts = label != IGNORED
    col = _columns(LANES, GROUP)
    X += row * stride
    largest = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    whole = V // (LANES * GROUP) * (LANES * GROUP)
    for start in range(0, tl.where(counts, whole, 0), LANES * GROUP):
        x = tl.load(X + start + col).to(tl.float32)
        largest, total = _add_tile(x, largest, total)
    inside = counts & (whole + col < V)
    x = tl.load(X + whole + col, mask=inside, other=float("-inf")).to(tl.float32)
    largest, total = _add_tile(x, largest, total)
    m = tl.max(largest, 0)
    log_sum = tl.log(tl.sum(total * tl.exp(largest - m), 0))
    # A label that is none gives nan.
    is_one = counts & (label >= 0) & (label < V)
    at_label = tl.load(X + label, mask=is_one, other=float("nan")).to(tl.float32)
    tl.store(LOSS + row, tl.where(counts, log_sum - (at_label - m), 0.0))
    tl.store(STATS + 2 * row, tl.where(counts, m, 0.0))
    tl.store(STATS + 2 * row + 1, tl.where(counts, log_sum, 0.0))


@triton.jit
def _gradient(x, at, label, m, log_sum, scale):
    onehot = tl.where(at == label, 1.0, 0.0)
    return (tl.exp(x.to(tl.float32) - m - log_sum) - onehot) * scale


@triton.jit
def cross_entropy_backward_kernel(
    DLOSS, COUNT, X, LABELS, STATS, DX, PARTIALS, stride, n_rows, V, WIDTH, IGNORED,
    ROWS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program; with PARTIALS (programs, WIDTH) one tile of them, whose columns it sums,
    before they are rounded."""
    TILE: tl.constexpr = LANES * GROUP
    col = _columns(LANES, GROUP)
    first, last = 0, WIDTH
    if PARTIALS is not None:
        first = tl.program_id(1) * TILE
        last = tl.minimum(first + TILE, WIDTH)
        sums = tl.zeros((LANES, GROUP), tl.float32)
    whole = tl.minimum(V // TILE * TILE, last)
    share = tl.load(DLOSS) / tl.load(COUNT)
    first_row = tl.program_id(0) * ROWS
    for r in range(0, tl.minimum(n_rows - first_row, ROWS)):
        row = (first_row + r).to(tl.int64)
        label = tl.load(LABELS + row).to(tl.int64)
        counts = label != IGNORED
        is_one = (label >= 0) & (label < V)
        scale = tl.where(counts, tl.where(is_one, share, float("nan")), 0.0)
        label = tl.where(counts & is_one, label, -1).to(tl.int32)
        m = tl.load(STATS + 2 * row)
        log_sum = tl.load(STATS + 2 * row + 1)
        for start in range(first, whole, TILE):
            at = start + col
            x = tl.load(X + row * stride + at, mask=counts, other=float("-inf"))
            dx = _gradient(x, at, label, m, log_sum, scale)
            tl.store(DX + row * WIDTH + at, dx.to(DX.dtype.element_ty))
            if PARTIALS is not None:
                sums += dx
        for start in range(tl.maximum(whole, first), last, TILE):
            at = start + col
            inside = counts & (at < V)
            x = tl.load(X + row * stride + at, mask=inside, other=float("-inf"))
            dx = tl.where(at < V, _gradient(x, at, label, m, log_sum, scale), 0.0)
            tl.store(DX + row * WIDTH + at, dx.to(DX.dtype.element_ty), mask=at < WIDTH)
            if PARTIALS is not None:
                sums += dx
    if PARTIALS is not None:
        at = first + col
        PARTIALS += tl.program_id(0).to(tl.int64) * WIDTH
        tl.store(PARTIALS + at, sums, mask=at < WIDTH)


def forward(
    logits: Tensor, labels: Tensor, vocab_size: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    n_rows = len(logits)
    losses = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    stats = torch.empty(n_rows, 2, dtype=torch.float32, device=logits.device)
    if n_rows > 0:
        with on_device_of(logits):
            cross_entropy_forward_kernel[(n_rows,)](
                logits, labels, losses, stats, logits.stride(0), vocab_size, ignore_index,
                **_options(logits, vocab_size),
            )  # fmt: skip
    count = (labels != ignore_index).sum(dtype=torch.float32)
    return losses.sum() / count, count, stats


def backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    count: Tensor,
    vocab_size: int,
    ignore_index: int,
    wants_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    n_rows, width = logits.shape
    dlogits = torch.empty(n_rows, width, dtype=logits.dtype, device=logits.device)
    options, grid, rows, partials = _options(logits, vocab_size), (n_rows, 1), 1, None
    if wants_sums:
        rows, tile = SUMMED_ROWS, options["LANES"] * options["GROUP"]
        grid = (triton.cdiv(n_rows, rows), triton.cdiv(width, tile))
        partials = torch.empty(grid[0], width, dtype=torch.float32, device=logits.device)
    if n_rows > 0:
        with on_device_of(logits):
            cross_entropy_backward_kernel[grid](
                dloss, count, logits, labels, stats, dlogits, partials, logits.stride(0),
                n_rows, vocab_size, width, ignore_index, ROWS=rows, **options,
            )  # fmt: skip
    return dlogits, None if partials is None else partials[:, :vocab_size].sum(0)


def _options(logits: Tensor, vocab_size: int) -> dict[str, Any]:
    config = row_config(vocab_size, logits.element_size())
    return {"LANES": config.lanes, "GROUP": config.group, "num_warps": config.num_warps}
