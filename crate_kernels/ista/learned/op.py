"""ISTA with a step size or threshold in a tensor, or with the signed soft threshold.

A = W - W^T W,  v = x + eta x A,  eta and lambda: one number, or one for each column
y = relu(v - eta lambda);  where signed, y = sign(v) relu(|v| - eta lambda)
g = dy * 1[y != 0],  M = x^T g,  N = M diag(eta),  s = sum over tokens of g sign(y)
dx = g + (g eta) A^T,  dW = N - W (N + N^T),  d eta_c = sum_j A_jc M_jc - lambda_c s_c,
d lambda_c = -eta_c s_c

An op of its own beside crate_kernels::ista, whose calls stay as cheap as they are. Everything that
depends on eta and lambda happens on the device: nothing waits for their values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...library import define, define_gradient
from .. import torch_kernels as base_torch_kernels
from ..gram_cache import cached_gram, through_gram
from . import torch_kernels


def learned_ista(
    x: Tensor,
    xc: Tensor,
    weight: Tensor,
    step_size: float | Tensor,
    lambd: float | Tensor,
    signed: bool,
    backend: str,
) -> Tensor:
    """y by ``backend``, "triton" or "reference"; xc is x in the dtype of the GEMM."""
    step_size, lambd = _tensor(step_size, x), _tensor(lambd, x)
    wants_gradient = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, weight, step_size, lambd)
    )
    if not wants_gradient and not torch.compiler.is_compiling():
        gram = cached_gram(weight, 1.0, xc.dtype, _kernels(backend)[0])
        if gram is not None:
            return torch.ops.crate_kernels.ista_learned_apply(
                x, xc, gram, step_size, lambd, signed, backend
            )
    y, _ = torch.ops.crate_kernels.ista_learned(x, xc, weight, step_size, lambd, signed, backend)
    return y


def _tensor(value: float | Tensor, x: Tensor) -> Tensor:
    """A number as (1,) where x is, filled there."""
    if isinstance(value, Tensor):
        return value
    return x.new_full((1,), value, dtype=torch.promote_types(x.dtype, torch.float32))


# ---- registration: crate_kernels::ista_learned, its backward, the inference form with a ready A


def _kernels(backend: str) -> tuple[Any, Any]:
    """The modules that make A and that run the rest; Triton is imported at the first launch."""
    if backend == "triton":
        from .. import triton_kernels as base_triton_kernels
        from . import triton_kernels

        return base_triton_kernels, triton_kernels
    return base_torch_kernels, torch_kernels


def _output_like(x: Tensor, xc: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, xc.dtype))


def _forward(
    x: Tensor,
    xc: Tensor,
    weight: Tensor,
    step_size: Tensor,
    lambd: Tensor,
    signed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    base, kernels = _kernels(backend)
    if not through_gram(x):
        y = kernels.apply_weight(x, xc, weight, step_size, lambd, signed)
        return y, xc.new_empty(0, 0)
    gram = base.make_gram(weight, 1.0, xc.dtype)
    return kernels.apply_gram(x, xc, gram, step_size, lambd, signed), gram


def _forward_fake(
    x: Tensor,
    xc: Tensor,
    weight: Tensor,
    step_size: Tensor,
    lambd: Tensor,
    signed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _output_like(x, xc), xc.new_empty(weight.shape if through_gram(x) else (0, 0))


def _backward(
    dy: Tensor,
    y: Tensor,
    xc: Tensor,
    weight: Tensor,
    gram: Tensor,
    step_size: Tensor,
    lambd: Tensor,
    x_dtype: torch.dtype,
    wants: list[bool],
    backend: str,
) -> list[Tensor]:
    found = _kernels(backend)[1].backward(dy, y, xc, weight, gram, step_size, lambd, x_dtype, wants)
    return [t if want else xc.new_empty(0) for t, want in zip(found, wants, strict=True)]


def _backward_fake(
    dy: Tensor,
    y: Tensor,
    xc: Tensor,
    weight: Tensor,
    gram: Tensor,
    step_size: Tensor,
    lambd: Tensor,
    x_dtype: torch.dtype,
    wants: list[bool],
    backend: str,
) -> list[Tensor]:
    dx = xc.new_empty(xc.shape, dtype=x_dtype)
    found = [dx, *(t.new_empty(t.shape) for t in (weight, step_size, lambd))]
    return [t if want else xc.new_empty(0) for t, want in zip(found, wants, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, xc, weight, step_size, lambd, _, ctx.backend = inputs
    y, gram = output
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(y, xc, weight, gram, step_size, lambd)
    ctx.mark_non_differentiable(gram)
    ctx.set_materialize_grads(False)  # of G no zeros are made


def _gradient(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    wants_x, _, *wants_parameters = ctx.needs_input_grad[:5]
    wants = [wants_x, *wants_parameters]
    found = torch.ops.crate_kernels.ista_learned_backward(
        dy, *ctx.saved_tensors, ctx.x_dtype, wants, ctx.backend
    )
    dx, *gradients = [t if want else None for t, want in zip(found, wants, strict=True)]
    return dx, None, *gradients, None, None


def _apply(
    x: Tensor,
    xc: Tensor,
    gram: Tensor,
    step_size: Tensor,
    lambd: Tensor,
    signed: bool,
    backend: str,
) -> Tensor:
    return _kernels(backend)[1].apply_gram(x, xc, gram, step_size, lambd, signed)


def _apply_fake(x: Tensor, xc: Tensor, *_: Any) -> Tensor:
    return _output_like(x, xc)


# gram is A, without the step size, so that it is the weight's alone: only that is compared with
# the cached one's. It is empty where there are fewer tokens than columns.
define(
    "ista_learned(Tensor x, Tensor xc, Tensor weight, Tensor step_size, Tensor lambd, bool signed,"
    " str backend) -> (Tensor y, Tensor gram)",
    _forward,
    _forward_fake,
)
define(
    "ista_learned_backward(Tensor dy, Tensor y, Tensor xc, Tensor weight, Tensor gram,"
    " Tensor step_size, Tensor lambd, ScalarType x_dtype, bool[] wants, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
define_gradient("ista_learned", _gradient, _save, public="ista")
define(
    "ista_learned_apply(Tensor x, Tensor xc, Tensor gram, Tensor step_size, Tensor lambd,"
    " bool signed, str backend) -> Tensor",
    _apply,
    _apply_fake,
)
