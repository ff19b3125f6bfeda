"""What the tests of cross_entropy share: torch's under autocast, inputs, and its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def published_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    added_bias: Tensor | None = None,
) -> Tensor:
    """torch's as models call it under autocast: of a copy in float32, or float64."""
    x = logits[..., :vocab_size].flatten(0, -2)
    if added_bias is not None:  # zeros: they are in the logits already
        x = x + added_bias.to(x.dtype)
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
    function: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor,
    *,
    with_bias: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """The loss "y", "dlogits" and "dbias" (of zeros that were added to them), for an upstream
    gradient that is not 1; strides are kept."""
    leaves = {"dlogits": logits.detach().requires_grad_()}
    if with_bias:
        v = options.get("vocab_size") or logits.shape[-1]
        wide = torch.promote_types(logits.dtype, torch.float32)
        bias = torch.zeros(v, dtype=wide, device=logits.device).requires_grad_()
        leaves["dbias"] = options["added_bias"] = bias
    y = function(leaves["dlogits"], labels, **options)
    grads = torch.autograd.grad(y, tuple(leaves.values()), torch.full_like(y, -1.75))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def exactly(logits: Tensor, labels: Tensor, **options: Any) -> dict[str, Tensor]:
    return loss_and_gradient(published_cross_entropy, logits.double(), labels, **options)
