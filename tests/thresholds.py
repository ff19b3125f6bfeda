"""What the tests of learned and signed thresholds of ISTA share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from helpers import assert_as_close_as_plain, ista_inputs, results
from torch import Tensor


def published_thresholds(
    x: Tensor,
    weight: Tensor,
    step_size: float | Tensor = 0.1,
    lambd: float | Tensor = 0.1,
    *,
    signed: bool = False,
) -> Tensor:
    """ISTA with a step size and threshold for each column; of both signs where ``signed``."""
    v, threshold = _before_threshold(x, weight, step_size), step_size * lambd
    if signed:
        return torch.sign(v) * torch.relu(v.abs() - threshold)
    return torch.relu(v - threshold)


def _before_threshold(x: Tensor, weight: Tensor, step_size: float | Tensor) -> Tensor:
    pull, push = F.linear(x, weight.T), F.linear(F.linear(x, weight), weight.T)
    return x + step_size * (pull - push)


def threshold_inputs(
    *shape: int, kinds: tuple[str | None, str | None] = ("channel", "channel")
) -> dict[str, Tensor]:
    """Arguments of ista in float64, the step size and lambda as tensors of ``kinds``."""
    inputs = ista_inputs(*shape)
    sizes = {"scalar": (), "one": (1,), "channel": shape[-1:]}
    for name, kind in zip(("step_size", "lambd"), kinds, strict=True):
        if kind is not None:
            inputs[name] = 0.05 + 0.2 * torch.rand(sizes[kind], dtype=torch.float64)
    return inputs


def off_the_threshold(dy: Tensor, inputs: Mapping[str, Tensor], signed: bool) -> Tensor:
    """``dy`` without its entries where rounding may decide whether a code is zero."""
    exact = {name: t.double() for name, t in inputs.items()}
    step_size, lambd = exact.get("step_size", 0.1), exact.get("lambd", 0.1)
    v = _before_threshold(exact["x"], exact["weight"], step_size)
    size = (v.abs() if signed else v) - step_size * lambd
    return dy.masked_fill(size.abs() < 16 * torch.finfo(inputs["x"].dtype).eps, 0.0)


def check_single_numbers(
    function: Callable[..., Tensor],
    *shape: int,
    dtype: torch.dtype,
    signed: bool,
    device: str = "cpu",
    draws: int = 16,
) -> None:
    """Gradients of a step size and a lambda of one number are as close as plain PyTorch's.

    Over several draws: of one number alone the error says little, ours or plain's.
    """
    found: list[list[dict[str, Tensor]]] = []
    for _ in range(draws):
        inputs = threshold_inputs(*shape, kinds=("scalar", "one"))
        inputs = {k: t.to(device, dtype) for k, t in inputs.items()}
        dy = off_the_threshold(torch.randn(shape).to(device, dtype), inputs, signed)
        found.append(
            [
                results(function, inputs, dy, signed=signed),
                results(published_thresholds, inputs, dy, signed=signed),
                results(published_thresholds, inputs, dy, torch.float64, signed=signed),
            ]
        )
    names = ("dstep_size", "dlambd")
    got, plain, exact = (
        {name: torch.stack([draw[name] for draw in side]) for name in names}
        for side in zip(*found, strict=True)
    )
    assert_as_close_as_plain(got, plain, exact, (shape, dtype, signed))
