"""The encoder block of the published CRATE-MAE, unfused."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .crate import block


class MAEEncoderBlock(nn.Module):
    """One layer, ``x = x + MSSA(LN(x))``, ``x = ISTA(LN(x))``, with lambda 0.5; x is (B, N, dim).

    Keys: ``layers.0.0.{norm,fn}.*`` (MSSA) and ``layers.0.1.{norm,fn}.*`` (ISTA).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        step_size: float = 0.1,
        lambd: float = 0.5,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        steps = block(dim, heads, dim_head, dropout, step_size, lambd, device=device, dtype=dtype)
        self.layers = nn.ModuleList([steps])

    def forward(
        self, x: Tensor, return_attention: bool = False, return_key: bool = False
    ) -> Tensor:
        """x (B, N, dim) -> the same, or what MSSA returns for these flags."""
        layer: Any
        for layer in self.layers:
            attn, ff = layer
            if return_attention or return_key:
                return attn(x, return_attention=return_attention, return_key=return_key)
            x = ff(attn(x) + x)
        return x
