"""ISTA step with a learned dictionary, White-Box Transformers, arXiv 2311.13110, section 2.

y = relu(x + eta (x W - x W^T W) - eta lambda)                        as published: 3 GEMMs
  = relu(x + x G - eta lambda),         G = eta (W - W^T W)           here: 1 GEMM
g = dy * 1[y > 0],  dx = g + g G^T,  M = x^T g,  dW = eta (M - W (M + M^T))

Here: eta and lambda as numbers. As tensors, and the signed threshold: learned/op.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_number, check_tensors, refuse
from ..cuda_extension import mask_bytes
from ..library import autocast_dtype, autocast_off, define, define_gradient
from . import torch_kernels
from .gram_cache import cached_gram, through_gram
from .learned.op import learned_ista


def ista(
    x: Tensor,
    weight: Tensor,
    *,
    step_size: float | Tensor = 0.1,
    lambd: float | Tensor = 0.1,
    signed: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""One ISTA step: a gradient step on the sparse code of x, then a soft threshold.

    .. math:: y = \mathrm{relu}(v - \eta \lambda), \qquad v = x + \eta (x W - x W^T W)

    and, where signed, :math:`y = \mathrm{sign}(v)\, \mathrm{relu}(|v| - \eta \lambda)`.
    In the paper's column form :math:`z + \eta D^T (z - D z)` with D = W. The kernels use
    :math:`G = \eta (W - W^T W)`, so that the tokens go through one GEMM instead of three; where
    there are fewer tokens than D, through two with W itself. Where no gradient is wanted, G is
    kept from one call to the next; each call compares W with the W that G was made from (on the
    device, bit by bit), so a changed weight is never missed.

    Args:
        x: tokens (..., D).
        weight: dictionary W (D, D), as the published FeedForward stores it.
        step_size: eta, a number >= 0; or a tensor, learned where it requires a gradient, of shape
            () or (1,), or of (D,) with an eta_c for each column of W.
        lambd: sparsity penalty lambda, a number >= 0 or a tensor as above.
        signed: keep codes of both signs.
        backend: "auto", "cuda", "triton" or "reference"; see :func:`crate_kernels.explain`.

    Returns:
        Shaped as x, contiguous. Under autocast the GEMM runs in autocast's dtype while x is
        added in its own, so the dtype is the published layer's: float32 for float32 x.

    Dtypes: float16, bfloat16, float32 (which honours ``torch.get_float32_matmul_precision()``),
    float64 (by the reference backend). Tensors of step_size and lambd may have another than x under
    autocast only, and have no say in that of y; they count in float32, or in float64 with x.

    The values of tensors are not checked, which would wait for the device: negative ones count as
    the formula has them (a threshold below zero keeps what relu would cut off). Such calls can be
    captured in a CUDA graph, and its replays see changed values. The CUDA backend takes numbers
    and unsigned thresholds only, "auto" then takes Triton.

    Raises:
        ValueError: shapes, devices, a negative number, or a backend that do not fit.
        TypeError: not tensors, not floating, or of mixed dtypes with autocast off.

    Source: arXiv 2311.13110, ISTA block (eq. 17 there). Derivation: docs/ista.md.
    """
    _check_ista(x, weight, step_size, lambd, signed)
    xc = x.detach().to(autocast_dtype(x))
    if signed or isinstance(step_size, Tensor) or isinstance(lambd, Tensor):
        options = _options(step_size, lambd, signed)
        backend = backends.choose("ista", backend, x, xc.dtype, None, options)
        return learned_ista(x, xc, weight, step_size, lambd, signed, backend)
    backend = backends.choose("ista", backend, x, xc.dtype, None)
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not wants_gradient and not torch.compiler.is_compiling():
        gram = cached_gram(weight, step_size, xc.dtype, _kernels(backend))
        if gram is not None:
            return torch.ops.crate_kernels.ista_apply(x, xc, gram, step_size * lambd, backend)
    y, _, _ = torch.ops.crate_kernels.ista(x, xc, weight, float(step_size), float(lambd), backend)
    return y


def gram_matrix(weight: Tensor, step_size: float, dtype: torch.dtype, backend: str) -> Tensor:
    """G = eta (W - W^T W), (D, D) in ``dtype``, by one of the backends; no gradient."""
    with torch.no_grad(), autocast_off(weight.device.type):
        return _kernels(backend).make_gram(weight, step_size, dtype)


def explain_ista(
    x: Tensor,
    weight: Tensor,
    *,
    step_size: float | Tensor = 0.1,
    lambd: float | Tensor = 0.1,
    signed: bool = False,
) -> backends.Explanation:
    """Which backends fit these arguments of :func:`ista`, and why the others do not."""
    _check_ista(x, weight, step_size, lambd, signed)
    options = _options(step_size, lambd, signed)
    return backends.explain("ista", x, autocast_dtype(x), None, options)


def _options(step_size: float | Tensor, lambd: float | Tensor, signed: bool) -> tuple[str, ...]:
    """The names of the options in use."""
    numbers = {"step_size": step_size, "lambd": lambd}
    tensors = [f"a tensor for {n}" for n, value in numbers.items() if isinstance(value, Tensor)]
    return (*tensors, "signed") if signed else tuple(tensors)


def _check_ista(
    x: Tensor, weight: Tensor, step_size: float | Tensor, lambd: float | Tensor, signed: bool
) -> None:
    numbers = {"step_size": step_size, "lambd": lambd}
    tensors = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
    check_tensors("ista", {"x": x, "weight": weight}, tensors)
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1] or weight.shape[0] == 0:
        refuse("ista", "weight of shape (D, D) with D > 0", tuple(weight.shape))
    if x.dim() < 1 or x.shape[-1] != weight.shape[0]:
        refuse("ista", f"x of shape (..., D) with D = {weight.shape[0]}", tuple(x.shape))
    if x.dim() > 2 and x.shape[-2] == 0:
        refuse("ista", "x of shape (..., N, D) with N > 0", tuple(x.shape))
    for name, value in numbers.items():
        if not isinstance(value, Tensor):
            check_number("ista", name, value)
        elif value.shape not in ((), (1,), weight.shape[:1]):
            expected = f"{name} a number or of shape (), (1,) or (D,) = ({weight.shape[0]},)"
            refuse("ista", expected, tuple(value.shape))
    if not isinstance(signed, bool):
        refuse("ista", "signed to be a bool", type(signed).__name__, TypeError)


# ---- registration: crate_kernels::ista, its backward, and the inference form with a ready G


def _kernels(backend: str) -> Any:
    """The module that runs ``backend``; Triton is imported at the first launch, not before."""
    if backend == "cuda":
        from . import cuda_kernels

        return cuda_kernels
    if backend == "triton":
        from . import triton_kernels

        return triton_kernels
    return torch_kernels


def _output_like(x: Tensor, xc: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, xc.dtype))


def _forward(
    x: Tensor, xc: Tensor, weight: Tensor, step_size: float, lambd: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels(backend)
    no_mask = xc.new_empty(0, dtype=torch.uint8)
    if not through_gram(x):
        y = kernels.apply_weight(x, xc, weight, step_size, step_size * lambd)
        return y, xc.new_empty(0, 0), no_mask
    gram = kernels.make_gram(weight, step_size, xc.dtype)
    if backend == "cuda":
        y, mask = kernels.apply_gram_and_mask(x, xc, gram, step_size * lambd)
        return y, gram, mask
    return kernels.apply_gram(x, xc, gram, step_size * lambd), gram, no_mask


def _forward_fake(
    x: Tensor, xc: Tensor, weight: Tensor, step_size: float, lambd: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    size = 0
    if backend == "cuda" and through_gram(x):
        size = mask_bytes(x.numel() // x.shape[-1], x.shape[-1])
    gram = xc.new_empty(weight.shape if through_gram(x) else (0, 0))
    return _output_like(x, xc), gram, xc.new_empty(size, dtype=torch.uint8)


def _backward(
    dy: Tensor,
    kept: Tensor,
    xc: Tensor,
    weight: Tensor,
    gram: Tensor,
    step_size: float,
    x_dtype: torch.dtype,
    wants_x: bool,
    wants_weight: bool,
    backend: str,
) -> tuple[Any, Any]:
    kernels, dx, dw = _kernels(backend), None, None
    if gram.numel() == 0:
        run = kernels.backward_weight
        dx, dw = run(dy, kept, xc, weight, step_size, x_dtype, wants_x, wants_weight)
    elif wants_x or wants_weight:
        dx, g = kernels.input_gradient(dy, kept, gram, wants_x, wants_weight)
        dx = dx.to(x_dtype) if wants_x else None
        dw = kernels.weight_gradient(xc, g, weight, step_size) if wants_weight else None
    empty = xc.new_empty(0)
    return (dx if wants_x else empty), (dw if wants_weight else empty.clone())


def _backward_fake(
    dy: Tensor,
    kept: Tensor,
    xc: Tensor,
    weight: Tensor,
    gram: Tensor,
    step_size: float,
    x_dtype: torch.dtype,
    wants_x: bool,
    wants_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dx = xc.new_empty(xc.shape, dtype=x_dtype) if wants_x else xc.new_empty(0)
    return dx, (weight.new_empty(weight.shape) if wants_weight else xc.new_empty(0))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, xc, weight, ctx.step_size, _, ctx.backend = inputs
    y, gram, mask = output
    ctx.x_dtype = x.dtype
    kept = mask if ctx.backend == "cuda" and through_gram(x) else y
    ctx.save_for_backward(kept, xc, weight, gram)
    ctx.mark_non_differentiable(gram, mask)
    ctx.set_materialize_grads(False)  # of the others no zeros are made


def _gradient(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    wants_x, _, wants_weight, *_ = ctx.needs_input_grad
    dx, dw = torch.ops.crate_kernels.ista_backward(
        dy, *ctx.saved_tensors, ctx.step_size, ctx.x_dtype, wants_x, wants_weight, ctx.backend
    )
    return (dx if wants_x else None), None, (dw if wants_weight else None), None, None, None


def _apply(x: Tensor, xc: Tensor, gram: Tensor, threshold: float, backend: str) -> Tensor:
    return _kernels(backend).apply_gram(x, xc, gram, threshold)


def _apply_fake(x: Tensor, xc: Tensor, gram: Tensor, threshold: float, backend: str) -> Tensor:
    return _output_like(x, xc)


# xc is x in the dtype of the GEMM (x itself where that is its own); all gradient goes to x. The
# mask has the bits of y > 0 where the backend keeps those for its backward pass; otherwise it is
# empty, and y is kept.
define(
    "ista(Tensor x, Tensor xc, Tensor weight, float step_size, float lambd, str backend)"
    " -> (Tensor y, Tensor gram, Tensor mask)",
    _forward,
    _forward_fake,
)
define(
    "ista_backward(Tensor dy, Tensor kept, Tensor xc, Tensor weight, Tensor gram, float step_size,"
    " ScalarType x_dtype, bool wants_x, bool wants_weight, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
define_gradient("ista", _gradient, _save)
define(
    "ista_apply(Tensor x, Tensor xc, Tensor gram, float threshold, str backend) -> Tensor",
    _apply,
    _apply_fake,
)
