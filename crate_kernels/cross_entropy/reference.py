"""Cross-entropy in plain PyTorch, forward and backward: what is checked against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..library import wide_dtype

IGNORED = -100  # torch's label that counts for nothing


def cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORED,
    vocab_size: int | None = None,
    added_bias: Tensor | None = None,
) -> Tensor:
    """``mean(logsumexp(x) - x_label)`` over labels that count; differentiable by autograd.

    Arguments and result as in :func:`crate_kernels.cross_entropy`.
    """
    x = logits[..., :vocab_size].to(wide_dtype(logits.dtype))
    if added_bias is not None:
        x = x + (added_bias - added_bias.detach())  # 0, with a gradient
    rows = x.reshape(-1, x.shape[-1])
    return F.cross_entropy(rows, labels.reshape(-1).long(), ignore_index=ignore_index)


def cross_entropy_reference_backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORED,
    vocab_size: int | None = None,
) -> Tensor:
    """Gradient of :func:`cross_entropy_reference`: ``dloss`` is a scalar, the result is shaped as
    ``logits`` and of their dtype.

    ``dx = (softmax(x) - onehot(label)) * dloss / count``; 0 for labels that do not count and past
    the vocabulary.
    """
    counts = (labels != ignore_index)[..., None]
    x = logits[..., :vocab_size].to(wide_dtype(logits.dtype))
    onehot = F.one_hot(labels.long().where(counts[..., 0], 0), x.shape[-1])
    dx = ((x.softmax(-1) - onehot) * (dloss / counts.sum())).where(counts, 0)
    return F.pad(dx, (0, logits.shape[-1] - x.shape[-1])).to(logits.dtype)
