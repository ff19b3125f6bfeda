"""The correctness gate: no speed is reported for a candidate that fails it.

Against float64, a candidate's error is at most 2 times (gradients 3 times) the error of the
published form run eagerly in the same dtype, for the largest and the root mean square error both.
A model's tokens are in that dtype between its steps as well (peers.py, "eager-narrow").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


@dataclass(frozen=True)
class Quantity:
    """Errors of one output or gradient: (largest, RMS), and eager's."""

    name: str
    error: tuple[float, float]
    eager: tuple[float, float]

    @property
    def factor(self) -> float:
        return OUTPUT_FACTOR if self.name == "output" else GRADIENT_FACTOR

    @property
    def ratios(self) -> tuple[float, float]:
        largest, rms = (
            (ours / eager if eager else 1.0 if ours == 0 else float("inf"))
            for ours, eager in zip(self.error, self.eager, strict=True)
        )
        return largest, rms

    @property
    def passed(self) -> bool:
        if not all(math.isfinite(eager) for eager in self.eager):
            return False  # nothing to compare with
        return all(ratio <= self.factor for ratio in self.ratios)  # NaN never passes

    def __str__(self) -> str:
        (largest, rms), (eager_largest, eager_rms) = self.error, self.eager
        return (
            f"{self.name}: max {largest:.2e} (eager {eager_largest:.2e}), "
            f"rms {rms:.2e} (eager {eager_rms:.2e}), allowed {self.factor:g}x"
        )


@dataclass(frozen=True)
class Parity:
    quantities: tuple[Quantity, ...]

    @property
    def passed(self) -> bool:
        return bool(self.quantities) and all(q.passed for q in self.quantities)

    def worst(self, outputs: bool) -> tuple[float, float] | None:
        """The largest ratios (max, RMS) to eager's error, over outputs or over gradients."""
        ratios = [q.ratios for q in self.quantities if (q.name == "output") == outputs]
        if not ratios:
            return None
        largest, rms = (_max(column) for column in zip(*ratios, strict=True))
        return largest, rms

    def __str__(self) -> str:
        return "; ".join(str(q) for q in self.quantities if not q.passed) or "ok"


def _max(values: tuple[float, ...]) -> float:
    """NaN if any is."""
    return float("nan") if any(v != v for v in values) else max(values)


Outputs = dict[str, Tensor]


def compare(actual: Outputs, eager: Outputs, reference: Outputs) -> Parity:
    """``reference`` in float64; all three hold the same names, one of them "output"."""
    quantities = []
    for name, exact in reference.items():
        if actual[name].shape != exact.shape:
            raise ValueError(
                f"bench: expected {name} of shape {tuple(exact.shape)}, "
                f"got {tuple(actual[name].shape)}"
            )
        theirs = errors(eager[name], exact)
        quantities.append(Quantity(name, errors(actual[name], exact), theirs))
    return Parity(tuple(quantities))


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference, in float64."""
    difference = actual.detach().to(torch.float64) - exact
    if difference.numel() == 0:
        return 0.0, 0.0
    return float(difference.abs().max()), float(difference.square().mean().sqrt())
