"""The "reference" backend of residual_norm: torch's own kernels, on any device and dtype.

``stats`` holds mean and 1 / sigma of each row, (rows, 2), in float32 or better, as do all sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block import torch_kernels as rows
from ..library import wide_dtype


def forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    z_dtype: torch.dtype,
    dtype: torch.dtype,
    factor: float = 1.0,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """z = x + scale y in ``z_dtype`` (None without y), h = LN(z) in ``dtype``, and the stats.

    h is of the sum before it is rounded. ``factor`` is a scale that is a number.
    """
    wide = wide_dtype(z_dtype)
    added = None if y is None else _scaled(y.to(wide), scale, factor)
    z, h, stats = rows.normalise(x.to(wide), added, None, gamma, beta, eps, wide)
    return (None if y is None else z.to(z_dtype)), h.to(dtype), stats


def backward(
    dz: Tensor | None,
    dh: Tensor,
    z: Tensor,
    stats: Tensor,
    gamma: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype | None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """dx = the norm's gradient (+ dz) in ``x_dtype``, dy = scale dx in ``y_dtype``, dgamma, dbeta
    and dscale = the sum of dx y over rows; no dy without a ``y_dtype``, no dscale without y."""
    wide = z.to(wide_dtype(z.dtype))
    dx, _, dgamma, dbeta, _ = rows.normalise_backward(
        dh, wide, stats, gamma, gamma, dz, False, False
    )
    dy = dscale = None
    if y_dtype is not None:
        dy = _scaled(dx, scale, factor).to(y_dtype)
    if y is not None:
        dscale = (dx * y).view(-1, y.shape[-1]).sum(0)
    return dx.to(x_dtype), dy, dgamma, dbeta, dscale


def _scaled(t: Tensor, scale: Tensor | None, factor: float) -> Tensor:
    if scale is not None:
        return t * scale.to(t.dtype)
    return t if factor == 1 else t * factor
