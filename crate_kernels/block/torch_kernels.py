"""The passes over rows of a CRATE layer by torch's own kernels, on any device and dtype.

``stats`` holds mean and 1 / sigma of each row, (rows, 2), in float32 or better, as do all sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..mssa import torch_kernels as attention
from .of_few import LayerOfFew


def normalise(
    x: Tensor,
    p: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = x (+ p (+ bias)), h = gamma (z - mean) / sigma + beta, and the stats.

    z and h are in ``dtype``, h of the sum before it is rounded; z is x itself where nothing
    changes it.
    """
    wide = _wide(x)
    for added in (p, bias):
        wide = wide if added is None else wide + added
    z = x if p is None else wide
    h, mean, rstd = torch.native_layer_norm(
        wide, z.shape[-1:], gamma.to(wide.dtype), beta.to(wide.dtype), eps
    )
    return z.to(dtype), h.to(dtype), torch.stack((mean.flatten(), rstd.flatten()), dim=1)


def rounded(w_qkv: Tensor, w_out: Tensor | None, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Their elements in ``dtype``, one tensor after another."""
    given = [t for t in (w_qkv, w_out, weight) if t is not None]
    return torch.cat([t.flatten().to(dtype) for t in given])


def normalise_backward(
    dh: Tensor,
    z: Tensor,
    stats: Tensor,
    gamma: Tensor,
    beta: Tensor,
    skip: Tensor | None,
    wants_h: bool,
    wants_sum: bool,
    masks: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """dz = the norm's gradient (+ skip), h again, dgamma, dbeta, and the sum over rows of dz, or of
    the skip where there is one.

    Where ``masks``, dz is 0 where z is.
    The sums are in the dtype of the stats.
    """
    wide, rows = _wide(z), (*z.shape[:-1], 1)
    mean, rstd = (s.contiguous().view(rows) for s in stats.unbind(1))
    gc, bc = gamma.to(wide.dtype), beta.to(wide.dtype)
    dz, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
        dh.to(wide.dtype), wide, z.shape[-1:], mean, rstd, gc, bc, [True, True, True]
    )
    if skip is not None:
        dz = dz + skip
    if masks:
        dz = dz.masked_fill(z == 0, 0)
    h = torch.addcmul(bc, (wide - mean) * rstd, gc).to(z.dtype) if wants_h else None
    summed = dz if skip is None else skip.to(wide.dtype)
    dsum = summed.flatten(0, -2).sum(0) if wants_sum else None
    return dz.to(z.dtype), h, dgamma, dbeta, dsum


def encoder_of_few(
    x: Tensor,
    layers: Sequence[LayerOfFew],
    thresholds: Sequence[float],
    heads: int,
    scale: float,
    eps: float,
) -> Tensor:
    """x through all layers (of_few.py), what is written between steps in the dtype of x."""

    def normed(t: Tensor, weight: Tensor, sums: Tensor, scales: Tensor | float) -> Tensor:
        wide = _wide(t)
        mean = wide.mean(-1, keepdim=True)
        rstd = (wide.var(-1, keepdim=True, correction=0) + eps).rsqrt()
        return rstd * scales * (wide @ weight.to(wide.dtype).mT - mean * sums)

    for layer, threshold in zip(layers, thresholds, strict=True):
        w = (normed(x, layer.w_qkv, layer.qkv_sums, 1.0) + layer.qkv_shift).to(x.dtype)
        o, _ = attention.forward(w, heads, scale, False)
        z = (_wide(x) + _wide(o) @ _wide(layer.w_out).mT + layer.bias).to(x.dtype)
        y = normed(z, layer.gram, layer.gram_sums, layer.gram_scales) + layer.gram_shift
        x = torch.relu(y - threshold).to(x.dtype)
    return x


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
