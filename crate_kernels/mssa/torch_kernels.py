"""The "reference" backend of tied attention: torch's own kernels, on any device and dtype.

On the CPU these are the fused kernels behind ``scaled_dot_product_attention``; elsewhere the
formulas of reference.py, a few heads at a time so that memory stays bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import (
    merge_heads,
    split_heads,
    subspace_attention,
    tied_attention_reference_backward,
)

# The largest score tensor one step may hold, in elements (256 MB in float32).
MAX_SCORES = 1 << 26


def forward(w: Tensor, heads: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """w (B, N, heads*head_dim) -> o like w, and the log-sum-exp (B, heads, N)."""
    batch, n, _ = w.shape
    wh = split_heads(w.contiguous(), heads)
    if w.device.type == "cpu":
        if batch == 0:
            return torch.empty_like(w), w.new_empty(0, heads, n, dtype=lse_dtype(w))
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            wh, wh, wh, 0.0, causal, scale=scale
        )
        return merge_heads(o).contiguous(), lse.to(lse_dtype(w)).contiguous()
    o = torch.empty_like(wh, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, n, dtype=lse_dtype(w), device=w.device)
    for rows in _steps(batch, heads, n):
        part = wh[rows].to(lse.dtype)
        p, lse[rows] = subspace_attention(part, scale, causal)
        o[rows] = (p @ part).to(w.dtype)
    return merge_heads(o).contiguous(), lse


def backward(
    do: Tensor, w: Tensor, o: Tensor, lse: Tensor, heads: int, scale: float, causal: bool
) -> Tensor:
    """dw, shaped as w, from do, shaped as o."""
    batch, n, _ = w.shape
    wh, doh, oh = (split_heads(t, heads) for t in (w.contiguous(), do.contiguous(), o))
    if w.device.type == "cpu" and batch > 0:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            doh, wh, wh, wh, oh, lse, 0.0, causal, scale=scale
        )
        return merge_heads(dq.add_(dk).add_(dv)).contiguous()
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    for rows in _steps(batch, heads, n):
        dwh = tied_attention_reference_backward(
            merge_heads(doh[rows].to(lse.dtype)),
            merge_heads(wh[rows].to(lse.dtype)),
            heads=wh[rows].shape[1],
            scale=scale,
            causal=causal,
        )
        split_heads(dw, heads)[rows] = split_heads(dwh, wh[rows].shape[1]).to(w.dtype)
    return dw


def _steps(batch: int, heads: int, n: int) -> list[tuple[slice, slice]]:
    """Slices over (batch, heads) that keep each step's scores under MAX_SCORES."""
    per_step = max(1, MAX_SCORES // (n * n))
    if per_step >= heads:
        images = per_step // heads
        return [(slice(b, b + images), slice(None)) for b in range(0, batch, images)]
    return [
        (slice(b, b + 1), slice(h, h + per_step))
        for b in range(batch)
        for h in range(0, heads, per_step)
    ]


def lse_dtype(w: Tensor) -> torch.dtype:
    """float32, or float64 for float64: the dtype statistics and sums are kept in."""
    return torch.promote_types(w.dtype, torch.float32)
