"""Tied attention by the CUDA kernels of csrc/mssa: float16 and bfloat16, compute capability 9.0.

The formulas are those of triton_kernels.py; w and dO are read in place by bulk tensor copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cuda_extension
from ..library import on_device_of


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
    do: Tensor, w: Tensor, o: Tensor, lse: Tensor, heads: int, scale: float, causal: bool
) -> Tensor:
    """dw, shaped as w, from do, shaped as o."""
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
            scratch=scratch.data_ptr(),
            grad_w=dw.data_ptr(),
            **_options(w, heads, scale, causal),
        )
    return dw


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
        "stream": torch.cuda.current_stream(w.device).cuda_stream,
    }


def _readable_in_place(t: Tensor) -> Tensor:
    """t itself where bulk copies can read it, in steps of 16 bytes (none of zero), else a copy."""
    steps = (t.stride(0), t.stride(1))
    if t.stride(2) == 1 and all(s > 0 and s % 8 == 0 for s in steps) and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)
