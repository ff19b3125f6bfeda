"""Tied embedding: where the words enter a language model, whose head has the same weight.

x_t = E[i_t] + P[p_t]
dE  = dhead + sum of dx_t over t with i_t = v,  dP = sum of dx_t over t with p_t = p
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_tensors, refuse
from ..library import autocast_dtype, define, define_gradient
from . import torch_kernels


def tied_embedding(
    idx: Tensor,
    weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None = None,
    *,
    padding_idx: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Embeddings of words and positions, summed, and the words' weight for the head they share.

    .. math:: x_t = E_{i_t} + P_{p_t}, \qquad
              dE_v = dE^{head}_v + \sum_{t: i_t = v} dx_t, \qquad dP_p = \sum_{t: p_t = p} dx_t

    Let the head multiply with the second result, E as its GEMM takes it: the two gradients of E are
    then one tensor, which is written once.

    Args:
        idx: i, words (B, T), int64 or int32.
        weight: E (V, D).
        position_weight: P (R, D); R = T without ``positions``.
        positions: p (B, T), int64 or int32; 0..T-1 for each item where None.
        padding_idx: a word whose tokens add nothing to its gradient, as in torch.nn.Embedding.
        backend: "auto", "triton" or "reference"; see :func:`crate_kernels.explain`.

    Returns:
        x (B, T, D), contiguous, and E (V, D), both in autocast's dtype where that is on, else in
        that of weight; E is ``weight`` itself where that is its dtype. Sums are in float32 or
        better, rounded once; by Triton bitwise repeatable, without a host sync. Of the gradient of
        the second result a part is lost if it is used where autograd does not see it.

    An index out of range is an IndexError on the CPU. The Triton kernels cannot raise: that token
    is NaN, and adds to no gradient.

    Raises:
        ValueError: shapes, devices, padding_idx or a backend that do not fit.
        TypeError: not tensors, not of the dtypes above, or of mixed dtypes with autocast off.

    Bytes: docs/tied_embedding.md.
    """
    _check(idx, weight, position_weight, positions, padding_idx)
    dtype = autocast_dtype(weight)
    backend = backends.choose("tied_embedding", backend, weight, dtype, None)
    skipped = -1 if padding_idx is None else padding_idx
    x, head = torch.ops.crate_kernels.tied_embedding(
        idx, weight, position_weight, positions, skipped, dtype, backend
    )
    return x, (weight if weight.dtype == dtype else head)


def explain_tied_embedding(
    idx: Tensor,
    weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None = None,
    *,
    padding_idx: int | None = None,
) -> backends.Explanation:
    """Which backends fit these arguments of :func:`tied_embedding`, and why the others do not."""
    _check(idx, weight, position_weight, positions, padding_idx)
    return backends.explain("tied_embedding", weight, autocast_dtype(weight), None)


def _check(
    idx: Tensor,
    weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None,
    padding_idx: int | None,
) -> None:
    op = "tied_embedding"
    check_tensors(op, {"weight": weight, "position_weight": position_weight})
    if weight.dim() != 2 or weight.numel() == 0:
        refuse(op, "weight of shape (V, D) with V > 0 and D > 0", tuple(weight.shape))
    words, d = weight.shape
    for name, t in (("idx", idx), ("positions", positions)):
        if t is None and name == "positions":
            continue
        if not isinstance(t, Tensor):
            refuse(op, f"{name} to be a torch.Tensor", type(t).__name__, TypeError)
        if t.dtype not in (torch.int64, torch.int32):
            refuse(op, f"{name} of dtype int64 or int32", t.dtype, TypeError)
        if t.device != weight.device:
            refuse(op, f"{name} on the device of weight, {weight.device}", t.device)
    if idx.dim() != 2 or idx.shape[1] == 0:
        refuse(op, "idx of shape (B, T) with T > 0", tuple(idx.shape))
    if positions is not None and positions.shape != idx.shape:
        refuse(op, f"positions of the shape of idx, {tuple(idx.shape)}", tuple(positions.shape))
    rows = idx.shape[1] if positions is None else "R"
    fits = position_weight.dim() == 2 and position_weight.shape[1] == d
    if not fits or rows not in ("R", len(position_weight)):
        wanted = f"position_weight of shape ({rows}, D = {d})"
        refuse(op, wanted, tuple(position_weight.shape))
    if padding_idx is not None and (not isinstance(padding_idx, int) or padding_idx is True):
        refuse(op, "padding_idx to be an int or None", type(padding_idx).__name__, TypeError)
    if padding_idx is not None and not 0 <= padding_idx < words:
        refuse(op, f"padding_idx from 0 to V - 1 = {words - 1}", padding_idx)


# ---- registration: crate_kernels::tied_embedding and its backward


def _kernels(backend: str) -> Any:
    """The module that runs ``backend``; Triton is imported at the first launch, not before."""
    if backend == "triton":
        from . import triton_kernels

        return triton_kernels
    return torch_kernels


def _forward(
    idx: Tensor,
    weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None,
    skipped: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """x, and the weight in ``dtype``; empty where it is the weight itself."""
    weight, places = weight.contiguous(), position_weight.contiguous()
    positions = None if positions is None else positions.contiguous()
    x = _kernels(backend).forward(idx.contiguous(), weight, places, positions, dtype)
    return x, weight.new_empty(0) if weight.dtype == dtype else weight.to(dtype)


def _backward(
    dx: Tensor,
    dhead: Tensor | None,
    idx: Tensor,
    positions: Tensor | None,
    words: int,
    places: int,
    skipped: int,
    dtype: torch.dtype,
    wants: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dweight and dposition_weight in ``dtype``, empty where they are not wanted."""
    rows, kernels = dx.reshape(-1, dx.shape[-1]).contiguous(), _kernels(backend)
    dweight, dplaces = dx.new_empty(0, dtype=dtype), dx.new_empty(0, dtype=dtype)
    if wants[0]:
        dhead = None if dhead is None else dhead.contiguous()
        dweight = kernels.add_rows(rows, idx.reshape(-1), dhead, words, skipped, dtype)
    if wants[1] and positions is None:
        dplaces = dx.sum(0, dtype=dtype)
    elif wants[1] and positions is not None:
        dplaces = kernels.add_rows(rows, positions.reshape(-1), None, places, -1, dtype)
    return dweight, dplaces


def _forward_fake(
    idx: Tensor,
    weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None,
    skipped: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (0,) if weight.dtype == dtype else weight.shape
    x = weight.new_empty((*idx.shape, weight.shape[1]), dtype=dtype)
    return x, weight.new_empty(shape, dtype=dtype)


def _backward_fake(
    dx: Tensor,
    dhead: Tensor | None,
    idx: Tensor,
    positions: Tensor | None,
    words: int,
    places: int,
    skipped: int,
    dtype: torch.dtype,
    wants: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = [n if want else 0 for n, want in zip((words, places), wants, strict=True)]
    shapes = [(n, dx.shape[-1]) if want else (0,) for n, want in zip(rows, wants, strict=True)]
    dweight, dplaces = (dx.new_empty(shape, dtype=dtype) for shape in shapes)
    return dweight, dplaces


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    idx, weight, position_weight, positions, skipped, _, backend = inputs
    x, head = output
    ctx.save_for_backward(idx, positions)
    ctx.sizes, ctx.like = (len(weight), len(position_weight), skipped), (x.shape, x.dtype, x.device)
    ctx.dtypes, ctx.backend = (weight.dtype, position_weight.dtype), backend
    if head.numel() == 0:
        ctx.mark_non_differentiable(head)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dx: Tensor | None, dhead: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = list(ctx.needs_input_grad[1:3])
    if dx is None and dhead is None:
        return (None,) * 7
    if dx is None:
        shape, dtype, device = ctx.like
        dx = torch.zeros(shape, dtype=dtype, device=device)
    idx, positions = ctx.saved_tensors
    dtype = torch.promote_types(*ctx.dtypes)
    found = torch.ops.crate_kernels.tied_embedding_backward(
        dx, dhead, idx, positions, *ctx.sizes, dtype, wants, ctx.backend
    )
    several = zip(found, wants, ctx.dtypes, strict=True)
    gradients = [t.to(own) if want else None for t, want, own in several]
    return None, *gradients, None, None, None, None


define(
    "tied_embedding(Tensor idx, Tensor weight, Tensor position_weight, Tensor? positions,"
    " int skipped, ScalarType dtype, str backend) -> (Tensor x, Tensor head)",
    _forward,
    _forward_fake,
)
define(
    "tied_embedding_backward(Tensor dx, Tensor? dhead, Tensor idx, Tensor? positions, SymInt words,"
    " SymInt places, int skipped, ScalarType dtype, bool[] wants, str backend)"
    " -> (Tensor dweight, Tensor dposition_weight)",
    _backward,
    _backward_fake,
)
define_gradient("tied_embedding", _gradient, _save)
