"""All layers of an encoder as one op: inference of few rows, bound by latency.

Of each layer, with the norms folded into the products (docs/block.md):
    w = rstd (x U^T - mean s) + t                      of LN(x)
    o = softmax(scale w_h w_h^T) w_h                   of each head
    z = x + o V^T + b
    x = relu(rstd e (z B - mean s) + f - threshold)    ISTA of LN(z)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cuda_extension
from ..library import define

# csrc/block/encoder_of_few.cu
MOST_TOKENS, MOST_LAYERS = 256, 24
HEADS_OF = {384: 6, 576: 12, 768: 12}
ROWS, COLUMNS = 64, 128  # of a cluster
# Measured on an H200 (docs/performance.md): as long as every row tile has its own clusters it wins
# over a layer after the other, else it loses.
MOST_CLUSTERS = 32


class LayerOfFew(NamedTuple):
    """A layer as the op takes it: matrices in the dtype of x, as fold and fold_gram
    (triton_kernels.py) make them, and vectors in float32."""

    w_qkv: Tensor  # U (D, D)
    qkv_sums: Tensor  # s
    qkv_shift: Tensor  # t
    w_out: Tensor  # V (D, D)
    bias: Tensor  # b
    gram: Tensor  # B^T (D, D)
    gram_scales: Tensor  # e
    gram_sums: Tensor  # s
    gram_shift: Tensor  # f


def takes(x: Tensor, depth: int, heads: int) -> bool:
    """Whether the op runs on x (B, N, D) with square projections, and is the fastest way."""
    b, n, d = x.shape
    clusters = -(-b * n // ROWS) * -(-d // COLUMNS)
    fits = (
        x.dtype in (torch.float16, torch.bfloat16)
        and 0 < n <= MOST_TOKENS
        and 0 < clusters <= MOST_CLUSTERS
        and 0 < depth <= MOST_LAYERS
        and HEADS_OF.get(d) == heads
    )
    return fits and x.is_cuda and not cuda_extension.against("cuda", x.device.index)


def encoder_of_few(
    x: Tensor,
    layers: Sequence[LayerOfFew],
    thresholds: Sequence[float],
    *,
    heads: int,
    scale: float,
    eps: float,
) -> Tensor:
    """x (B, N, D) through all layers, without a gradient. On CUDA only where :func:`takes` it."""
    flat = [t for layer in layers for t in layer]
    numbers = (list(thresholds), heads, scale, eps)
    y: Tensor = torch.ops.crate_kernels.encoder_of_few(x, flat, *numbers)
    return y


def _forward(
    x: Tensor,
    layers: list[Tensor],
    thresholds: list[float],
    heads: int,
    scale: float,
    eps: float,
) -> Tensor:
    kernels: Any
    if x.is_cuda:
        from . import cuda_kernels as kernels
    else:
        from . import torch_kernels as kernels
    each = len(LayerOfFew._fields)
    grouped = [LayerOfFew(*layers[i : i + each]) for i in range(0, len(layers), each)]
    y: Tensor = kernels.encoder_of_few(x, grouped, thresholds, heads, scale, eps)
    return y


def _forward_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


define(
    "encoder_of_few(Tensor x, Tensor[] layers, float[] thresholds, int heads, float scale,"
    " float eps) -> Tensor",
    _forward,
    _forward_fake,
)
