"""The encoder of CRATE-alpha on :func:`crate_kernels.residual_norm`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..checks import refuse
from ..library import autocast_is_on
from ..residual_norm.op import residual_norm
from .encoder import Layers, step_reason
from .encoder_recognition import published_alpha_forward, reason_against_alpha_step
from .layers import MSSA, AlphaStep, OvercompleteISTA, log_once, unfused_reason
from .recognition import Verdicts

_SCALE = frozenset({"layer_scale"})


class AlphaEncoder(Layers):
    r"""A stack of CRATE-alpha layers, ``x = x + s1 MSSA(LN(x))``, ``x = x + s2 ISTA(LN(x))``.

    A step's addition and the norm of the next are one :func:`crate_kernels.residual_norm`; MSSA and
    ISTA run as by themselves. A step runs as its modules, called one by one, where that would pass
    over something: a hook on it, its norm or its fn; a norm that is no plain affine LayerNorm, or
    of another dtype without autocast; an active DropPath; a step of a class that was not there
    before; and where its MSSA runs unfused, so that all in there see what they would. The log names
    each such reason once.

    Args:
        layers: pairs of steps with children ``norm`` and ``fn``, :class:`AlphaStep` or others that
            compute ``fn(norm(x))``; the first's fn an :class:`MSSA`, the second's an
            :class:`OvercompleteISTA`.

    x is (B, N, D). Returns the dtype that the published modules would: the stream stays in its own,
    float32 under autocast, and what is added to it is in autocast's.

    Raises:
        ValueError: a step is neither.

    Keys: ``layers.{i}.0.*`` (MSSA) and ``layers.{i}.1.*`` (ISTA).

    Source: arXiv 2405.20299.
    """

    def __init__(self, layers: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__(layers)
        seen: Verdicts = {}
        for step in self._all_steps():
            reason = reason_against_alpha_step(step, seen)
            if reason is not None:
                expected = "steps that compute fn(norm(x)) or are an AlphaStep"
                refuse("AlphaEncoder", expected, f"one where {reason}")
        self.know_steps()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> the same."""
        layers: Any = self.layers
        y = scale = before = None  # x + scale y is the stream
        for i, (attn, ff) in enumerate(layers):
            z, y, scale = self._step("attention", attn, MSSA, x, y, scale)
            self._observe(i - 1, before, z)
            x, y, scale = self._step("dictionary", ff, OvercompleteISTA, z, y, scale)
            before = z
        x = _added(x, y, scale)
        self._observe(len(layers) - 1, before, x)
        return x

    def _step(
        self,
        side: str,
        step: Any,
        kind: type[nn.Module],
        x: Tensor,
        y: Tensor | None,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The stream x + scale y, what ``step`` makes of it, and the factor of that."""
        reason = unfused_step_reason(side, step, kind, self._steps, (x, y, scale))
        if reason is None:
            norm = step.norm
            z, h = residual_norm(x, norm.weight, norm.bias, y, scale, eps=norm.eps)
            return z, step.fn(h), _scale_of(step)
        if not torch.compiler.is_compiling():
            log_once(f"a step of an AlphaEncoder runs unfused: {reason}")
        z = _added(x, y, scale)
        return z, step(z), None

    def _observe(self, i: int, x: Tensor | None, y: Tensor) -> None:
        for observer in self._observers:
            if x is not None:
                observer(self, i, x, y)

    plain_forward = published_alpha_forward


def _scale_of(step: Any) -> Tensor | None:
    """Only of an AlphaStep: others do not use what they may have by that name."""
    scale: Any = step.layer_scale if type(step) is AlphaStep else None
    return scale


def _added(x: Tensor, y: Tensor | None, scale: Tensor | None) -> Tensor:
    if y is None:
        return x
    return (y if scale is None else y * scale) + x


def unfused_step_reason(
    side: str,
    step: Any,
    kind: type[nn.Module],
    known: tuple[type[nn.Module], ...],
    stream: tuple[Tensor | None, ...] = (),
) -> str | None:
    """Why a step must run as it is (on the stream's x, y and scale) right now; None if it need not.

    ``known`` are the classes of steps that compute fn(norm(x)), or are AlphaStep.
    """
    if _has_any_global_hook():
        return "hooks on all modules are registered"
    is_known = any(type(step) is cls for cls in known)
    more = _SCALE if type(step) is AlphaStep else frozenset()
    reason = step_reason(side, step, kind, is_known, more)
    if reason is None and kind is MSSA:
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
    given = [t for t in stream if t is not None]
    dtypes = {t.dtype for t in (*given, norm.weight, norm.bias)} if given else set()
    if len(dtypes) > 1 and (torch.float64 in dtypes or not autocast_is_on(given[0].device.type)):
        return f"x and its parameters are of {len(dtypes)} dtypes that autocast does not unite"
    return None
