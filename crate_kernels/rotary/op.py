"""Rotary embedding and RMSNorm of tied tokens, before tied attention (nanochat-crate).

r = (a cos + b sin, b cos - a sin)          a, b: the two halves of a head's columns
y = r / sqrt(mean(r^2) + eps)
dr = rstd (dy - y mean(dy * y)),  dw = (da cos - db sin, db cos + da sin)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import FLOATS, check_heads, check_number, check_tensors, refuse
from ..library import define, define_gradient
from . import torch_kernels


def tied_rotary(
    w: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    norm_eps: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Each head's token turned by the angles of its position and, with norm_eps, normed.

    .. math:: y_h = r_h / \sqrt{\mathrm{mean}(r_h^2) + \epsilon}, \qquad
              r_h = [a \cos + b \sin,\; b \cos - a \sin], \quad w_h = [a, b]

    What :func:`crate_kernels.tied_attention` is then given: query, key and value are all y, as
    nanochat-crate has it. The rotation keeps lengths, so norm and rotation commute.

    Args:
        w: projected tokens (B, N, heads*head_dim), or packed (T, heads*head_dim); head_dim even.
        cos, sin: (N, head_dim/2), packed (T, head_dim/2), of any floating dtype; they get no
            gradient. Row n holds the angles of token n: rows of a longer table, or picked ones.
        heads: number of heads; must divide the width of w.
        norm_eps: epsilon of the RMSNorm over each head's columns, without affine, >= 0; None: no
            norm. ``F.rms_norm`` without eps takes ``torch.finfo(torch.float32).eps``.
        backend: "auto", "triton" or "reference"; see :func:`crate_kernels.explain`.

    Returns:
        Shaped as w, contiguous, of w's dtype; computed in float32 or better, rounded once. The
        backward reads y, which attention keeps as well: w itself is not kept.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, or a backend that do not fit.
    """
    _check(w, cos, sin, heads, norm_eps)
    head_dim = w.shape[-1] // heads
    backend = backends.choose("tied_rotary", backend, w, w.dtype, head_dim, ("tied_rotary",))
    eps = None if norm_eps is None else float(norm_eps)
    y, _ = torch.ops.crate_kernels.tied_rotary(w, cos, sin, heads, eps, backend)
    return y


def explain_tied_rotary(
    w: Tensor, cos: Tensor, sin: Tensor, *, heads: int, norm_eps: float | None = None
) -> backends.Explanation:
    """Which backends fit these arguments of :func:`tied_rotary`, and why the others do not."""
    _check(w, cos, sin, heads, norm_eps)
    head_dim = w.shape[-1] // heads
    return backends.explain("tied_rotary", w, w.dtype, head_dim, ("tied_rotary",))


def _check(w: Tensor, cos: Tensor, sin: Tensor, heads: int, norm_eps: float | None) -> None:
    op = "tied_rotary"
    check_tensors(op, {"w": w})
    if w.dim() not in (2, 3):
        refuse(op, "w of shape (B, N, heads*head_dim) or (T, heads*head_dim)", tuple(w.shape))
    check_heads(op, heads, w.shape[-1])
    head_dim = w.shape[-1] // heads
    if head_dim % 2 != 0:
        refuse(op, "an even head_dim", head_dim)
    for name, t in (("cos", cos), ("sin", sin)):
        if not isinstance(t, Tensor):
            refuse(op, f"{name} to be a torch.Tensor", type(t).__name__, TypeError)
        if t.dtype not in FLOATS:
            refuse(op, f"{name} of a floating dtype", t.dtype, TypeError)
        if t.device != w.device:
            refuse(op, f"{name} on the device of w, {w.device}", t.device)
        if t.shape != (w.shape[-2], head_dim // 2):
            expected = (w.shape[-2], head_dim // 2)
            refuse(op, f"{name} of shape (N, head_dim/2) = {expected}", tuple(t.shape))
        if t.requires_grad:
            refuse(op, f"{name} without requires_grad", "requires_grad=True")
    if norm_eps is not None:
        check_number(op, "norm_eps", norm_eps)


# ---- registration


def _kernels(backend: str) -> Any:
    """The module that runs ``backend``; Triton is imported at the first launch, not before."""
    if backend == "triton":
        from . import triton_kernels

        return triton_kernels
    return torch_kernels


def _forward(
    w: Tensor, cos: Tensor, sin: Tensor, heads: int, norm_eps: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    y, rstd = _kernels(backend).forward(w, cos, sin, heads, norm_eps)
    return y.contiguous(), rstd.contiguous()


def _forward_fake(
    w: Tensor, cos: Tensor, sin: Tensor, heads: int, norm_eps: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (0,) if norm_eps is None else (*w.shape[:-1], heads)
    return w.new_empty(w.shape), w.new_empty(shape, dtype=torch_kernels.wide(w))


def _backward(
    dy: Tensor, y: Tensor | None, rstd: Tensor, cos: Tensor, sin: Tensor, heads: int, backend: str
) -> Tensor:
    return _kernels(backend).backward(dy, y, rstd, cos, sin, heads).contiguous()


def _backward_fake(dy: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(dy.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, cos, sin, ctx.heads, norm_eps, ctx.backend = inputs
    y, rstd = output
    ctx.save_for_backward(None if norm_eps is None else y, rstd, cos, sin)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    saved = (dy, *ctx.saved_tensors, ctx.heads, ctx.backend)
    return torch.ops.crate_kernels.tied_rotary_backward(*saved), *(None,) * 5


define(
    "tied_rotary(Tensor w, Tensor cos, Tensor sin, int heads, float? norm_eps, str backend)"
    " -> (Tensor y, Tensor rstd)",
    _forward,
    _forward_fake,
)
define(
    "tied_rotary_backward(Tensor dy, Tensor? y, Tensor rstd, Tensor cos, Tensor sin, int heads,"
    " str backend) -> Tensor",
    _backward,
    _backward_fake,
)
define_gradient("tied_rotary", _gradient, _save)
