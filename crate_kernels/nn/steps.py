"""A step, fn(norm(x)), and the sum before it: what AlphaEncoder and Decoder run as one op each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..residual_norm.op import residual_norm
from .encoder import Layers, norm_reason, step_reason
from .layers import (
    MSSA,
    AlphaStep,
    is_called_plainly,
    log_once,
    reason_against_dtypes,
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


def normed(norm: Any, x: Tensor) -> Tensor:
    """norm(x), where it is a plain LayerNorm in the dtype that a GEMM takes it in."""
    fits = norm_reason(norm) is None and is_called_plainly(norm) and norm.eps > 0
    if not fits or reason_against_dtypes(x, norm.weight, norm.bias) is not None:
        y: Tensor = norm(x)
        return y
    return residual_norm(x, norm.weight, norm.bias, eps=norm.eps)[1]


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
