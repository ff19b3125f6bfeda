"""A layer of CRATE-MAE's decoder as published, and the op, under the names of block_inputs."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from helpers import published_mssa
from torch import Tensor

from crate_kernels.block.decoder import decoder_block
from crate_kernels.block.op import PARAMETERS


def published_decoder_block(
    x: Tensor,
    *,
    w_qkv: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    weight: Tensor,
    heads: int,
    **norms: Any,
) -> Tensor:
    """Two norms, the dictionary, MSSA and the difference; the tokens stay in x's dtype."""

    def norm(t: Tensor, i: int) -> Tensor:
        gamma, beta = (norms[f"norm{i}_{name}"].to(t.dtype) for name in ("weight", "bias"))
        return F.layer_norm(t, t.shape[-1:], gamma, beta, 1e-5)

    h = F.linear(norm(x, 2), weight)
    return h - published_mssa(norm(h, 1), w_qkv, w_out, b_out, heads=heads)


def layers_of_ours(x: Tensor, *, heads: int, depth: int = 1, **options: Any) -> Tensor:
    """``depth`` times the same layer; each takes what the op before it knows of its result."""
    parameters = [options.pop(name) for name in PARAMETERS]
    scale = (parameters[2].shape[0] // heads) ** -0.5
    moments = None
    for _ in range(depth):
        x, moments = decoder_block(
            x, moments, *parameters, heads=heads, scale=scale, eps=1e-5, **options
        )
    return x


def published_layers(x: Tensor, *, depth: int = 1, **options: Any) -> Tensor:
    for _ in range(depth):
        x = published_decoder_block(x, **options)
    return x
