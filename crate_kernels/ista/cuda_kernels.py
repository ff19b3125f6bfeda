"""ISTA by the CUDA kernels of csrc/ista: float16 and bfloat16, compute capability 9.0.

    forward   y  = relu(x + xc G - t), the bits of y > 0, moments   ista_forward
              the same of x = LN(z), from z                         ista_normed_forward
    backward  g  = dy where the bits are set, dx = g + g G^T        ista_backward
              M  = xc^T g, and M + M^T                              ista_weight
              dW = eta M - eta W (M + M^T)                          triton_kernels.py
    per step  G  = eta W - eta W^T W                                triton_kernels.py

The bits stand in for y in the backward pass: one for each of its elements (docs/ista.md). Moments
of y spare the norm that comes after a pass over it (docs/block.md). Products
of D^3 and those of fewer tokens than columns are Triton's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import cuda_extension
from ..cuda_extension import mask_bytes, moments_shape, readable
from ..library import on_device_of, stream_of
from . import triton_kernels

make_gram = triton_kernels.make_gram
refresh_gram = triton_kernels.refresh_gram
apply_weight = triton_kernels.apply_weight
backward_weight = triton_kernels.backward_weight


def apply_gram(x: Tensor, xc: Tensor, gram: Tensor, threshold: float) -> Tensor:
    """relu(x + xc G - threshold)"""
    return _forward(x, xc, gram, threshold)


def apply_gram_and_mask(
    x: Tensor, xc: Tensor, gram: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """The same, and the bits of what is not zero in it."""
    d = x.shape[-1]
    mask = torch.empty(mask_bytes(x.numel() // d, d), dtype=torch.uint8, device=x.device)
    return _forward(x, xc, gram, threshold, mask=mask), mask


def apply_gram_and_moments(x: Tensor, gram: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """y = relu(x + x G - threshold) and the moments of its rows."""
    d = x.shape[-1]
    shape = moments_shape(x.numel() // d, d)
    moments = torch.empty(shape, dtype=torch.float32, device=x.device)
    return _forward(x, x, gram, threshold, moments=moments if len(shape) > 1 else None), moments


def apply_normed(
    z: Tensor,
    stats: Tensor,
    normed: Sequence[Tensor],
    threshold: float,
    wants_mask: bool,
    wants_moments: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = relu(u + u G - threshold) of u = LN(z), from z, mean and rstd of its rows, and G as
    block/triton_kernels.py folds it; the bits and the moments where wanted."""
    weight, scales, sums, shift = normed
    z, d = readable(z), z.shape[-1]
    rows = z.numel() // d
    y, mask, moments = torch.empty_like(z), None, None
    if wants_mask:
        mask = torch.empty(mask_bytes(rows, d), dtype=torch.uint8, device=z.device)
    if wants_moments:
        moments = torch.empty(moments_shape(rows, d), dtype=torch.float32, device=z.device)
    _launch(
        "ista_normed_forward", z,
        z=z, stats=stats, weight=weight, scales=scales, sums=sums, shift=shift, y=y, mask=mask,
        moments=moments, threshold=threshold, dtype=z.dtype,
    )  # fmt: skip
    return y, mask, moments


def _forward(
    x: Tensor,
    xc: Tensor,
    gram: Tensor,
    threshold: float,
    mask: Tensor | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, xc.dtype), device=x.device)
    x = xc if x.dtype == xc.dtype else x.to(y.dtype)
    x, xc = readable(x), readable(xc)
    _launch(
        "ista_forward", xc,
        x=x, xc=xc, gram=gram, y=y, mask=mask, moments=moments, threshold=threshold,
        dtype=xc.dtype, x_dtype=y.dtype,
    )  # fmt: skip
    return y


def input_gradient(
    dy: Tensor, mask: Tensor, gram: Tensor, wants_x: bool = True, wants_g: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dx = g + g G^T in the dtype of dy, and g = dy where the mask is set in that of G."""
    dy = readable(dy)
    dx = torch.empty_like(dy) if wants_x else None
    g = torch.empty_like(dy, dtype=gram.dtype) if wants_g or dy.dtype != gram.dtype else None
    _launch(
        "ista_backward", dy,
        dy=dy, mask=mask, gram=gram, g=g, dx=dx, dtype=gram.dtype, x_dtype=dy.dtype,
    )  # fmt: skip
    return dx, g


def gradient_of_masked(g: Tensor, gram: Tensor) -> Tensor:
    """g + g G^T"""
    g = readable(g)
    dx = torch.empty_like(g)
    _launch(
        "ista_backward", g,
        dy=g, mask=None, gram=gram, g=None, dx=dx, dtype=gram.dtype, x_dtype=g.dtype,
    )  # fmt: skip
    return dx


def weight_gradient(
    xc: Tensor, g: Tensor, weight: Tensor, step_size: float, wc: Tensor | None = None
) -> Tensor:
    """dW = eta (M - W (M + M^T)), M = xc^T g summed in parts of the tokens, in float32."""
    xc = readable(xc)
    d = xc.shape[-1]
    if xc.numel() == 0:
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    with on_device_of(xc):
        partials = cuda_extension.load().ista_weight_parts(xc.numel() // d, d)
    m = torch.empty(d, d, dtype=torch.float32, device=xc.device)
    # float16 cannot hold a scaled M: its product runs in TF32.
    dtype = torch.float32 if xc.dtype == torch.float16 else xc.dtype
    both = torch.empty_like(m, dtype=dtype)
    _launch(
        "ista_weight", xc,
        x=xc, g=g, partials=m.new_empty(partials, d, d), m=m, both=both, dtype=xc.dtype,
    )  # fmt: skip
    return triton_kernels.weight_gradient_of_sums(m, both, weight, step_size, xc.dtype, wc)


def _launch(name: str, like: Tensor, **arguments: Any) -> None:
    """Call the launcher on the rows of ``like``, if there are any: tensors by address, dtypes by
    name."""
    if like.numel() == 0:
        return

    def plain(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return cuda_extension.DTYPES[value]
        return value.data_ptr() if isinstance(value, Tensor) else value or 0

    d = like.shape[-1]
    with on_device_of(like):
        getattr(cuda_extension.load(), name)(
            **{key: plain(value) for key, value in arguments.items()},
            rows=like.numel() // d,
            d=d,
            stream=stream_of(like),
        )
