"""A layer of CRATE-MAE's decoder as one op, arXiv 2404.02446: crate_block's steps undone.

h = LN2(x) A^T,  y = h - MSSA(LN1(h))
The passes in order, with what each reads and writes of (rows, D) tensors between the GEMMs, where
these norm their products (block/op.py) and have the residual:
    forward   x -> h | h -> its statistics | h -> w | o = attention(w) | o, h -> y and its moments
    backward  do = -dy V | dw = attention'(do) | dn = dw U | dn, h, dy -> dh, n = LN1(h), sum dy
              | dn = dh A | dn, x -> dx, n = LN2(x) | and the weights' gradients from o and n
V and b are negated once, before the weights are rounded: the kernels are then crate_block's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_number
from ..cuda_extension import moments_shape
from ..library import autocast_dtype, define, define_gradient, sum_over_tokens, wide_dtype
from ..mssa.op import _check_options, _kernels
from .op import PARAMETERS, _can_norm_products, _check_block, _in_gemm_dtype, _project, _rows


def decoder_block(
    x: Tensor,
    moments: Tensor | None,
    *parameters: Tensor | None,
    heads: int,
    scale: float,
    eps: float,
    memory: str = "default",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""``h = LN_2(x) A^T, y = h - MSSA(LN_1(h))``: y, and the moments of its rows (or an empty
    tensor), which the next layer takes with it.

    Args:
        x: tokens (B, N, D).
        moments: those that came with x; None or empty where there are none.
        parameters: those of PARAMETERS, in order and shaped as there; weight is the dictionary A,
            w_out is not None.
        heads, scale: of :func:`crate_kernels.mssa`.
        eps: of both norms, > 0.
        memory: "default" or "low", what is kept for the backward pass, in tensors of B*N*D
            elements: x, h, w and o, or these without w, which one more GEMM makes again. The normed
            tokens are made again in passes that run anyway. x is the y of the layer before.
        backend: as in :func:`crate_kernels.crate_block`.

    Returns:
        y (B, N, D), contiguous, in the dtype the GEMMs run in: autocast's where it is on, else that
        of x; and the moments.

    Raises:
        ValueError: shapes, devices, heads or a backend that do not fit.
        TypeError: not tensors, not floating, or of mixed dtypes with autocast off.
    """
    _check_block(x, parameters, heads, "decoder_block")
    _check_options("decoder_block", scale, False)
    check_number("decoder_block", "eps", eps, above_zero=True)
    dtype, w_qkv = autocast_dtype(x), parameters[PARAMETERS.index("w_qkv")]
    assert w_qkv is not None
    head_dim = w_qkv.shape[0] // heads
    backend = backends.choose("decoder_block", backend, x, dtype, head_dim)
    y, moments, *_ = torch.ops.crate_kernels.decoder_block(
        x, *parameters, moments, dtype, heads, float(scale), float(eps), memory, backend
    )
    return y, moments


def _forward(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    w_qkv: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    moments: Tensor | None,
    dtype: torch.dtype,
    heads: int,
    scale: float,
    eps: float,
    memory: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """y and its moments, then what the backward pass needs: xc, stats2, h, stats1, w, o, lse, and
    the weights in ``dtype``."""
    rows, kernels = _rows(backend, backend), _kernels(backend)
    given, x = x, x.contiguous()
    norm1, norm2 = (norm1_weight, norm1_bias), (norm2_weight, norm2_bias)
    flat = rows.rounded(w_qkv, -w_out, weight, dtype)
    wc_qkv, minus_out, wc = _in_gemm_dtype(flat, w_qkv, w_out, weight)
    minus_bias = None if b_out is None else -b_out
    options = (eps, dtype, rows, backend)
    xc, n, h, stats2 = _project(x, moments, None, norm2, weight, wc, (), *options)
    del n
    _, n, w, stats1 = _project(h, None, None, norm1, w_qkv, wc_qkv, (), *options)
    del n
    o, lse = kernels.forward(w, heads, scale, False)
    if x.numel() > 0 and _can_norm_products(x.shape[-1], w_out, backend, backend):
        y, moments = kernels.residual_projection(o, h, minus_out, minus_bias)
    else:
        bias = None if minus_bias is None else minus_bias.to(dtype)
        y = h + torch.nn.functional.linear(o, minus_out, bias)
        moments = x.new_empty(0, dtype=torch.float32)
    if memory == "low":
        w = x.new_empty(0, dtype=dtype)
    xc = x.new_empty(0, dtype=dtype) if xc is given else xc
    return y, moments, xc, stats2, h, stats1, w, o, lse, flat


def _backward(
    dy: Tensor,
    xc: Tensor,
    stats2: Tensor,
    h: Tensor,
    stats1: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    flat: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    w_qkv: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    wants: list[bool],
    heads: int,
    scale: float,
    eps: float,
    memory: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of x and of the parameters, in order; empty where not wanted."""
    rows, kernels, dy = _rows(backend, backend), _kernels(backend), dy.contiguous()
    wanted = dict(zip(("x", *PARAMETERS), wants, strict=True))
    wc_qkv, minus_out, wc = _in_gemm_dtype(flat, w_qkv, w_out, weight)
    norm1, norm2 = (norm1_weight, norm1_bias), (norm2_weight, norm2_bias)
    dw_qkv = dw_out = dweight = None
    sums = {}
    if backend == "cuda":
        do, sums["delta"], _ = kernels.output_gradient(dy, minus_out, o, heads)
    else:
        do = dy @ minus_out
    if wanted["w_out"]:
        dw_out = sum_over_tokens(dy, o, w_out.dtype).neg_()
    if memory == "low":
        _, _, w, _ = _project(
            h, None, stats1, norm1, w_qkv, wc_qkv, (), eps, h.dtype, rows, backend
        )
    dw = kernels.backward(do, w, o, lse, heads, scale, False, **sums)
    del do, w, o, sums
    # n is a norm's result, made again, and dn its gradient.
    dn = dw @ wc_qkv
    dh, n, dnorm1_weight, dnorm1_bias, sum_dy = rows.normalise_backward(
        dn, h, stats1, *norm1, dy, wanted["w_qkv"], wanted["b_out"]
    )
    db_out = None if sum_dy is None else -sum_dy
    if wanted["w_qkv"]:
        dw_qkv = sum_over_tokens(dw, n, w_qkv.dtype)
    del dw, h
    dn = dh @ wc
    dx, n, dnorm2_weight, dnorm2_bias, _ = rows.normalise_backward(
        dn, xc, stats2, *norm2, None, wanted["weight"], False
    )
    if wanted["weight"]:
        dweight = sum_over_tokens(dh, n, weight.dtype)
    found = (
        dx, dnorm1_weight, dnorm1_bias, dw_qkv, dw_out, db_out, dnorm2_weight, dnorm2_bias, dweight
    )  # fmt: skip
    leaves = (
        xc, norm1_weight, norm1_bias, w_qkv, w_out, b_out, norm2_weight, norm2_bias, weight
    )  # fmt: skip
    return [
        t.to(leaf.dtype) if want and t is not None and leaf is not None else xc.new_empty(0)
        for t, leaf, want in zip(found, leaves, wants, strict=True)
    ]


# ---- registration: crate_kernels::decoder_block and its backward


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, w_qkv, w_out, _, _, _, weight, _, dtype, heads, *_, memory, backend = rest
    n_rows, d = x.shape[0] * x.shape[1], x.shape[2]

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    by_moments = _can_norm_products(d, w_out, backend, backend) and x.numel() > 0
    moments = new(*(moments_shape(n_rows, d) if by_moments else (0,)), dtype=torch.float32)
    xc = new(0) if x.dtype == dtype and x.is_contiguous() else new(*x.shape)
    inner = (*x.shape[:2], w_qkv.shape[0])
    stats1, stats2 = (new(n_rows, 2, dtype=wide_dtype(dtype)) for _ in range(2))
    lse = new(x.shape[0], heads, x.shape[1], dtype=wide_dtype(dtype))
    w = new(0) if memory == "low" else new(*inner)
    flat = new(w_qkv.numel() + w_out.numel() + weight.numel())
    return (
        new(*x.shape), moments, xc, stats2, new(*x.shape), stats1, w, new(*inner), lse, flat
    )  # fmt: skip


def _backward_fake(dy: Tensor, xc: Tensor, *rest: Any) -> list[Tensor]:
    parameters, wants = rest[7:15], rest[15]
    return [
        t.new_empty(t.shape) if want and t is not None else xc.new_empty(0)
        for t, want in zip((xc, *parameters), wants, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters = inputs[:9]
    _, _, xc, *kept = output
    ctx.x_dtype, ctx.options = x.dtype, inputs[11:]  # all but moments and dtype
    # An empty xc stands for x itself.
    ctx.save_for_backward(x if xc.shape != x.shape else xc, *kept, *parameters)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of the others no zeros are made


def _gradient(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 16
    wants = list(ctx.needs_input_grad[:9])
    found = torch.ops.crate_kernels.decoder_block_backward(
        dy, *ctx.saved_tensors, wants, *ctx.options
    )
    gradients = [g if want else None for g, want in zip(found, wants, strict=True)]
    if gradients[0] is not None:
        gradients[0] = gradients[0].to(ctx.x_dtype)
    return (*gradients, *(None for _ in range(7)))


_GIVEN = (
    " Tensor norm1_weight, Tensor norm1_bias, Tensor w_qkv, Tensor w_out, Tensor? b_out,"
    " Tensor norm2_weight, Tensor norm2_bias, Tensor weight,"
)
define(
    f"decoder_block(Tensor x,{_GIVEN} Tensor? moments, ScalarType dtype, int heads, float scale,"
    " float eps, str memory, str backend) -> (Tensor y, Tensor y_moments, Tensor xc,"
    " Tensor stats2, Tensor h, Tensor stats1, Tensor w, Tensor o, Tensor lse, Tensor flat)",
    _forward,
    _forward_fake,
)
define(
    "decoder_block_backward(Tensor dy, Tensor xc, Tensor stats2, Tensor h, Tensor stats1,"
    f" Tensor w, Tensor o, Tensor lse, Tensor flat,{_GIVEN} bool[] wants, int heads, float scale,"
    " float eps, str memory, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
define_gradient("decoder_block", _gradient, _save)
