"""A step, fn(norm(x)), and the sum before it: what AlphaEncoder and Decoder run as one op each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..residual_norm.op import residual_norm
from .encoder import Layers, step_reason
from .layers import (
    MSSA,
    AlphaStep,
    log_once,
    reason_against_dtypes,
    reason_against_modules,
    unfused_reason,
)

Kinds = tuple[type[nn.Module], ...]
_SCALE = frozenset({"layer_scale"})


def run_step(
    owner: Layers,
    side: str,
    step: Any,
    kinds: Kinds,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The stream x + scale y, what ``step`` makes of it, and the factor of that.

    ``kinds``: what its fn may be.
    """
    reason = unfused_step_reason(side, step, kinds, owner._steps, (x, y, scale))
    if reason is None:
        norm = step.norm
        z, h = residual_norm(x, norm.weight, norm.bias, y, scale, eps=norm.eps)
        return z, step.fn(h), _scale_of(step)
    if not torch.compiler.is_compiling():
        log_once(f"{type(owner).__name__}: a step runs unfused: {reason}")
    z = added(x, y, scale)
    return z, step(z), None


def normed(owner: str, name: str, norm: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
    """norm(x + y) by :func:`residual_norm`, in autocast's dtype, or by calling the norm where that
    would pass over something: the log names the reason once, and whose norm it is."""
    reason = reason_against_fused_norms(x, ((name, norm, nn.LayerNorm),))
    if reason is None:
        return residual_norm(x, norm.weight, norm.bias, y, eps=norm.eps)[1]
    if not torch.compiler.is_compiling():
        log_once(f"a norm of {owner} runs unfused: {reason}")
    h: Tensor = norm(x if y is None else x + y)
    return h


def reason_against_fused_norms(
    x: Tensor, modules: Sequence[tuple[str, Any, type[nn.Module]]]
) -> str | None:
    """Why the norms among named ``modules`` must be called (on x) right now; None if they need not.

    ``modules`` are all that would not be called otherwise, each with the class it should have.
    """
    if _has_any_global_hook():
        return "hooks on all modules are registered"
    reason = reason_against_modules(modules)
    if reason is not None:
        return reason
    norms = [module for _, module, kind in modules if kind is nn.LayerNorm]
    for norm in norms:
        if norm.weight is None or norm.bias is None or norm.eps <= 0:
            return "a norm has no weight, no bias or an eps of 0"
        if norm.weight.shape != x.shape[-1:]:
            return "a norm is not over the last dimension alone"
    return reason_against_dtypes(x, *(t for norm in norms for t in (norm.weight, norm.bias)))


def added(x: Tensor, y: Tensor | None, scale: Tensor | float | None) -> Tensor:
    """x + scale y."""
    if y is None:
        return x
    if isinstance(scale, Tensor):
        return y * scale + x
    return torch.add(x, y, alpha=1 if scale is None else scale)


def _scale_of(step: Any) -> Tensor | None:
    """Only of an AlphaStep: others do not use what they may have by that name."""
    scale: Any = step.layer_scale if type(step) is AlphaStep else None
    return scale


def unfused_step_reason(
    side: str,
    step: Any,
    kinds: Kinds,
    known: Kinds,
    stream: tuple[Tensor | float | None, ...] = (),
) -> str | None:
    """Why a step must run as it is (on the stream's x, y and scale) right now; None if it need not.

    ``known`` are the classes of steps that compute fn(norm(x)), or are AlphaStep.
    """
    if _has_any_global_hook():
        return "hooks on all modules are registered"
    is_known = any(type(step) is cls for cls in known)
    more = _SCALE if type(step) is AlphaStep else frozenset()
    reason = step_reason(side, step, kinds, is_known, more)
    if reason is None and kinds == (MSSA,):
        reason = unfused_reason(step.fn)
    if reason is not None:
        return reason
    norm = step.norm
    if norm.eps <= 0:
        return f"the eps of its {side} norm is not > 0: {norm.eps:g}"
    if type(step) is AlphaStep:
        if step.training and step.drop_path > 0:
            return f"DropPath {step.drop_path:g} is active while training"
        scale = _scale_of(step)
        if scale is not None and scale.shape != norm.weight.shape:
            return f"the layer_scale of its {side} step is not of shape (D,)"
    given = [t for t in stream if isinstance(t, Tensor)]
    return reason_against_dtypes(*given, norm.weight, norm.bias) if given else None
