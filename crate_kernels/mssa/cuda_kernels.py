"""Tied attention by the CUDA kernels of csrc/mssa: float16 and bfloat16, compute capability 9.0.

The formulas are those of triton_kernels.py; w and dO are read in place by bulk tensor copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cuda_extension
from ..cuda_extension import moments_shape, readable
from ..library import on_device_of, stream_of


def forward(w: Tensor, heads: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """w (B, N, heads*head_dim) -> o like w, and the log-sum-exp (B, heads, N) in float32."""
    batch, n, _ = w.shape
    w = _readable_in_place(w)
    o = w.new_empty(w.shape)
    lse = w.new_empty(batch, heads, n, dtype=torch.float32)
    if batch == 0:
        return o, lse
    with on_device_of(w):
        cuda_extension.load().attention_forward(
            o=o.data_ptr(),
            lse=lse.data_ptr(),
            **_options(w, heads, scale, causal),
        )
    return o, lse


def backward(
    do: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    heads: int,
    scale: float,
    causal: bool,
    delta: Tensor | None = None,
) -> Tensor:
    """dw, shaped as w, from do, shaped as o, and delta where output_gradient has made it."""
    batch, n, _ = w.shape
    w, do = _readable_in_place(w), _readable_in_place(do)
    dw = w.new_empty(w.shape)
    if batch == 0:
        return dw
    kernels = cuda_extension.load()
    size = kernels.attention_backward_scratch(batch=batch, n=n, heads=heads)
    scratch = w.new_empty(size, dtype=torch.uint8)
    with on_device_of(w):
        kernels.attention_backward(
            grad_o=do.data_ptr(),
            grad_o_stride_batch=do.stride(0),
            grad_o_stride_row=do.stride(1),
            o=o.data_ptr(),
            lse=lse.data_ptr(),
            delta=0 if delta is None else delta.data_ptr(),
            scratch=scratch.data_ptr(),
            grad_w=dw.data_ptr(),
            **_options(w, heads, scale, causal),
        )
    return dw


def takes_rows(rows: int, inner: int, d: int) -> bool:
    """Whether :func:`normed_projection` is the faster way: its tiles fill the multiprocessors."""
    return d % 8 == 0 and rows * inner >= 128 * 192 * 132


def normed_projection(x: Tensor, stats: Tensor, folded: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """LN(x) U^T from x, mean and rstd of its rows, and U as block/triton_kernels.py folds it."""
    weight, sums, shift = folded
    x = readable(x)
    inner, d = weight.shape
    w = x.new_empty(*x.shape[:-1], inner)
    with on_device_of(x):
        cuda_extension.load().normed_projection(
            x=x.data_ptr(),
            stats=stats.data_ptr(),
            weight=weight.data_ptr(),
            sums=sums.data_ptr(),
            shift=shift.data_ptr(),
            w=w.data_ptr(),
            rows=x.numel() // d,
            d=d,
            inner=inner,
            dtype=cuda_extension.DTYPES[x.dtype],
            stream=stream_of(x),
        )
    return w


def residual_projection(
    o: Tensor, x: Tensor, w_out: Tensor, b_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """z = x + o w_out^T + b_out and the moments of its rows, for D a multiple of 64."""
    d = x.shape[-1]
    rows = x.numel() // d
    o, x, w_out = readable(o), readable(x), readable(w_out.to(x.dtype))
    z = torch.empty_like(x)
    moments = torch.empty(moments_shape(rows, d), dtype=torch.float32, device=x.device)
    bias = None if b_out is None else b_out.float().contiguous()
    with on_device_of(x):
        cuda_extension.load().residual_projection(
            o=o.data_ptr(),
            w_out=w_out.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            x=x.data_ptr(),
            z=z.data_ptr(),
            moments=moments.data_ptr(),
            rows=rows,
            d=d,
            inner=o.shape[-1],
            dtype=cuda_extension.DTYPES[x.dtype],
            stream=stream_of(x),
        )
    return z, moments


def output_gradient(
    dy: Tensor, w_out: Tensor, o: Tensor, heads: int, wants_sum: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """do = dy w_out of y = o w_out^T; and, where one kernel makes all, rowsum(do * o), (heads, B,
    N), and if wanted the sum of dy over its rows, (D,).

    That is the GEMM of csrc/ista, for a head_dim of 64 and where the backward pass wants the sums.
    """
    batch, n, width = o.shape
    d = dy.shape[-1]
    if width != 64 * heads or n <= 64 or d % 8 != 0 or batch == 0:
        return dy @ w_out, None, None
    do, delta = torch.empty_like(o), o.new_empty(heads, batch, n, dtype=torch.float32)
    dy, w_out = readable(dy), readable(w_out)
    kernels = cuda_extension.load()
    sums = None
    if wants_sum:
        sums = delta.new_empty(kernels.output_gradient_sums(rows=batch * n), 1, d)
    with on_device_of(o):
        kernels.output_gradient(
            dy=dy.data_ptr(),
            w_out=w_out.data_ptr(),
            o=o.data_ptr(),
            grad_o=do.data_ptr(),
            delta=delta.data_ptr(),
            sums=0 if sums is None else sums.data_ptr(),
            rows=batch * n,
            d=d,
            heads=heads,
            dtype=cuda_extension.DTYPES[o.dtype],
            stream=stream_of(o),
        )
    if sums is None:
        return do, delta, None
    from ..block.triton_kernels import sum_partials

    return do, delta, sum_partials(sums)[0]


def _options(w: Tensor, heads: int, scale: float, causal: bool) -> dict[str, Any]:
    """What both launchers take: w, the sizes, and the stream."""
    batch, n, width = w.shape
    return {
        "w": w.data_ptr(),
        "w_stride_batch": w.stride(0),
        "w_stride_row": w.stride(1),
        "batch": batch,
        "n": n,
        "heads": heads,
        "head_dim": width // heads,
        "scale": scale,
        "causal": causal,
        "dtype": cuda_extension.DTYPES[w.dtype],
        "stream": stream_of(w),
    }


def _readable_in_place(t: Tensor) -> Tensor:
    """t itself where bulk copies can read it, in steps of 16 bytes (none of zero), else a copy."""
    steps = (t.stride(0), t.stride(1))
    if t.stride(2) == 1 and all(s > 0 and s % 8 == 0 for s in steps) and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)
