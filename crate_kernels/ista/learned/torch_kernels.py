"""The "reference" backend of ista_learned: torch's own GEMMs, on any device and dtype.

``gram`` is A = W - W^T W; ``xc`` is x in the dtype of the GEMM; step_size and lambd are tensors of
one element or of (D,). Thresholds and sums are computed in float32 or better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...library import sum_over_tokens
from ..torch_kernels import _add_gemm, _rows


def apply_gram(
    x: Tensor, xc: Tensor, gram: Tensor, step_size: Tensor, lambd: Tensor, signed: bool
) -> Tensor:
    """act(x + eta (xc A))"""
    return _thresholded(x, _rows(xc) @ gram, step_size, lambd, signed)


def apply_weight(
    x: Tensor, xc: Tensor, weight: Tensor, step_size: Tensor, lambd: Tensor, signed: bool
) -> Tensor:
    """act(x + eta (xc - xc W^T) W)"""
    wc = weight.to(xc.dtype)
    residual = _add_gemm(xc, xc, wc.mT, alpha=-1.0)
    return _thresholded(x, _rows(residual) @ wc, step_size, lambd, signed)


def _thresholded(
    x: Tensor, update: Tensor, step_size: Tensor, lambd: Tensor, signed: bool
) -> Tensor:
    """relu(v - eta lambda) or sign(v) relu(|v| - eta lambda), v = x + eta update."""
    dtype = torch.promote_types(x.dtype, update.dtype)
    wide = _wide(dtype)
    step_size, lambd = step_size.to(wide), lambd.to(wide)
    threshold = step_size * lambd
    v = torch.addcmul(_rows(x).to(wide), step_size, update.to(wide))
    size = (v.abs() if signed else v).sub_(threshold).relu_()
    y = size.mul_(v.sign()) if signed else size
    return y.to(dtype).contiguous().view(x.shape)


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
    """Gradients of x, W, eta and lambda; an empty ``gram`` stands for too few tokens to have one.

    By A:  dx = g + (g eta) A^T      M = x^T g                     dW = N - W (N + N^T)
    by W:  dx = g + dr - dr W        M = r^T g, r = x - x W^T      dW = N - dr^T x
    with   g = dy where y != 0       N = M diag(eta)               dr = (g eta) W^T
    """
    wants_x, wants_weight, wants_step, _ = wants
    g = torch.where(y == 0, 0, dy)
    gc, wide = g.to(xc.dtype), _wide(xc.dtype)
    dx = dw = None
    if gram.numel() > 0:
        matrix, tokens = gram, xc
        if wants_x:
            dx = _add_gemm(g, gc, (gram * step_size).to(gram.dtype).mT).to(x_dtype)
    else:
        matrix = wc = weight.to(xc.dtype)
        tokens = _add_gemm(xc, xc, wc.mT, alpha=-1.0)
        dr = (gc * step_size).to(gc.dtype) @ wc.mT
        if wants_x:
            dx = _add_gemm(g + dr, dr, wc, alpha=-1.0).to(x_dtype)
    m = sum_over_tokens(tokens, gc, wide) if wants_weight or wants_step else None
    if wants_weight and m is not None:
        n = m * step_size
        if gram.numel() > 0:
            dw = torch.addmm(n, weight.to(wide), n + n.mT, alpha=-1.0).to(weight.dtype)
        else:
            dw = (n - sum_over_tokens(dr, xc, wide)).to(weight.dtype)
    dstep, dlambd = _threshold_gradients(g, y, matrix, m, step_size, lambd, wants[2:])
    return [dx, dw, dstep, dlambd]


def _threshold_gradients(
    g: Tensor,
    y: Tensor,
    matrix: Tensor,
    m: Tensor | None,
    step_size: Tensor,
    lambd: Tensor,
    wants: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """d eta_c = sum_j A_jc M_jc - lambda_c s_c, d lambda = -eta s, s = sum g sign(y)."""
    if not any(wants):
        return None, None
    wide = _wide(g.dtype)
    s = _rows(g * y.sign()).sum(0, dtype=wide)
    dstep = dlambd = None
    if m is not None and wants[0]:
        d_column = (matrix * m).sum(0) - lambd * s
        dstep = d_column.sum_to_size(step_size.shape).to(step_size.dtype)
    if wants[1]:
        dlambd = (-step_size * s).sum_to_size(lambd.shape).to(lambd.dtype)
    return dstep, dlambd


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
