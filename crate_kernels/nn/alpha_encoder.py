"""The encoder of CRATE-alpha on :func:`crate_kernels.residual_norm`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..checks import refuse
from .encoder import Layers
from .encoder_recognition import published_alpha_forward, reason_against_alpha_step
from .layers import MSSA, OvercompleteISTA
from .recognition import Verdicts
from .steps import added, run_step


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
        run = functools.partial(run_step, self)
        y: Any = None
        scale: Any = None  # x + scale y is the stream
        before = None
        for i, (attn, ff) in enumerate(layers):
            z, y, scale = run("attention", attn, (MSSA,), x, y, scale)
            self._observe(i - 1, before, z)
            x, y, scale = run("dictionary", ff, (OvercompleteISTA,), z, y, scale)
            before = z
        x = added(x, y, scale)
        self._observe(len(layers) - 1, before, x)
        return x

    plain_forward = published_alpha_forward
