"""The "reference" backend of cross_entropy: torch's own kernels, on any device and dtype.

``stats`` holds of each row its largest logit m and log sum exp(x - m), (rows, 2), in float32 or
better, as do the loss and the count of labels that are not ignored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..library import wide_dtype


def forward(
    logits: Tensor, labels: Tensor, vocab_size: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and count, scalars, and stats, of logits (rows, W) and labels (rows,)."""
    x = logits[:, :vocab_size].to(wide_dtype(logits.dtype))
    largest = x.amax(-1, keepdim=True)
    x = x - largest
    log_sum = x.exp().sum(-1, keepdim=True).log()
    loss = F.nll_loss(x - log_sum, labels.long(), ignore_index=ignore_index)
    count = (labels != ignore_index).sum(dtype=x.dtype)
    return loss, count, torch.cat((largest, log_sum), 1)


def backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    count: Tensor,
    vocab_size: int,
    ignore_index: int,
    wants_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """dlogits (rows, W), contiguous, 0 from column ``vocab_size`` on, and where wanted the sums of
    the columns before it, (vocab_size,), of what was not rounded yet, in the dtype of ``stats``."""
    x = logits[:, :vocab_size].to(stats.dtype)
    dx = ((x - stats[:, :1]) - stats[:, 1:]).exp()
    counts = (labels != ignore_index)[:, None]
    label = labels.long()[:, None].where(counts, 0)
    dx.scatter_(1, label, dx.gather(1, label) - 1)
    dx = (dx * (dloss / count)).where(counts, 0)
    dlogits = F.pad(dx, (0, logits.shape[1] - vocab_size)).to(logits.dtype)
    return dlogits, dx.sum(0) if wants_sums else None
