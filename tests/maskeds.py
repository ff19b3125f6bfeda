"""What the tests of masked_tokens and masked_loss share: inputs, and results with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def tokens_inputs(batch: int, n: int, d: int) -> dict[str, Tensor]:
    """Arguments of masked_tokens in float64 under its own names; three quarters are hidden."""
    options: Any = {"dtype": torch.float64}
    return {
        "x": torch.randn(batch, n, d, **options),
        "mask": (torch.rand(batch, n) < 0.75).float(),
        "mask_token": torch.randn(1, 1, d, **options),
        "cls_token": torch.randn(1, 1, d, **options),
        "positions": torch.randn(1, 1 + n, d, **options),
    }


def loss_inputs(
    batch: int, channels: int, grid: tuple[int, int], patch_size: int
) -> dict[str, Tensor]:
    """Arguments of masked_loss in float64 under its own names; of the mask some weights are 0, and
    the first is not."""
    size, n = tuple(patch_size * side for side in grid), grid[0] * grid[1]
    whole = torch.randn(batch, 1 + n, channels * patch_size**2, dtype=torch.float64)
    mask = (torch.rand(batch, n) < 0.75) * torch.rand(batch, n, dtype=torch.float64).add(0.5)
    mask.view(-1)[:1] = 1
    return {
        "predicted": whole[:, 1:],  # as in the model, a part of it
        "img": 3 * torch.randn(batch, channels, *size, dtype=torch.float64) + 1,
        "mask": mask,
    }


def with_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The result "y" and the gradients of what has one; strides are kept."""
    named = [n for n in inputs if n in ("x", "mask_token", "cls_token", "predicted")]
    leaves = {n: inputs[n].detach().requires_grad_() for n in named}
    y = function(**{**inputs, **leaves}, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def cast(inputs: dict[str, Tensor], **dtypes: torch.dtype) -> dict[str, Tensor]:
    """Those named, in these dtypes, in their own strides."""
    return {n: t.to(dtypes.get(n, t.dtype)) for n, t in inputs.items()}
