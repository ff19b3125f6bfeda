"""A residual and the LayerNorm behind it, as CRATE-alpha has between its steps, arXiv 2405.20299,
and CRATE-MAE's decoder between its layers, with a minus sign, arXiv 2404.02446.

z = x + scale y,  h = gamma zhat + beta,  zhat = (z - mean) rstd
dx = dz + rstd (t - mean(t) - zhat mean(t zhat)),  t = gamma dh
dy = scale dx,  dscale = sum dx y,  dgamma = sum dh zhat,  dbeta = sum dh
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_number, check_tensors, refuse
from ..library import autocast_dtype, define, define_gradient, wide_dtype
from . import torch_kernels


def residual_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None = None,
    scale: Tensor | float | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""The sum z of a stream and what a step adds to it, and its LayerNorm h for the next step.

    .. math:: z = x + s \odot y, \qquad
              h = \gamma \odot \frac{z - \mathrm{mean}(z)}
                                     {\sqrt{\mathrm{var}(z) + \epsilon}} + \beta

    One pass over the rows, and one in the backward pass. Between two steps of CRATE-alpha nothing
    else is needed: h is what the next step takes, z what is added to its result. Between two layers
    of CRATE-MAE's decoder a result is subtracted: s is -1.

    Args:
        x: the stream (..., D), in a dtype of its own: float32 under autocast.
        weight, bias: gamma and beta, (D,).
        y: what is added, (..., D), in the dtype of the GEMM that made it; None: z is x.
        scale: s, (D,), LayerScale's factors, or a number, which is a constant of the kernels: they
            are compiled for each. None: 1. Only together with y.
        eps: epsilon > 0.
        backend: "auto", "triton" or "reference"; see :func:`crate_kernels.explain`.

    Returns:
        ``(z, h)``, both shaped as x. z is in the dtype that ``x + scale * y`` has, contiguous, and
        x itself without y. h is contiguous, in autocast's dtype where it is on, else in that of z.
        Sums and statistics are computed in float32 or better, z is rounded once, and h is of z
        before that. The backward pass keeps z, two numbers a row and, where scale has a gradient,
        y.

    Dtypes: float16, bfloat16, float32, float64 (by the reference backend). All the same with
    autocast off.

    Raises:
        ValueError: shapes, devices, eps, a scale that is not finite or without y, or a backend that
            do not fit.
        TypeError: not tensors, not floating, or of mixed dtypes with autocast off.

    Source: arXiv 2405.20299, 2404.02446. Derivation, bytes: docs/residual_norm.md.
    """
    _check(x, weight, bias, y, scale, eps)
    dtype = autocast_dtype(x)
    backend = backends.choose("residual_norm", backend, x, dtype, None)
    factors = scale if isinstance(scale, Tensor) else None
    factor = 1.0 if scale is None or isinstance(scale, Tensor) else float(scale)
    z, h, _ = torch.ops.crate_kernels.residual_norm(
        x, weight, bias, y, factors, factor, float(eps), dtype, backend
    )
    return (x if y is None else z), h


def explain_residual_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None = None,
    scale: Tensor | float | None = None,
    *,
    eps: float = 1e-5,
) -> backends.Explanation:
    """Which backends fit these arguments of :func:`residual_norm`, and why the others do not."""
    _check(x, weight, bias, y, scale, eps)
    return backends.explain("residual_norm", x, autocast_dtype(x), None)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None,
    scale: Tensor | float | None,
    eps: float,
) -> None:
    op = "residual_norm"
    given: Any = scale
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    factors = None if is_number else given
    check_tensors(op, {"x": x, "weight": weight, "bias": bias}, {"y": y, "scale": factors})
    if weight.dim() != 1 or weight.numel() == 0:
        refuse(op, "weight of shape (D,) with D > 0", tuple(weight.shape))
    d = weight.shape[0]
    if x.dim() < 1 or x.shape[-1] != d:
        refuse(op, f"x of shape (..., D) with D = {d}", tuple(x.shape))
    if bias.shape != (d,):
        refuse(op, f"bias of shape (D,) = {(d,)}", tuple(bias.shape))
    if y is not None and y.shape != x.shape:
        refuse(op, f"y of the shape of x, {tuple(x.shape)}", tuple(y.shape))
    if scale is not None and y is None:
        refuse(op, "scale only together with y", "scale without y")
    if factors is not None and factors.shape != (d,):
        refuse(op, f"scale of shape (D,) = {(d,)}", tuple(factors.shape))
    if is_number and not -math.inf < given < math.inf:
        refuse(op, "scale to be finite", given)
    check_number(op, "eps", eps, above_zero=True)


# ---- registration: crate_kernels::residual_norm and its backward


def _kernels(backend: str) -> Any:
    """The module that runs ``backend``; Triton is imported at the first launch, not before."""
    if backend == "triton":
        from . import triton_kernels

        return triton_kernels
    return torch_kernels


def _sum_dtype(x: Tensor, y: Tensor | None, scale: Tensor | None) -> torch.dtype:
    dtype = x.dtype
    for t in (y, scale):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    factor: float,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """z (empty without y), h and the statistics of the rows. ``factor`` is a scale that is a
    number; 1 where there is a tensor."""
    given = _contiguous(x, y, scale, weight, bias)
    options = (eps, _sum_dtype(x, y, scale), dtype, factor)
    z, h, stats = _kernels(backend).forward(*given, *options)
    return x.new_empty(0) if z is None else z, h, stats


def _backward(
    dz: Tensor | None,
    dh: Tensor,
    z: Tensor,
    stats: Tensor,
    weight: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    factor: float,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, ...]:
    """dx, dweight, dbias, dy, dscale: dy empty without a ``y_dtype``, dscale without y."""
    given = _contiguous(dz, dh, z, stats, weight, y, scale)
    dx, dy, *sums = _kernels(backend).backward(*given, x_dtype, y_dtype, factor)
    found = (dx, *sums[:2], dy, sums[2])
    return tuple(z.new_empty(0) if t is None else t for t in found)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    factor: float,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    z_dtype = _sum_dtype(x, y, scale)
    z = x.new_empty(0) if y is None else x.new_empty(x.shape, dtype=z_dtype)
    stats = (x.numel() // x.shape[-1], 2)
    wide = wide_dtype(z_dtype)
    return z, x.new_empty(x.shape, dtype=dtype), x.new_empty(stats, dtype=wide)


def _backward_fake(
    dz: Tensor | None,
    dh: Tensor,
    z: Tensor,
    stats: Tensor,
    weight: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    factor: float,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, ...]:
    dy = z.new_empty(0) if y_dtype is None else z.new_empty(z.shape, dtype=y_dtype)
    sums = [stats.new_empty(weight.shape) for _ in range(2 if y is None else 3)]
    dscale = z.new_empty(0) if y is None else sums[2]
    return z.new_empty(z.shape, dtype=x_dtype), *sums[:2], dy, dscale


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, y, scale, ctx.factor, _, ctx.h_dtype, ctx.backend = inputs
    z, _, stats = output
    ctx.x_dtype, ctx.bias_dtype = x.dtype, bias.dtype
    ctx.y_dtype = None if y is None else y.dtype
    kept = y if ctx.needs_input_grad[4] else None  # for dscale
    ctx.save_for_backward(x if y is None else z, stats, weight, kept, scale)
    ctx.mark_non_differentiable(stats, *([z] if y is None else []))
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, dz: Tensor | None, dh: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dz is None and dh is None:
        return (None,) * 9
    z, stats, weight, y, scale = ctx.saved_tensors
    wants = list(ctx.needs_input_grad)
    if dh is None:  # of a result that was not used, as its weight and bias
        dh, wants[1:3] = z.new_zeros(z.shape, dtype=ctx.h_dtype), (False, False)
    same = scale is None and ctx.factor == 1 and ctx.y_dtype == ctx.x_dtype  # dy is dx
    y_dtype = ctx.y_dtype if wants[3] and not same else None
    dx, dweight, dbias, dy, dscale = torch.ops.crate_kernels.residual_norm_backward(
        dz, dh, z, stats, weight, y, scale, ctx.factor, ctx.x_dtype, y_dtype, ctx.backend
    )
    return (
        dx if wants[0] else None,
        dweight.to(weight.dtype) if wants[1] else None,
        dbias.to(ctx.bias_dtype) if wants[2] else None,
        (dx if same else dy) if wants[3] else None,
        dscale.to(scale.dtype) if wants[4] else None,
        *(None,) * 4,
    )


define(
    "residual_norm(Tensor x, Tensor weight, Tensor bias, Tensor? y, Tensor? scale, float factor,"
    " float eps, ScalarType dtype, str backend) -> (Tensor z, Tensor h, Tensor stats)",
    _forward,
    _forward_fake,
)
define(
    "residual_norm_backward(Tensor? dz, Tensor dh, Tensor z, Tensor stats, Tensor weight,"
    " Tensor? y, Tensor? scale, float factor, ScalarType x_dtype, ScalarType? y_dtype, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dy, Tensor dscale)",
    _backward,
    _backward_fake,
)
define_gradient("residual_norm", _gradient, _save)
