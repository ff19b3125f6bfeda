"""What the tests of cross_entropy share: torch's under autocast, inputs, and its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def published_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, vocab_size: int | None = None
) -> Tensor:
    """torch's as models call it under autocast: of a copy in float32, or float64."""
    x = logits[..., :vocab_size].flatten(0, -2)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.cross_entropy(x, labels.flatten().long(), ignore_index=ignore_index)


def cross_entropy_inputs(
    *rows: int, v: int, ignored: float = 0.3, ignore_index: int = -100, mean: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Logits (*rows, v) in float64 and labels, of which some are ignored, the first never."""
    logits = 2 * torch.randn(*rows, v, dtype=torch.float64) + mean
    labels = torch.randint(v, rows)
    if ignore_index == 1:
        labels = labels.where(labels != 1, 0)
    drawn = torch.rand(rows) < ignored
    drawn.view(-1)[:1] = False
    return logits, labels.masked_fill(drawn, ignore_index)


def loss_and_gradient(
    function: Callable[..., Tensor], logits: Tensor, labels: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The loss "y" and "dlogits", for an upstream gradient that is not 1; strides are kept."""
    leaf = logits.detach().requires_grad_()
    y = function(leaf, labels, **options)
    (grad,) = torch.autograd.grad(y, leaf, torch.full_like(y, -1.75))
    return {"y": y.detach(), "dlogits": grad}


def exactly(logits: Tensor, labels: Tensor, **options: Any) -> dict[str, Tensor]:
    return loss_and_gradient(published_cross_entropy, logits.double(), labels, **options)
