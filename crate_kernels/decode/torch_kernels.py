"""The "reference" backend of decoding: torch's own kernels, on any device and dtype.

On the CPU the fused kernels behind ``scaled_dot_product_attention``, an item at a time on the
rows that it has; elsewhere the formulas of reference.py on the whole cache, without a host sync.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mssa.reference import merge_heads, split_heads
from ..mssa.torch_kernels import lse_dtype
from .reference import attend, write_tokens


def decode(w: Tensor, cache: Tensor, lengths: Tensor, heads: int, scale: float) -> Tensor:
    """w (B, T, heads*head_dim) -> o like w, contiguous; writes w into cache (B, capacity, ...)."""
    if w.device.type != "cpu":
        write_tokens(w, cache, lengths)
        wide = lse_dtype(w)
        return attend(w.to(wide), cache.to(wide), lengths, heads, scale).to(w.dtype).contiguous()
    o = w.new_full(w.shape, float("nan"))
    for b, length in enumerate(lengths.tolist()):
        n_new = min(w.shape[1], cache.shape[1] - length) if length >= 0 else 0
        if n_new <= 0:
            continue
        end = length + n_new
        cache[b, length:end] = w[b, :n_new]
        wh = split_heads(w[b : b + 1, :n_new], heads)
        rows = split_heads(cache[b : b + 1, :end], heads)
        seen = None if n_new == 1 else torch.ones(n_new, end, dtype=torch.bool).tril(length)
        oh = F.scaled_dot_product_attention(wh, rows, rows, attn_mask=seen, scale=scale)
        o[b, :n_new] = merge_heads(oh)[0]
    return o
