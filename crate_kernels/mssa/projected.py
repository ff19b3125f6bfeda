"""Tied attention and its output projection as one op, for the GEMM that makes dO and delta at once.

o_h = softmax(scale w_h w_h^T) w_h,  y = o W_out^T + b
dO = dy W_out, delta = rowsum(dO * O) of each head, db = sum dy    one GEMM of csrc/mssa
dW_out = dy^T o,  dw from dO and delta                             docs/mssa.md
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..library import define, define_gradient, sum_over_tokens, wide_dtype
from . import torch_kernels
from .masks import lse_shape


def attention_projected(
    w: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    heads: int,
    scale: float,
    causal: bool,
    backend: str,
) -> Tensor:
    """y (B, N, D) of w (B, N, heads*head_dim); w_out and b_out may be in another dtype than w."""
    y, *_ = torch.ops.crate_kernels.attention_projected(
        w, w_out, b_out, heads, scale, causal, backend
    )
    return y


def _forward(
    w: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and o and lse for the backward pass."""
    from .op import _kernels

    o, lse = _kernels(backend).forward(w, heads, scale, causal)
    bias = None if b_out is None else b_out.to(w.dtype)
    return F.linear(o, w_out.to(w.dtype), bias), o, lse


def _backward(
    dy: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    w_out: Tensor,
    wants: list[bool],
    heads: int,
    scale: float,
    causal: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of w, w_out and b_out; empty where not wanted."""
    from .op import _kernels

    wants_w, wants_weight, wants_bias = wants
    dw, dw_out, db_out = (w.new_empty(0) for _ in wants)
    kernels, dy, db = _kernels(backend), dy.contiguous(), None
    if wants_w and backend == "cuda":
        do, delta, db = kernels.output_gradient(dy, w_out.to(w.dtype), o, heads, wants_bias)
        dw = kernels.backward(do, w, o, lse, heads, scale, causal, delta)
    elif wants_w:
        dw = kernels.backward(dy @ w_out.to(w.dtype), w, o, lse, heads, scale, causal)
    if wants_weight:
        dw_out = sum_over_tokens(dy, o, w_out.dtype)
    if wants_bias:
        db_out = dy.flatten(0, -2).sum(0, dtype=wide_dtype(w.dtype)) if db is None else db
    return [dw, dw_out, db_out]


# ---- registration: crate_kernels::attention_projected and its backward


def _forward_fake(
    w: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = w.new_empty(lse_shape(w, heads), dtype=torch_kernels.lse_dtype(w))
    return w.new_empty(*w.shape[:-1], w_out.shape[0]), w.new_empty(w.shape), lse


def _backward_fake(
    dy: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    w_out: Tensor,
    wants: list[bool],
    heads: int,
    scale: float,
    causal: bool,
    backend: str,
) -> list[Tensor]:
    found = (
        w.new_empty(w.shape),
        w_out.new_empty(w_out.shape),
        w.new_empty(w_out.shape[0], dtype=wide_dtype(w.dtype)),
    )
    return [t if want else w.new_empty(0) for t, want in zip(found, wants, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    w, w_out, b_out, *ctx.options = inputs
    ctx.bias_dtype = None if b_out is None else b_out.dtype
    ctx.save_for_backward(w, *output[1:], w_out)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of the others no zeros are made


def _gradient(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    wants = list(ctx.needs_input_grad[:3])
    dw, dw_out, db_out = torch.ops.crate_kernels.attention_projected_backward(
        dy, *ctx.saved_tensors, wants, *ctx.options
    )
    return (
        dw if wants[0] else None,
        dw_out if wants[1] else None,
        db_out.to(ctx.bias_dtype) if wants[2] else None,
        *(None,) * 4,
    )


define(
    "attention_projected(Tensor w, Tensor w_out, Tensor? b_out, int heads, float scale,"
    " bool causal, str backend) -> (Tensor y, Tensor o, Tensor lse)",
    _forward,
    _forward_fake,
)
define(
    "attention_projected_backward(Tensor dy, Tensor w, Tensor o, Tensor lse, Tensor w_out,"
    " bool[] wants, int heads, float scale, bool causal, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
define_gradient("attention_projected", _gradient, _save, "mssa")
