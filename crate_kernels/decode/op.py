"""Decoding with a cache of one tensor: query, key and value are w, so the cache of a layer is w.

cache[b, lengths[b] + t] = w[b, t]
o[b, t] = softmax(scale w[b, t] c^T) c,   c = cache[b, : lengths[b] + t + 1]       for each head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_heads, check_tensors, refuse
from ..library import define
from ..mssa.op import _check_options

NAME = "tied_attention_decode"


def tied_attention_decode(
    w: Tensor,
    cache: Tensor,
    lengths: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""A step of generation: attention of new tokens to all that came before, and to themselves.

    .. math:: o_t = \mathrm{softmax}(s\, w_t c_{0..p}^T)\, c_{0..p}, \qquad c_p = w_t,
              \qquad p = \mathrm{length} + t

    for each head: :func:`crate_kernels.tied_attention` with causal=True, continued. The cache is
    one tensor, half of what other transformers keep.

    Args:
        w: projected new tokens (B, T, heads*head_dim), mostly T = 1. Whatever depends on the
            position (rotary embedding) is applied before.
        cache: (B, capacity, heads*head_dim), its rows in one piece (stride 1 along the last
            dimension); a layer of a larger tensor will do. Written to: row lengths[b] + t of
            item b becomes w[b, t]. Rows from there on may hold anything before.
        lengths: tokens that item b has in the cache already, (B,), int32, on the device of w. The
            caller adds T afterwards.
        heads, scale, backend: as in :func:`crate_kernels.mssa`.

    Returns:
        o (B, T, heads*head_dim), contiguous, of the dtype of cache. A token that does not fit
        (lengths[b] + t >= capacity, or lengths[b] < 0) is not written anywhere, and its row of o
        is NaN: lengths are on the device, where nothing can be raised.

    Dtypes: float16, bfloat16, float32, float64 (by the reference backend), those of cache; w is
    converted under autocast. Scores, statistics and sums are kept in float32 or better.

    There is no host sync on a GPU, and every launch is the same whatever lengths holds, so a step
    can be captured in a CUDA graph and replayed while lengths grows.

    Raises:
        ValueError: shapes, devices, heads or a backend that do not fit.
        TypeError: not tensors, not floating, lengths not int32, or w of another dtype than cache
            with autocast off.
        RuntimeError: a gradient is wanted (inference only: call it under torch.no_grad()).

    Source: arXiv 2311.13110, SSA operator. The split along the context: docs/decode.md.
    """
    _check(w, cache, lengths, heads)
    _check_options(NAME, scale, True)
    if torch.is_grad_enabled() and (w.requires_grad or cache.requires_grad):
        raise RuntimeError(
            f"{NAME}: expected no gradient to be wanted, got w or cache with requires_grad; call "
            "it under torch.no_grad(), or train with tied_attention(..., causal=True)"
        )
    head_dim = w.shape[2] // heads
    backend = backends.choose(NAME, backend, cache, cache.dtype, head_dim)
    scale = head_dim**-0.5 if scale is None else float(scale)
    return torch.ops.crate_kernels.tied_attention_decode(
        w.to(cache.dtype), cache, lengths, heads, scale, backend
    )


def explain_tied_attention_decode(
    w: Tensor, cache: Tensor, lengths: Tensor, *, heads: int, scale: float | None = None
) -> backends.Explanation:
    """Which backends fit these arguments of :func:`tied_attention_decode`, and why others not."""
    _check(w, cache, lengths, heads)
    _check_options(NAME, scale, True)
    return backends.explain(NAME, cache, cache.dtype, w.shape[2] // heads)


def _check(w: Tensor, cache: Tensor, lengths: Tensor, heads: int) -> None:
    check_tensors(NAME, {"cache": cache, "w": w})
    if w.dim() != 3 or w.shape[1] == 0:
        refuse(NAME, "w of shape (B, T, heads*head_dim), T > 0", tuple(w.shape))
    batch, _, width = w.shape
    check_heads(NAME, heads, width)
    if cache.dim() != 3 or (cache.shape[0], cache.shape[2]) != (batch, width) or not cache.shape[1]:
        refuse(NAME, f"cache of shape ({batch}, capacity > 0, {width})", tuple(cache.shape))
    if width > 1 and cache.stride(2) != 1:
        refuse(NAME, "cache with stride 1 along its last dimension", cache.stride(2))
    if cache.stride(1) >= 1 << 24:  # what 32 bits reach within a step
        refuse(NAME, "cache with rows less than 2^24 elements apart", cache.stride(1))
    if not isinstance(lengths, Tensor):
        refuse(NAME, "lengths to be a torch.Tensor", type(lengths).__name__, TypeError)
    if lengths.dtype != torch.int32:
        refuse(NAME, "lengths of dtype int32", lengths.dtype, TypeError)
    if lengths.shape != (batch,):
        refuse(NAME, f"lengths of shape ({batch},)", tuple(lengths.shape))
    if lengths.device != cache.device:
        refuse(NAME, f"lengths on the device of cache, {cache.device}", lengths.device)


# ---- registration: crate_kernels::tied_attention_decode, which writes to cache and has no gradient


def _kernels(backend: str) -> Any:
    """The module that runs ``backend``; Triton is imported at the first launch, not before."""
    if backend == "triton":
        from . import triton_kernels

        return triton_kernels
    from . import torch_kernels

    return torch_kernels


def _decode(
    w: Tensor, cache: Tensor, lengths: Tensor, heads: int, scale: float, backend: str
) -> Tensor:
    if not cache.is_inference():  # those count no versions
        torch.autograd.graph.increment_version(cache)
    return _kernels(backend).decode(w, cache, lengths, heads, scale)


def _decode_fake(w: Tensor, cache: Tensor, *rest: Any) -> Tensor:
    return w.new_empty(w.shape)


define(
    "tied_attention_decode(Tensor w, Tensor(a!) cache, Tensor lengths, int heads, float scale,"
    " str backend) -> Tensor",
    _decode,
    _decode_fake,
)
