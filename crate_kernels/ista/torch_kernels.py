"""The "reference" backend of ISTA: torch's own GEMMs, on any device and dtype.

``gram`` is G = eta (W - W^T W); ``xc`` is x in the dtype of the GEMM.
"""

from __future__ import annotations

import torch
from torch import Tensor


def make_gram(
    weight: Tensor, step_size: float, dtype: torch.dtype, wc: Tensor | None = None
) -> Tensor:
    """G (D, D) in ``dtype``, computed in the weight's own. wc: the weight in ``dtype``, if there is
    one, for the kernels that multiply in it."""
    return torch.addmm(weight, weight.mT, weight, beta=step_size, alpha=-step_size).to(dtype)


def refresh_gram(weight: Tensor, seen: Tensor, gram: Tensor, step_size: float) -> None:
    """Make ``gram`` again where ``weight`` is no longer ``seen``, and note it there."""
    if not torch.equal(weight, seen):
        gram.copy_(make_gram(weight, step_size, gram.dtype))
        seen.copy_(weight)


def apply_gram(x: Tensor, xc: Tensor, gram: Tensor, threshold: float) -> Tensor:
    """relu(x + xc G - threshold)"""
    return _add_gemm(x, xc, gram, minus=threshold).relu_()


def apply_weight(
    x: Tensor, xc: Tensor, weight: Tensor, step_size: float, threshold: float
) -> Tensor:
    """relu(x + eta (xc - xc W^T) W - threshold)"""
    weight = weight.to(xc.dtype)
    residual = _add_gemm(xc, xc, weight.mT, alpha=-1.0)
    return _add_gemm(x, residual, weight, alpha=step_size, minus=threshold).relu_()


def input_gradient(
    dy: Tensor, y: Tensor, gram: Tensor, wants_x: bool = True, wants_g: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dx = g + g G^T in the dtype of dy, and g = dy * 1[y > 0] in that of G."""
    g = torch.ops.aten.threshold_backward(dy, y, 0)
    gc = g.to(gram.dtype)
    return (_add_gemm(g, gc, gram.mT) if wants_x else None), gc


def weight_gradient(
    xc: Tensor, g: Tensor, weight: Tensor, step_size: float, wc: Tensor | None = None
) -> Tensor:
    """dW = eta (M - W (M + M^T)), M = xc^T g over all tokens. wc as for make_gram."""
    m = (_rows(xc).mT @ _rows(g)).to(weight.dtype)
    return torch.addmm(m, weight, m + m.mT, beta=step_size, alpha=-step_size)


def backward_weight(
    dy: Tensor,
    y: Tensor,
    xc: Tensor,
    weight: Tensor,
    step_size: float,
    x_dtype: torch.dtype,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """With r = x - x W^T and dr = eta g W^T: dx = g + dr - dr W; dW = eta r^T g - dr^T x."""
    dx = dw = None
    wc = weight.to(xc.dtype)
    g = torch.ops.aten.threshold_backward(dy, y, 0)
    gc = g.to(xc.dtype)
    dr = step_size * (gc @ wc.mT)
    if wants_x:
        dx = _add_gemm(g + dr, dr, wc, alpha=-1.0).to(x_dtype)
    if wants_weight:
        residual = _add_gemm(xc, xc, wc.mT, alpha=-1.0)
        gc, dr, residual, rows = (_rows(t) for t in (gc, dr, residual, xc))
        dw = (step_size * (residual.mT @ gc) - dr.mT @ rows).to(weight.dtype)
    return dx, dw


def _add_gemm(c: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, minus: float = 0.0) -> Tensor:
    """c - minus + alpha a b over all leading dimensions, contiguous."""
    out = torch.sub(_rows(c), minus).contiguous()
    if a.dtype == c.dtype:
        out.addmm_(_rows(a), b, alpha=alpha)
    else:
        out.add_(_rows(a) @ b, alpha=alpha)
    return out.view(c.shape)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
