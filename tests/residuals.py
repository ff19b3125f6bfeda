"""What the tests of residual_norm share: the published form, inputs, and its results by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Which of y and scale there are; scale may be a number.
FORMS = {"norm": (), "residual": ("y",), "scaled": ("y", "scale")}
NUMBERS = (-1, -1.0, 0.25, 1, 0.0)


def published_residual_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None = None,
    scale: Tensor | float | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """As CRATE-alpha has it under autocast on a GPU: the norm in the stream's dtype, then a cast
    for the GEMM behind it."""
    z = x if y is None else (y if scale is None else y * scale) + x
    h = F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps)
    device = z.device.type
    narrow = torch.is_autocast_enabled(device) and z.dtype != torch.float64
    return z, h.to(torch.get_autocast_dtype(device)) if narrow else h


def residual_inputs(*shape: int, form: str = "scaled", mean: float = 0.5) -> dict[str, Tensor]:
    """Arguments of residual_norm in float64 under its own names."""
    d = shape[-1]
    inputs = {
        "x": torch.randn(shape, dtype=torch.float64) + mean,
        "weight": 1 + 0.2 * torch.randn(d, dtype=torch.float64),
        "bias": 0.2 * torch.randn(d, dtype=torch.float64),
        "y": torch.randn(shape, dtype=torch.float64),
        "scale": torch.randn(d, dtype=torch.float64),
    }
    kept = ("x", "weight", "bias", *FORMS[form])
    return {name: inputs[name] for name in kept}


def cast(inputs: Mapping[str, Tensor], x: torch.dtype, y: torch.dtype) -> dict[str, Tensor]:
    """y in a dtype of its own, the rest in that of x."""
    return {name: t.to(y if name == "y" else x) for name, t in inputs.items()}


def both(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: Mapping[str, Tensor],
    dz: Tensor | None,
    dh: Tensor | None,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """z, h and every gradient "d<name>"; without dz or dh that result is not used."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in inputs.items()}
    device = inputs["x"].device.type
    on = contextlib.nullcontext() if autocast is None else torch.autocast(device, autocast)
    with on:
        z, h = function(**leaves, **options)
    used = [(t, g.to(t.dtype)) for t, g in ((z, dz), (h, dh)) if g is not None]
    torch.autograd.backward([t for t, _ in used], [g for _, g in used])
    grads = {f"d{k}": t.grad for k, t in leaves.items() if t.grad is not None}
    return {"z": z.detach(), "h": h.detach(), **grads}


def exactly(
    inputs: Mapping[str, Tensor], dz: Tensor | None, dh: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """The published results in float64."""
    wide = {k: t.double() for k, t in inputs.items()}
    return both(published_residual_norm, wide, dz, dh, **options)
