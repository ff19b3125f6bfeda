"""Residual and LayerNorm in Triton: the passes over rows of a CRATE layer, with a scale: a factor
for each column, or one number.

    forward   z = x + scale y, h = gamma (z - mean) rstd + beta       normalise_kernel
    backward  dx = rstd (t - mean(t) - zhat mean(t zhat)) + dz        normalise_backward_kernel
              dy = scale dx, dscale = sum dx y, dgamma, dbeta         and sum_partials_kernel

The kernels are block's, the contracts those of torch_kernels.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..block.triton_kernels import (
    RowsConfig,
    normalise_backward_kernel,
    normalise_kernel,
    sum_partials,
)
from ..library import on_device_of
from ..triton_common import multiprocessors


# Measured on an H200 with 25216 rows, x in float32 and y in bfloat16: docs/residual_norm.md.
def forward_config(d: int) -> RowsConfig:
    if d <= 256:
        return RowsConfig(rows=4, num_warps=2)
    block = triton.next_power_of_2(d)
    return RowsConfig(rows=1, num_warps=1 if d <= 576 else min(block // 512, 16))


def backward_config(d: int) -> RowsConfig:
    if d <= 256:
        return RowsConfig(rows=4, num_warps=8, programs=3)
    if d <= 1024:
        return RowsConfig(rows=2, num_warps=4, programs=3 if d <= 768 else 2)
    block = triton.next_power_of_2(d)
    return RowsConfig(rows=1, num_warps=min(block // 512, 16), programs=3 if d <= 2048 else 1)


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
    d = x.shape[-1]
    n_rows = x.numel() // d
    z = None if y is None else torch.empty(x.shape, dtype=z_dtype, device=x.device)
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    stats = torch.empty(n_rows, 2, dtype=torch.float32, device=x.device)
    config = forward_config(d)
    if n_rows > 0:
        with on_device_of(x):
            normalise_kernel[(triton.cdiv(n_rows, config.rows),)](
                x, y, scale, None, gamma, beta, z, h, stats, n_rows, eps,
                D=d, BLOCK=triton.next_power_of_2(d), ROWS=config.rows,
                ADD=y is not None, ADD_BIAS=False, WRITE_Z=y is not None, WRITE_H=True,
                FACTOR=factor, num_warps=config.num_warps,
            )  # fmt: skip
    return z, h, stats


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
    d = z.shape[-1]
    n_rows = z.numel() // d
    dx = torch.empty(z.shape, dtype=x_dtype, device=z.device)
    dy = None if y_dtype is None else torch.empty(z.shape, dtype=y_dtype, device=z.device)
    config = backward_config(d)
    programs = min(triton.cdiv(n_rows, config.rows), config.programs * multiprocessors(z))
    n_sums = 2 if y is None else 3
    partials = torch.empty(programs, n_sums, d, dtype=torch.float32, device=z.device)
    if n_rows > 0:
        with on_device_of(z):
            normalise_backward_kernel[(programs,)](
                dh, z, stats, gamma, None, dz, y, scale, dx, dy, None, partials, n_rows,
                D=d, BLOCK=triton.next_power_of_2(d), ROWS=config.rows,
                ADD=dz is not None, WRITE_H=False, SUM_DZ=y is not None, MASK=False,
                FACTOR=factor, num_warps=config.num_warps,
            )  # fmt: skip
    return dx, dy, *sum_partials(partials)
