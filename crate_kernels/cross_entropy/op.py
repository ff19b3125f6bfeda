"""Cross-entropy over a large vocabulary, without a copy of the logits in float32.

loss = mean over labels that count of  log sum exp(x) - x_label
dx   = (softmax(x) - onehot(label)) dloss / count, 0 for labels that do not count
db   = sum of dx over rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_tensors, refuse
from ..library import define, define_gradient, wide_dtype
from . import torch_kernels
from .reference import IGNORED


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORED,
    vocab_size: int | None = None,
    added_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Mean negative log-likelihood, in nats, of the labels under softmax(logits).

    .. math:: \mathrm{loss} = \frac{1}{|C|} \sum_{i \in C}
              \Bigl(\log \sum_v e^{x_{iv}} - x_{i, l_i}\Bigr), \qquad
              C = \{i : l_i \ne \mathrm{ignore\_index}\}

    The logits are read once in the forward pass, once in the backward pass, which writes their
    gradient; rows that are ignored are not read.

    Args:
        logits: x (..., W), read in place where the last dimension is contiguous and the others
            have one stride, as in a ``[..., :n]`` of a wider product; else copied.
        labels: l (...), int64 or int32, in [0, vocab_size), or ignore_index.
        ignore_index: the label of rows that count for nothing.
        vocab_size: V, the columns that count; W where None. Columns past it are padding, as if
            minus infinity, and their gradient is 0: so that a product over a padded vocabulary
            need not be narrowed, whose gradient would be copied into a wider one.
        added_bias: b (V,), floating: the bias that the logits have in them already, x = h W^T + b.
            Its gradient, the sum of theirs over rows, is made here while theirs is written, and
            need not be made of it by another pass: give the b of the product detached. The values
            of b are not read.
        backend: "auto", "triton" or "reference"; see :func:`crate_kernels.explain`.

    Returns:
        A scalar in float32, float64 for float64 logits, as torch's under autocast; NaN where no
        label counts. The gradient is in the dtype of the logits, contiguous. All is computed in
        float32 or better and bitwise repeatable, without a host sync. The backward pass keeps the
        logits, the labels and two numbers a row.

    A label out of range is an IndexError on the CPU, as torch has it. The Triton kernels cannot
    raise: the loss is NaN then, and the gradient of that row.

    Raises:
        ValueError: shapes, devices, vocab_size, or a backend that do not fit.
        TypeError: not tensors, not of the dtypes above.

    Example: ``cross_entropy(F.linear(h, w, b.detach()), labels, added_bias=b)``.

    Bytes: docs/cross_entropy.md.
    """
    _check(logits, labels, ignore_index, vocab_size, added_bias)
    backend = backends.choose("cross_entropy", backend, logits, logits.dtype, None)
    loss, _, _ = torch.ops.crate_kernels.cross_entropy(
        logits, labels, added_bias, vocab_size, ignore_index, backend
    )
    return loss


def explain_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORED,
    vocab_size: int | None = None,
    added_bias: Tensor | None = None,
) -> backends.Explanation:
    """Which backends fit these arguments of :func:`cross_entropy`, and why the others do not."""
    _check(logits, labels, ignore_index, vocab_size, added_bias)
    return backends.explain("cross_entropy", logits, logits.dtype, None)


def _check(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    vocab_size: int | None,
    added_bias: Tensor | None,
) -> None:
    op = "cross_entropy"
    check_tensors(op, {"logits": logits})
    if logits.dim() < 1 or logits.shape[-1] == 0:
        refuse(op, "logits of shape (..., W) with W > 0", tuple(logits.shape))
    if not isinstance(labels, Tensor):
        refuse(op, "labels to be a torch.Tensor", type(labels).__name__, TypeError)
    if labels.dtype not in (torch.int64, torch.int32):
        refuse(op, "labels of dtype int64 or int32", labels.dtype, TypeError)
    if labels.device != logits.device:
        refuse(op, f"labels on the device of logits, {logits.device}", labels.device)
    if labels.shape != logits.shape[:-1]:
        refuse(op, f"labels of shape {tuple(logits.shape[:-1])}", tuple(labels.shape))
    for name, value in (("ignore_index", ignore_index), ("vocab_size", vocab_size)):
        optional = value is None and name == "vocab_size"
        if not optional and (not isinstance(value, int) or isinstance(value, bool)):
            refuse(op, f"{name} to be an int", type(value).__name__, TypeError)
    if vocab_size is not None and not 0 < vocab_size <= logits.shape[-1]:
        refuse(op, f"vocab_size from 1 to W = {logits.shape[-1]}", vocab_size)
    if added_bias is None:
        return
    check_tensors(op, {"added_bias": added_bias})
    if added_bias.device != logits.device:
        refuse(op, f"added_bias on the device of logits, {logits.device}", added_bias.device)
    wanted = (vocab_size or logits.shape[-1],)
    if added_bias.shape != wanted:
        refuse(op, f"added_bias of shape (V,) = {wanted}", tuple(added_bias.shape))


# ---- registration: crate_kernels::cross_entropy and its backward


def _kernels(backend: str) -> Any:
    """The module that runs ``backend``; Triton is imported at the first launch, not before."""
    if backend == "triton":
        from . import triton_kernels

        return triton_kernels
    return torch_kernels


def _rows(
    logits: Tensor, labels: Tensor, vocab_size: int | None, ignore_index: int
) -> tuple[Any, ...]:
    """What kernels take of the op's arguments: logits (rows, W), labels (rows,), V."""
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, labels.reshape(-1).contiguous(), vocab_size or rows.shape[1], ignore_index


def _forward(
    logits: Tensor,
    labels: Tensor,
    added_bias: Tensor | None,
    vocab_size: int | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _kernels(backend).forward(
        *_rows(logits, labels, vocab_size, ignore_index)
    )
    return found


def _backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    count: Tensor,
    wants_sums: bool,
    vocab_size: int | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dlogits and, where wanted, the sums of its columns (V,); empty else."""
    rows, flat, *rest = _rows(logits, labels, vocab_size, ignore_index)
    saved = (rows, flat, stats, count, *rest)
    dlogits, sums = _kernels(backend).backward(dloss, *saved, wants_sums)
    return dlogits.view(logits.shape), stats.new_empty(0) if sums is None else sums


def _forward_fake(
    logits: Tensor,
    labels: Tensor,
    added_bias: Tensor | None,
    vocab_size: int | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = logits.new_empty((labels.numel(), 2), dtype=wide_dtype(logits.dtype))
    return stats.new_empty(()), stats.new_empty(()), stats


def _backward_fake(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    count: Tensor,
    wants_sums: bool,
    vocab_size: int | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    columns = (vocab_size or logits.shape[-1]) if wants_sums else 0
    return logits.new_empty(logits.shape), stats.new_empty(columns)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, added_bias, *ctx.rest = inputs
    ctx.bias_dtype = None if added_bias is None else added_bias.dtype
    _, count, stats = output
    ctx.save_for_backward(logits, labels, stats, count)
    ctx.mark_non_differentiable(count, stats)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 6
    wants_sums = ctx.needs_input_grad[2]
    dlogits, sums = torch.ops.crate_kernels.cross_entropy_backward(
        dloss, *ctx.saved_tensors, wants_sums, *ctx.rest
    )
    dbias = sums.to(ctx.bias_dtype) if wants_sums else None
    return dlogits if ctx.needs_input_grad[0] else None, None, dbias, None, None, None


define(
    "cross_entropy(Tensor logits, Tensor labels, Tensor? added_bias, SymInt? vocab_size,"
    " int ignore_index, str backend) -> (Tensor loss, Tensor count, Tensor stats)",
    _forward,
    _forward_fake,
)
define(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor stats,"
    " Tensor count, bool wants_sums, SymInt? vocab_size, int ignore_index, str backend)"
    " -> (Tensor dlogits, Tensor column_sums)",
    _backward,
    _backward_fake,
)
define_gradient("cross_entropy", _gradient, _save)
