"""Multi-head subspace self-attention (MSSA), White-Box Transformers, arXiv 2311.13110, section 2.

w = x U^T                     one projection is query, key and value
o_h = softmax(scale w_h w_h^T) w_h                   for each head h
y = o W_out^T + b
dw = P^T dO + scale (dS + dS^T) w,  dS = P * (dP - rowsum(dO * O)),  dP = dO w^T
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..checks import check_heads, check_number, check_tensors, refuse
from ..library import autocast_dtype, define, define_gradient
from . import torch_kernels
from .dropout import seed_tensor
from .masks import Mask, beyond, check_masks, lse_shape
from .projected import attention_projected

FLOAT32 = torch.finfo(torch.float32)


def mssa(
    x: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""One multi-head subspace self-attention step, without norm and residual.

    .. math:: y = \mathrm{concat}_h(\mathrm{softmax}(s\, w_h w_h^T)\, w_h)\, W_{out}^T + b,
              \qquad w = x W_{qkv}^T

    where :math:`w_h` is head h's slice of w, a set of tokens in the subspace :math:`U_h`.

    Args:
        x: tokens (B, N, D), or with cu_seqlens (T, D).
        w_qkv: the tied projection (heads*head_dim, D): query, key and value at once.
        w_out: output projection (D, heads*head_dim), or None to return the heads as they are
            (the published Identity case).
        b_out: bias (D,) of the output projection, or None.
        heads: number of heads; must divide ``w_qkv.shape[0]``.
        scale: factor on the scores, > 0 in float32; head_dim**-0.5 by default.
        causal: let token i see tokens 0..i only.
        lengths: (B,), int32 or int64, on x's device: item b has the tokens 0..lengths[b]-1. No
            token sees those past them; there the output and the gradient of x are zero.
        cu_seqlens: (S+1,), int32 or int64, on x's device: the packed tokens (T, D) are S
            sequences, the s-th in the rows cu_seqlens[s] to cu_seqlens[s+1]-1, each by itself.
        max_seqlen: with cu_seqlens, the length of the longest sequence, or more.
        window: token i sees only tokens j with abs(i - j) <= window.
        dropout: probability, below 1, that a weight of a softmax is dropped; the others grow by
            1 / (1 - dropout). Not for evaluation: there is no training flag here.
        seed: the int64 that decides which ones, or a tensor of one on x's device (which a
            captured CUDA graph reads anew); None draws one from torch's generator.
        backend: "auto", "cuda", "triton" or "reference"; see :func:`crate_kernels.explain`.

    Returns:
        As x: (B, N, D), or (B, N, heads*head_dim) without w_out. The dtype is that of
        ``F.linear``: autocast's where autocast is on, else that of x.

    Lengths may be zero. Their values are not looked at on a GPU, where that would wait for it:
    0 <= lengths <= N, cu_seqlens from 0 to T in steps of 0 to max_seqlen are the caller's to keep.
    (Kernels read nothing past N or max_seqlen rows; rows of no sequence come out undefined.)

    Dtypes: float16, bfloat16, float32 (which honours ``torch.get_float32_matmul_precision()``),
    float64 (by the reference backend). Statistics and sums are kept in float32 or better.

    Raises:
        ValueError: shapes, devices, heads or a backend that do not fit.
        TypeError: not tensors, not floating, or of mixed dtypes with autocast off.

    Source: arXiv 2311.13110, MSSA operator (eq. 13 there: SSA of each head, summed by W_out).
    """
    _check_mssa(x, w_qkv, w_out, b_out, heads, cu_seqlens)
    _check_options("mssa", scale, causal)
    options = check_masks("mssa", x, lengths, cu_seqlens, max_seqlen, window, dropout, seed)
    head_dim = w_qkv.shape[0] // heads
    backend = backends.choose("mssa", backend, x, autocast_dtype(x), head_dim, options)
    w = F.linear(x, w_qkv)
    sequences = lengths if cu_seqlens is None else cu_seqlens
    if w_out is not None and backend == "cuda":  # which has no masks
        scale = head_dim**-0.5 if scale is None else float(scale)
        return attention_projected(
            w, w_out, b_out, heads=heads, scale=scale, causal=causal, backend=backend
        )
    masks = (sequences, max_seqlen, window, dropout, seed)
    o = _attend(w, heads, scale, causal, *masks, backend)
    if w_out is None:
        return o
    y = F.linear(o, w_out, b_out)
    if lengths is None or b_out is None:
        return y
    return y.masked_fill(beyond(lengths, x.shape[1]), 0)


def tied_attention(
    w: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Attention whose query, key and value are one tensor: the core of :func:`mssa`.

    .. math:: o_h = \mathrm{softmax}(s\, w_h w_h^T)\, w_h

    Args:
        w: projected tokens (B, N, heads*head_dim), or with cu_seqlens (T, heads*head_dim).
        heads, scale, causal, masks, backend, dtypes and errors: as in :func:`mssa`.

    Returns:
        Shaped as w, contiguous, of w's dtype (autocast's where it is on).

    Source: arXiv 2311.13110, SSA operator. The gradient is one pass over pairs of row tiles,
    bitwise repeatable; its derivation is in docs/mssa.md.
    """
    _check_core(w, heads, cu_seqlens)
    _check_options("tied_attention", scale, causal)
    options = check_masks(
        "tied_attention", w, lengths, cu_seqlens, max_seqlen, window, dropout, seed
    )
    w = w.to(autocast_dtype(w))
    head_dim = w.shape[-1] // heads
    backend = backends.choose("tied_attention", backend, w, w.dtype, head_dim, options)
    sequences = lengths if cu_seqlens is None else cu_seqlens
    masks = (sequences, max_seqlen, window, dropout, seed)
    return _attend(w, heads, scale, causal, *masks, backend)


def _attend(
    w: Tensor,
    heads: int,
    scale: float | None,
    causal: bool,
    sequences: Tensor | None,
    longest: int | None,
    window: int | None,
    dropout: float,
    seed: int | Tensor | None,
    backend: str,
) -> Tensor:
    scale = (w.shape[-1] // heads) ** -0.5 if scale is None else float(scale)
    ops = torch.ops.crate_kernels
    if sequences is None and window is None and dropout == 0:
        o, _ = ops.tied_attention(w, heads, scale, causal, backend)
    else:
        drawn = None if dropout == 0 else seed_tensor(seed, w.device)
        options = (heads, scale, causal, longest or 0, window, float(dropout), backend)
        o, _ = ops.tied_attention_masked(w, sequences, drawn, *options)
    return o


def explain_mssa(
    x: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> backends.Explanation:
    """Which backends fit these arguments of :func:`mssa`, and why the others do not."""
    _check_mssa(x, w_qkv, w_out, b_out, heads, cu_seqlens)
    _check_options("mssa", scale, causal)
    options = check_masks("mssa", x, lengths, cu_seqlens, max_seqlen, window, dropout, seed)
    return backends.explain("mssa", x, autocast_dtype(x), w_qkv.shape[0] // heads, options)


def explain_tied_attention(
    w: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> backends.Explanation:
    """Which backends fit these arguments of :func:`tied_attention`, and why the others do not."""
    _check_core(w, heads, cu_seqlens)
    _check_options("tied_attention", scale, causal)
    options = check_masks(
        "tied_attention", w, lengths, cu_seqlens, max_seqlen, window, dropout, seed
    )
    return backends.explain("tied_attention", w, autocast_dtype(w), w.shape[-1] // heads, options)


def _check_core(w: Tensor, heads: int, cu_seqlens: Tensor | None) -> None:
    check_tensors("tied_attention", {"w": w})
    if cu_seqlens is not None:
        if w.dim() != 2:
            refuse("tied_attention", "packed w of shape (T, heads*head_dim)", tuple(w.shape))
    elif w.dim() != 3 or w.shape[1] == 0:
        refuse("tied_attention", "w of shape (B, N, heads*head_dim), N > 0", tuple(w.shape))
    check_heads("tied_attention", heads, w.shape[-1])


def _check_options(op: str, scale: float | None, causal: bool) -> None:
    if scale is not None:
        check_number(op, "scale", scale, above_zero=True)
        if not FLOAT32.tiny <= scale <= FLOAT32.max:  # what the kernels take it as
            refuse(op, f"scale between {FLOAT32.tiny:.4g} and {FLOAT32.max:.4g}", scale)
    if not isinstance(causal, bool):
        refuse(op, "causal to be a bool", type(causal).__name__, TypeError)


def _check_mssa(
    x: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None,
    b_out: Tensor | None,
    heads: int,
    cu_seqlens: Tensor | None,
) -> None:
    check_tensors("mssa", {"x": x, "w_qkv": w_qkv}, {"w_out": w_out, "b_out": b_out})
    if w_qkv.dim() != 2:
        refuse("mssa", "w_qkv of shape (heads*head_dim, D)", tuple(w_qkv.shape))
    inner, width = w_qkv.shape
    if cu_seqlens is not None:
        if x.dim() != 2 or x.shape[1] != width:
            refuse("mssa", f"packed x of shape (T, D) with D = {width}", tuple(x.shape))
    elif x.dim() != 3 or x.shape[2] != width or x.shape[1] == 0:
        refuse("mssa", f"x of shape (B, N, D) with N > 0 and D = {width}", tuple(x.shape))
    check_heads("mssa", heads, inner)
    if w_out is not None and w_out.shape != (width, inner):
        refuse("mssa", f"w_out of shape (D, heads*head_dim) = {(width, inner)}", tuple(w_out.shape))
    if b_out is not None and w_out is None:
        refuse("mssa", "b_out only together with w_out", "b_out without w_out")
    if b_out is not None and b_out.shape != (width,):
        refuse("mssa", f"b_out of shape (D,) = {(width,)}", tuple(b_out.shape))


# ---- registration: crate_kernels::tied_attention and its backward


def _kernels(backend: str) -> Any:
    """The module that runs ``backend``; Triton is imported at the first launch, not before."""
    if backend == "cuda":
        from . import cuda_kernels

        return cuda_kernels
    if backend == "triton":
        from . import triton_kernels

        return triton_kernels
    return torch_kernels


def _forward(
    w: Tensor, heads: int, scale: float, causal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return _kernels(backend).forward(w, heads, scale, causal)


def _forward_fake(
    w: Tensor, heads: int, scale: float, causal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    lse = w.new_empty(lse_shape(w, heads), dtype=torch_kernels.lse_dtype(w))
    return w.new_empty(w.shape), lse


def _backward(
    do: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    heads: int,
    scale: float,
    causal: bool,
    backend: str,
) -> Tensor:
    return _kernels(backend).backward(do, w, o, lse, heads, scale, causal)


def _backward_fake(do: Tensor, w: Tensor, *rest: Any) -> Tensor:
    return w.new_empty(w.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    w, *ctx.options = inputs
    ctx.save_for_backward(w, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of the others no zeros are made


def _gradient(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 5
    dw = torch.ops.crate_kernels.tied_attention_backward(do, *ctx.saved_tensors, *ctx.options)
    return dw, None, None, None, None


define(
    "tied_attention(Tensor w, int heads, float scale, bool causal, str backend)"
    " -> (Tensor o, Tensor lse)",
    _forward,
    _forward_fake,
)
define(
    "tied_attention_backward(Tensor do, Tensor w, Tensor o, Tensor lse, int heads, float scale,"
    " bool causal, str backend) -> Tensor",
    _backward,
    _backward_fake,
)
define_gradient("tied_attention", _gradient, _save)


# ---- registration: crate_kernels::tied_attention_masked, with sequences, a window or dropout


def _masked_forward(
    w: Tensor,
    sequences: Tensor | None,
    seed: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
    longest: int,
    window: int | None,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    mask = Mask(sequences, longest, window, dropout, seed)
    return _kernels(backend).forward(w, heads, scale, causal, mask)


def _masked_forward_fake(
    w: Tensor, sequences: Tensor | None, seed: Tensor | None, heads: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    lse = w.new_empty(lse_shape(w, heads), dtype=torch_kernels.lse_dtype(w))
    return w.new_empty(w.shape), lse


def _masked_backward(
    do: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    sequences: Tensor | None,
    seed: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
    longest: int,
    window: int | None,
    dropout: float,
    backend: str,
) -> Tensor:
    mask = Mask(sequences, longest, window, dropout, seed)
    return _kernels(backend).backward(do, w, o, lse, heads, scale, causal, mask)


def _masked_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    w, sequences, seed, *ctx.options = inputs
    ctx.save_for_backward(w, *output, sequences, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _masked_gradient(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 10
    saved = (do, *ctx.saved_tensors, *ctx.options)
    return torch.ops.crate_kernels.tied_attention_masked_backward(*saved), *(None,) * 9


define(
    "tied_attention_masked(Tensor w, Tensor? sequences, Tensor? seed, int heads, float scale,"
    " bool causal, SymInt longest, SymInt? window, float dropout, str backend)"
    " -> (Tensor o, Tensor lse)",
    _masked_forward,
    _masked_forward_fake,
)
define(
    "tied_attention_masked_backward(Tensor do, Tensor w, Tensor o, Tensor lse, Tensor? sequences,"
    " Tensor? seed, int heads, float scale, bool causal, SymInt longest, SymInt? window,"
    " float dropout, str backend) -> Tensor",
    _masked_backward,
    _backward_fake,
)
define_gradient("tied_attention_masked", _masked_gradient, _masked_save, "tied_attention")
