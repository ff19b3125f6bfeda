"""ista_learned in Triton: ISTA's GEMM, whose epilogue reads eta and lambda.

    forward   y  = act(x + eta (xc A), eta lambda)              gemm_kernel
    backward  g  = dy where y != 0, and parts of
              s  = sum g sign(y)                                mask_and_sum_kernel
              dx = g + g G^T,  G = A diag(eta)                  gemm_kernel
              M  = xc^T g                                       the library's GEMM
              dW = N - W (N + N^T),  N = M diag(eta)            gemm_kernel
              d eta_c = sum_j A_jc M_jc - lambda_c s_c,
              d lambda_c = -eta_c s_c                           threshold_gradient_kernel
    per step  A  = W - W^T W                                    gemm_kernel

The sums over tokens come from the pass that masks: their parts add 1/64 (bfloat16) to what it
writes, where a product with ones would read g once more. The contracts are those of
torch_kernels.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...library import on_device_of, sum_over_tokens
from ..triton_kernels import _gemm, _masked_gradient, _rows, _weight_gradient_of
from . import torch_kernels

ROWS = 128  # of the tokens that one part of a sum is over


@triton.jit
def mask_and_sum_kernel(
    DY, Y, G, PARTS, n_rows, D,
    ROWS: tl.constexpr, STEP: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """G = dy where y != 0 (or nan), in G's dtype; PARTS[part, c] = sum of g sign(y) over its rows.

    PARTS is (ceil(n_rows / ROWS), D); a program goes through its rows by STEP.
    """
    blocks = tl.cdiv(D, COLS)
    part = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)[None, :]
    total = tl.zeros((STEP, COLS), tl.float32)
    for first in range(0, ROWS, STEP):
        row = part * ROWS + first + tl.arange(0, STEP)[:, None]
        at = row.to(tl.int64) * D + col
        inside = (row < n_rows) & (col < D)
        y = tl.load(Y + at, mask=inside, other=0.0)
        g = tl.where(y == 0, 0.0, tl.load(DY + at, mask=inside, other=0.0))
        tl.store(G + at, g.to(G.dtype.element_ty), mask=inside)
        g = g.to(tl.float32)
        total += tl.where(y < 0, -g, g)  # [STEP, COLS]
    at = part.to(tl.int64) * D + col
    tl.store(PARTS + at, tl.sum(total, 0, keep_dims=True), mask=col < D)


@triton.jit(do_not_specialize=["wants_step"])
def threshold_gradient_kernel(
    A, M, PARTS, STEP_SIZE, LAMBD, DSTEP, DLAMBD, n_parts, D, wants_step,
    STEP_STRIDE: tl.constexpr, LAMBD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """DSTEP, where wanted: sum_j A_jc M_jc - lambda_c s_c; DLAMBD: -eta_c s_c; s sums PARTS.

    One build does both: without A, Triton would lay tiles out, and so sum, in another way.
    """
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    s = _column_sums(PARTS, PARTS, n_parts, D, col, False, ROWS, COLS)
    step_size = tl.load(STEP_SIZE + col * STEP_STRIDE, mask=col < D, other=0.0).to(tl.float32)
    tl.store(DLAMBD + col, -step_size * s, mask=col < D)
    if wants_step:
        lambd = tl.load(LAMBD + col * LAMBD_STRIDE, mask=col < D, other=0.0).to(tl.float32)
        product = _column_sums(M, A, D, D, col, True, ROWS, COLS)
        tl.store(DSTEP + col, product - lambd * s, mask=col < D)


@triton.jit
def _column_sums(
    T, FACTOR, n_rows, D, col,
    PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """[COLS]: T (n_rows, D), times FACTOR where PRODUCT, summed over the rows in a fixed order."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, n_rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at = row.to(tl.int64) * D + col[None, :]
        inside = (row < n_rows) & (col[None, :] < D)
        t = tl.load(T + at, mask=inside, other=0.0)
        if PRODUCT:
            t *= tl.load(FACTOR + at, mask=inside, other=0.0).to(tl.float32)
        total += t
    return tl.sum(total, 0)


# ---- launchers


def apply_gram(
    x: Tensor, xc: Tensor, gram: Tensor, step_size: Tensor, lambd: Tensor, signed: bool
) -> Tensor:
    """act(x + eta (xc A))"""
    return _thresholded(x, _rows(xc), gram, step_size, lambd, signed)


def apply_weight(
    x: Tensor, xc: Tensor, weight: Tensor, step_size: Tensor, lambd: Tensor, signed: bool
) -> Tensor:
    """act(x + eta (xc - xc W^T) W)"""
    xc, wc = _rows(xc), weight.to(xc.dtype)
    residual = torch.empty_like(xc)
    _gemm(xc, xc, wc.mT, residual, alpha=-1.0)
    return _thresholded(x, residual, wc, step_size, lambd, signed)


def _thresholded(
    x: Tensor, a: Tensor, b: Tensor, step_size: Tensor, lambd: Tensor, signed: bool
) -> Tensor:
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, a.dtype), device=x.device)
    _gemm(
        x.contiguous(), a, b, y,
        alpha=step_size.contiguous(), threshold=lambd.contiguous(),
        act="soft" if signed else "relu",
    )  # fmt: skip
    return y


def backward(
    dy: Tensor,
    y: Tensor,
    xc: Tensor,
    weight: Tensor,
    gram: Tensor,
    step_size: Tensor,
    lambd: Tensor,
    x_dtype: torch.dtype,
    wants: list[bool],
) -> list[Tensor | None]:
    """Gradients of x, W, eta and lambda; with fewer tokens than columns by the library's GEMMs."""
    if gram.numel() == 0:
        return torch_kernels.backward(dy, y, xc, weight, gram, step_size, lambd, x_dtype, wants)
    wants_x, wants_weight, wants_step, wants_lambd = wants
    dy, step_size, lambd = dy.contiguous(), step_size.contiguous(), lambd.contiguous()
    g, parts = _mask_and_sum(dy, y, gram.dtype)
    dx = dw = dstep = dlambd = m = None
    if wants_x:
        scaled = torch.mul(gram, step_size, out=torch.empty_like(gram))
        dx = _masked_gradient(dy, y, g, scaled, "nonzero").to(x_dtype)
    if wants_weight or wants_step:
        m = sum_over_tokens(xc, g, torch.float32)
    if wants_weight and m is not None:
        dw = _weight_gradient_of(m * step_size, weight, 1.0, xc.dtype)
    if wants_step or wants_lambd:
        columns = _threshold_gradients(gram, m, parts, step_size, lambd, wants_step)
        dstep = columns[0].sum_to_size(step_size.shape).to(step_size.dtype)
        dlambd = columns[1].sum_to_size(lambd.shape).to(lambd.dtype)
    return [dx, dw, dstep, dlambd]


def _mask_and_sum(dy: Tensor, y: Tensor, c_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """g shaped as dy in ``c_dtype``, and the parts of s, (parts, D) in float32."""
    d = dy.shape[-1]
    n_rows = dy.numel() // d
    g = torch.empty(dy.shape, dtype=c_dtype, device=dy.device)
    parts = torch.empty(triton.cdiv(n_rows, ROWS), d, dtype=torch.float32, device=dy.device)
    cols = min(128, triton.next_power_of_2(d))
    with on_device_of(dy):
        mask_and_sum_kernel[(parts.shape[0] * triton.cdiv(d, cols),)](
            dy, y, g, parts, n_rows, d, ROWS=ROWS, STEP=16, COLS=cols, num_warps=4
        )
    return g, parts


def _threshold_gradients(
    gram: Tensor,
    m: Tensor | None,
    parts: Tensor,
    step_size: Tensor,
    lambd: Tensor,
    wants_step: bool,
) -> tuple[Tensor, Tensor]:
    """d eta (only where wanted: otherwise undefined) and d lambda by column, (D,) in float32."""
    d = parts.shape[1]
    dstep, dlambd = (torch.empty(d, dtype=torch.float32, device=parts.device) for _ in range(2))
    with on_device_of(parts):
        threshold_gradient_kernel[(triton.cdiv(d, 32),)](
            gram, parts if m is None else m, parts, step_size, lambd, dstep, dlambd,
            parts.shape[0], d, int(wants_step),
            STEP_STRIDE=0 if step_size.numel() == 1 else 1,
            LAMBD_STRIDE=0 if lambd.numel() == 1 else 1,
            ROWS=128, COLS=32, num_warps=4,
        )  # fmt: skip
    return dstep, dlambd
