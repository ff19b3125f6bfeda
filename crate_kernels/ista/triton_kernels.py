"""ISTA in Triton: one portable GEMM kernel whose epilogue does the rest, and two small passes.

    forward   y  = relu(x + xc G - t)                       gemm_kernel
    backward  g  = dy * 1[y > 0]                            mask_kernel
              dx = g + g G^T                                gemm_kernel
              M  = xc^T g                                   the library's GEMM
              dW = eta M - eta W (M + M^T)                  gemm_kernel
    per step  G  = eta W - eta W^T W                        gemm_kernel

The identity stays out of G: x is added in the epilogue, in float32 (docs/ista.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents
from triton.tools.tensor_descriptor import TensorDescriptor

from ..library import on_device_of, sum_over_tokens
from ..triton_common import (
    dot,
    dot_precision,
    early_start,
    has_bulk_copy,
    multiprocessors,
    wait_if_early,
)
from . import torch_kernels


@dataclass(frozen=True)
class GemmConfig:
    """Tile of the output, depth of a step, parts the epilogue goes by, Triton's launch options."""

    block_m: int
    block_n: int
    block_k: int
    parts: int
    num_warps: int
    num_stages: int
    described: bool = False  # move tiles by tensor descriptors: the bulk copy engine, if there


# Measured on an H200 in bfloat16: docs/performance.md, "The ISTA GEMM".
def gemm_config(dtype: torch.dtype, n_rows: int, d: int, can_describe: bool) -> GemmConfig:
    if dtype == torch.float32:
        return GemmConfig(64, 64, 32, 1, 4, 3)
    if n_rows * d < 128 * 128 * 256:  # too few large tiles to occupy a GPU
        block_m = 64 if n_rows * d <= 64 * 64 * 132 else 128
        if can_describe and n_rows == d and d * d <= 128 * 64 * 132:  # a block a multiprocessor
            return GemmConfig(block_m, 64, 128, 1, 4, 4 if block_m == 64 else 3, True)
        return GemmConfig(block_m, 64, 64, 1, 4, 4, can_describe)
    # Two blocks share a multiprocessor: one's epilogue hides behind the other's products.
    return GemmConfig(128, 128, 64, 4, 4, 3, can_describe)


@triton.jit
def _load_tile(
    T, row, col, n_rows, n_cols, row_stride, col_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS] of a matrix from (row, col) on; zeros past its ends."""
    if DESCRIBED:
        tile = T.load([row, col])
    else:
        rows = row + tl.arange(0, ROWS)[:, None]
        cols = col + tl.arange(0, COLS)[None, :]
        pointers = T + rows.to(tl.int64) * row_stride + cols * col_stride
        tile = tl.load(pointers, mask=(rows < n_rows) & (cols < n_cols), other=0.0)
    return tile


@triton.jit
def _act(v, threshold, ACT: tl.constexpr):
    """v - threshold ("none"), its "relu", or sign(v) relu(|v| - threshold) ("soft"); nan stays."""
    if ACT == "soft":
        size = tl.abs(v) - threshold
        return tl.where((size <= 0) | (v == 0), 0.0, tl.where(v < 0, -size, size))
    out = v - threshold
    if ACT == "relu":
        out = tl.where(out <= 0, 0.0, out)
    return out


@triton.jit
def _epilogue(
    acc, C, Y, OUT, row, col, n_rows, D, beta, alpha, threshold,
    ACT: tl.constexpr, STEP_STRIDE: tl.constexpr, LAMBD_STRIDE: tl.constexpr,
    MASK: tl.constexpr, PARTS: tl.constexpr, OUT_DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Write act(beta C + alpha acc - threshold), halving the columns until PARTS are done.

    The mask is as in gemm_kernel.
    """
    if PARTS > 1:
        halves = tl.permute(tl.reshape(acc, (ROWS, 2, COLS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _epilogue(
            left, C, Y, OUT, row, col, n_rows, D, beta, alpha, threshold,
            ACT, STEP_STRIDE, LAMBD_STRIDE, MASK, PARTS // 2, OUT_DTYPE, ROWS, COLS // 2, DESCRIBED,
        )  # fmt: skip
        _epilogue(
            right, C, Y, OUT, row, col + COLS // 2, n_rows, D, beta, alpha, threshold,
            ACT, STEP_STRIDE, LAMBD_STRIDE, MASK, PARTS // 2, OUT_DTYPE, ROWS, COLS // 2, DESCRIBED,
        )  # fmt: skip
    else:
        if C is None:
            out = alpha * acc
        else:
            c = _load_tile(C, row, col, n_rows, D, D, 1, ROWS, COLS, DESCRIBED).to(tl.float32)
            if MASK == "positive" or MASK == "nonzero":
                y = _load_tile(Y, row, col, n_rows, D, D, 1, ROWS, COLS, DESCRIBED)
                c = tl.where(y == 0 if MASK == "nonzero" else y <= 0, 0.0, c)
            if STEP_STRIDE >= 0:
                column = col + tl.arange(0, COLS)[None, :]
                step = tl.load(alpha + column * STEP_STRIDE, mask=column < D, other=0.0)
                lambd = tl.load(threshold + column * LAMBD_STRIDE, mask=column < D, other=0.0)
                step = step.to(tl.float32)
                out = beta * c + step * acc
                threshold = step * lambd.to(tl.float32)
            else:
                out = beta * c + alpha * acc
        out = _act(out, threshold, ACT)
        if MASK == "result":
            y = _load_tile(Y, row, col, n_rows, D, D, 1, ROWS, COLS, DESCRIBED)
            out = tl.where(y <= 0, 0.0, out)
        out = out.to(OUT_DTYPE)
        if DESCRIBED:
            OUT.store([row, col], out)
        else:
            rows = row + tl.arange(0, ROWS)[:, None]
            cols = col + tl.arange(0, COLS)[None, :]
            pointers = OUT + rows.to(tl.int64) * D + cols
            tl.store(pointers, out, mask=(rows < n_rows) & (cols < D))


@triton.jit
def gemm_kernel(
    C, A, B, Y, CHANGED, OUT, n_rows, D, K, beta, alpha, threshold,
    stride_am, stride_ak, stride_bk, stride_bn, n_changed,
    ACT: tl.constexpr, STEP_STRIDE: tl.constexpr, LAMBD_STRIDE: tl.constexpr,
    MASK: tl.constexpr, FLAGS: tl.constexpr, OUT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    DESCRIBED: tl.constexpr, TRANSPOSE_A: tl.constexpr, TRANSPOSE_B: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """OUT = act(beta C + alpha A B - threshold): A (n_rows, K), B (K, D), C and OUT (n_rows, D).

    K and C may be None: K = D, C = 0. ACT as in _act. STEP_STRIDE >= 0: alpha and threshold are
    the addresses of eta and lambda, of one for all columns (stride 0) or one for each (1), and eta
    lambda is the threshold. MASK: C counts everywhere ("none"), where Y > 0 ("positive") or where
    Y != 0 ("nonzero"); or OUT is 0 but where Y > 0 ("result"), as nan is here. FLAGS (0: no
    condition): do nothing unless one of the n_changed <= FLAGS flags at CHANGED is set. DESCRIBED:
    the matrices are tensor descriptors, those of A^T and B^T where TRANSPOSE_A and TRANSPOSE_B.
    EARLY: launched before the kernel ahead of it ends.
    """
    if EARLY:
        gdc_launch_dependents()
    wait_if_early(EARLY)
    if FLAGS > 0:
        flag = tl.arange(0, FLAGS)
        if tl.max(tl.load(CHANGED + flag, mask=flag < n_changed, other=0), 0) == 0:
            return
    depth = D if K is None else K
    tiles_n = tl.cdiv(D, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M) * tiles_n, tl.num_programs(0)):
        row = (tile // tiles_n) * BLOCK_M  # neighbours share their rows of A
        col = (tile % tiles_n) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, depth, BLOCK_K):
            if TRANSPOSE_A:
                a = tl.trans(A.load([k, row]))
            else:
                a = _load_tile(
                    A, row, k, n_rows, depth, stride_am, stride_ak, BLOCK_M, BLOCK_K, DESCRIBED
                )  # fmt: skip
            if TRANSPOSE_B:
                b = tl.trans(B.load([col, k]))
            else:
                b = _load_tile(
                    B, k, col, depth, D, stride_bk, stride_bn, BLOCK_K, BLOCK_N, DESCRIBED
                )  # fmt: skip
            acc = dot(a, b, acc, PRECISION)
        _epilogue(
            acc, C, Y, OUT, row, col, n_rows, D, beta, alpha, threshold,
            ACT, STEP_STRIDE, LAMBD_STRIDE, MASK, PARTS, OUT_DTYPE, BLOCK_M, BLOCK_N, DESCRIBED,
        )  # fmt: skip


@triton.jit
def mask_kernel(DY, Y, G, n_elements, BLOCK: tl.constexpr):
    """G = dy * 1[y > 0], in G's dtype; dy passes where y is nan, as in torch."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_elements
    y = tl.load(Y + at, mask=inside, other=0.0)
    g = tl.where(y <= 0, 0.0, tl.load(DY + at, mask=inside, other=0.0))
    tl.store(G + at, g.to(G.dtype.element_ty), mask=inside)


@triton.jit
def weight_changed_kernel(W, SEEN, CHANGED, n_elements, BLOCK: tl.constexpr):
    """CHANGED[block] = whether W differs from SEEN there (nan always does); SEEN becomes W."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(W + at, mask=at < n_elements, other=0.0)
    differs = w != tl.load(SEEN + at, mask=at < n_elements, other=0.0)
    tl.store(CHANGED + tl.program_id(0), tl.max(differs.to(tl.int32), 0))
    tl.store(SEEN + at, w, mask=(at < n_elements) & differs)


# ---- launchers; the contracts are those of torch_kernels.py


def make_gram(
    weight: Tensor, step_size: float, dtype: torch.dtype, wc: Tensor | None = None
) -> Tensor:
    """G (D, D) in ``dtype``; the product takes the weight rounded to it, wc if that is there."""
    gram = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _launch_gram(weight.contiguous(), gram, step_size, wc)
    return gram


def refresh_gram(weight: Tensor, seen: Tensor, gram: Tensor, step_size: float) -> None:
    """Make ``gram`` again where ``weight`` is no longer ``seen``; the GPU decides, unasked."""
    weight = weight.contiguous()
    block = 4096
    changed = torch.empty(
        triton.cdiv(weight.numel(), block), dtype=torch.int32, device=weight.device
    )
    with on_device_of(weight):
        weight_changed_kernel[(changed.numel(),)](
            weight, seen, changed, weight.numel(), BLOCK=block
        )
    _launch_gram(weight, gram, step_size, None, changed)


def _launch_gram(
    weight: Tensor,
    gram: Tensor,
    step_size: float,
    wc: Tensor | None = None,
    changed: Tensor | None = None,
) -> None:
    wc = weight.to(gram.dtype) if wc is None else wc
    _gemm(weight, wc.mT, wc, gram, beta=step_size, alpha=-step_size, changed=changed)


def apply_gram(x: Tensor, xc: Tensor, gram: Tensor, threshold: float) -> Tensor:
    """relu(x + xc G - threshold)"""
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, xc.dtype), device=x.device)
    _gemm(x.contiguous(), _rows(xc), gram, y, threshold=threshold, act="relu")
    return y


def apply_weight(
    x: Tensor, xc: Tensor, weight: Tensor, step_size: float, threshold: float
) -> Tensor:
    """relu(x + eta (xc - xc W^T) W - threshold)"""
    xc, wc = _rows(xc), weight.to(xc.dtype)
    residual = torch.empty_like(xc)
    _gemm(xc, xc, wc.mT, residual, alpha=-1.0)
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, xc.dtype), device=x.device)
    _gemm(x.contiguous(), residual, wc, y, alpha=step_size, threshold=threshold, act="relu")
    return y


def input_gradient(
    dy: Tensor, y: Tensor, gram: Tensor, wants_x: bool = True, wants_g: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dx = g + g G^T in the dtype of dy, and g = dy * 1[y > 0] in that of G."""
    dy = dy.contiguous()
    g = torch.empty(dy.shape, dtype=gram.dtype, device=dy.device)
    block = 4096
    with on_device_of(y):
        mask_kernel[(triton.cdiv(y.numel(), block),)](dy, y, g, y.numel(), BLOCK=block)
    return (_masked_gradient(dy, y, g, gram, "positive") if wants_x else None), g


def _masked_gradient(dy: Tensor, y: Tensor, g: Tensor, gram: Tensor, mask: str) -> Tensor:
    """g + g G^T in the dtype of dy; ``mask`` of y is what made g of dy."""
    dx, rows = torch.empty_like(dy), _rows(g)
    if dy.dtype == g.dtype:
        _gemm(g, rows, gram.mT, dx)
    elif g.dtype == torch.bfloat16:
        # The unrounded gradient passes through the identity, masked by g, which is at hand.
        _gemm(dy, rows, gram.mT, dx, mask="nonzero", y=g)
    else:  # float16 rounds small gradients to zero
        _gemm(dy, rows, gram.mT, dx, mask=mask, y=y)
    return dx


def weight_gradient(
    xc: Tensor, g: Tensor, weight: Tensor, step_size: float, wc: Tensor | None = None
) -> Tensor:
    """dW = eta (M - W (M + M^T)), M = xc^T g over all tokens."""
    m = sum_over_tokens(xc, g, torch.float32)
    return _weight_gradient_of(m, weight, step_size, xc.dtype, wc)


def _weight_gradient_of(
    m: Tensor,
    weight: Tensor,
    step_size: float,
    c_dtype: torch.dtype,
    wc: Tensor | None = None,
) -> Tensor:
    """eta (M - W (M + M^T)), of products that ran in ``c_dtype``."""
    # float16 cannot hold a scaled M: its product runs in TF32.
    dtype = torch.float32 if c_dtype == torch.float16 else c_dtype
    both = torch.add(m, m.mT, out=torch.empty_like(m, dtype=dtype))
    return weight_gradient_of_sums(m, both, weight, step_size, c_dtype, wc)


def weight_gradient_of_sums(
    m: Tensor,
    both: Tensor,
    weight: Tensor,
    step_size: float,
    c_dtype: torch.dtype,
    wc: Tensor | None,
) -> Tensor:
    """eta (M - W (M + M^T)) from ``both`` = M + M^T, in the dtype of the product; ``wc`` is W in
    that dtype, if it is there."""
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    wc = wc if wc is not None and wc.dtype == both.dtype else weight.to(both.dtype)
    _gemm(
        m, wc, both, dw,
        beta=step_size, alpha=-step_size, precision=dot_precision(c_dtype),
    )  # fmt: skip
    return dw


# With fewer tokens than columns every product is small: the library's GEMMs serve.
backward_weight = torch_kernels.backward_weight


def _rows(x: Tensor) -> Tensor:
    """(rows, D), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _gemm(
    c: Tensor | None,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    beta: float = 1.0,
    alpha: float | Tensor = 1.0,
    threshold: float | Tensor = 0.0,
    act: str = "none",
    mask: str = "none",
    y: Tensor | None = None,
    changed: Tensor | None = None,
    precision: str | None = None,
) -> None:
    """out = act(beta c + alpha a b - threshold); c, y and out are contiguous, of as many elements.

    c may be None: zero. Tensors for alpha and threshold are eta and lambda, of one element or
    contiguous (D,). mask is what gemm_kernel calls MASK, act what it calls ACT.
    """
    (n_rows, k), d = a.shape, b.shape[1]
    if n_rows == 0:
        return
    matrices = [c, a, b, y, out]
    aligned = d % 8 == k % 8 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in matrices)
    in_rows = all(t.is_contiguous() or t.mT.is_contiguous() for t in (a, b))
    can_describe = aligned and in_rows and has_bulk_copy(a)
    config = gemm_config(b.dtype, n_rows, d, can_describe)
    transpose_a = config.described and not a.is_contiguous()
    transpose_b = config.described and not b.is_contiguous()
    if config.described:
        part = (config.block_m, config.block_n // config.parts)
        tile_a = (config.block_m, config.block_k)
        tile_b = (config.block_k, config.block_n)
        matrices = [
            None if c is None else _describe(c, d, part),
            _describe(a.mT, n_rows, tile_a[::-1]) if transpose_a else _describe(a, k, tile_a),
            _describe(b.mT, k, tile_b[::-1]) if transpose_b else _describe(b, d, tile_b),
            None if y is None else _describe(y, d, part),
            _describe(out, d, part),
        ]
    step_stride, lambd_stride = (
        (0 if t.numel() == 1 else 1) if isinstance(t, Tensor) else -1 for t in (alpha, threshold)
    )
    n_changed = 0 if changed is None else changed.numel()
    tiles = triton.cdiv(n_rows, config.block_m) * triton.cdiv(d, config.block_n)
    early = early_start(a, n_rows == d)  # those are short enough for it to matter
    grid = (min(tiles, 2 * multiprocessors(a)) if config.described else tiles,)
    with on_device_of(a):
        gemm_kernel[grid](
            *matrices[:4], changed, matrices[4], n_rows, d, None if k == d else k,
            beta, alpha, threshold,
            *a.stride(), *b.stride(), n_changed,
            ACT=act, STEP_STRIDE=step_stride, LAMBD_STRIDE=lambd_stride,
            MASK=mask, FLAGS=triton.next_power_of_2(n_changed) if n_changed else 0,
            OUT_DTYPE=getattr(tl, str(out.dtype).removeprefix("torch.")),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            PARTS=config.parts, DESCRIBED=config.described,
            TRANSPOSE_A=transpose_a, TRANSPOSE_B=transpose_b,
            PRECISION=precision or dot_precision(b.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages, **early,
        )  # fmt: skip


def _describe(t: Tensor, d: int, block: tuple[int, int]) -> TensorDescriptor:
    """t as rows of d elements, moved in tiles of ``block``."""
    return TensorDescriptor(t, [t.numel() // d, d], [d, 1], list(block))
