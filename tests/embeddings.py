"""What the tests of tied_embedding share: the published form, inputs, and its results by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def published_embedding(
    idx: Tensor,
    weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None = None,
    *,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As a model has it under autocast: the sum in the weights' dtype, a cast behind it, and one of
    the weight for the head."""
    p = position_weight if positions is None else F.embedding(positions, position_weight)
    x, device = F.embedding(idx, weight, padding_idx) + p, weight.device.type
    narrow = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if narrow else weight.dtype
    return x.to(dtype), weight.to(dtype)


def embedding_inputs(
    batch: int, n: int, words: int, d: int, *, places: int | None = None, often: float = 0.0
) -> dict[str, Tensor]:
    """Arguments of tied_embedding in float64 under its own names; ``often`` of the tokens are word
    2 (or the last)."""
    idx = torch.randint(words, (batch, n))
    idx = idx.masked_fill(torch.rand(batch, n) < often, min(2, words - 1))
    inputs = {"idx": idx, "weight": torch.randn(words, d, dtype=torch.float64)}
    inputs["position_weight"] = torch.randn(places or n, d, dtype=torch.float64)
    if places is not None:
        inputs["positions"] = torch.randint(places, (batch, n))
    return inputs


def results(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    upstream: tuple[Tensor | None, Tensor | None],
    autocast: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """x as "y", the head's weight as "head", and the gradients "dweight" and "dposition_weight" for
    those of the two, in float64."""
    names = ("weight", "position_weight")
    leaves = {n: inputs[n].detach().clone().requires_grad_() for n in names}
    with torch.autocast(inputs["weight"].device.type, autocast, enabled=autocast is not None):
        x, head = function(**{**inputs, **leaves}, **options)
    pairs = [(t, g) for t, g in zip((x, head), upstream, strict=True) if g is not None]
    torch.autograd.backward([t for t, _ in pairs], [g.to(t.dtype) for t, g in pairs])
    grads = {f"d{n}": t.grad for n, t in leaves.items() if t.grad is not None}
    return {"y": x.detach(), "head": head.detach(), **grads}


def drawn_upstream(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the head's weight, in float64, of numbers that bfloat16 holds."""
    shapes = (*inputs["idx"].shape, inputs["weight"].shape[1]), inputs["weight"].shape
    device = inputs["weight"].device
    first, second = (torch.randn(*s, device=device).bfloat16().double() for s in shapes)
    return first, second
