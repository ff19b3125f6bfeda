"""The passes over rows of a CRATE layer where there is csrc/: the norms' gradient is its kernel.

What is left is Triton's. The contracts are those of torch_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cuda_extension
from ..cuda_extension import readable
from ..library import on_device_of, stream_of
from . import triton_kernels
from .of_few import ROWS, LayerOfFew

normalise = triton_kernels.normalise
statistics = triton_kernels.statistics
statistics_of_moments = triton_kernels.statistics_of_moments
fold = triton_kernels.fold
fold_gram = triton_kernels.fold_gram
rounded = triton_kernels.rounded

MOST_COLUMNS = 1024  # kMostNormedColumns of csrc/crate_kernels.h


def is_faster(d: int, adds: bool) -> bool:
    """Whether the CUDA kernel was measured to win over Triton's (docs/block.md)."""
    return 512 < d <= 768 if adds else d <= MOST_COLUMNS


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
    d, tensors = z.shape[-1], [t for t in (dh, z, skip) if t is not None]
    fits = (
        z.numel() > 0
        and z.dtype in (torch.float16, torch.bfloat16)
        and d % 8 == 0
        and all(t.dtype == z.dtype and t.data_ptr() % 16 == 0 for t in tensors)
    )
    if not (fits and is_faster(d, skip is not None)):
        return triton_kernels.normalise_backward(
            dh, z, stats, gamma, beta, skip, wants_h, wants_sum, masks
        )
    n_rows = z.numel() // d
    kernels, n_sums = cuda_extension.load(), 3 if wants_sum else 2
    gamma, beta = gamma.float().contiguous(), beta.float().contiguous()
    dz = torch.empty_like(z)
    h = torch.empty_like(z) if wants_h else None
    with on_device_of(z):
        parts = kernels.normalise_backward_parts(n_rows, d)
        partials = torch.empty(parts, n_sums, d, dtype=torch.float32, device=z.device)
        kernels.normalise_backward(
            dh=dh.data_ptr(),
            z=z.data_ptr(),
            skip=0 if skip is None else skip.data_ptr(),
            stats=stats.data_ptr(),
            gamma=gamma.data_ptr(),
            beta=beta.data_ptr(),
            dz=dz.data_ptr(),
            h=0 if h is None else h.data_ptr(),
            partials=partials.data_ptr(),
            rows=n_rows,
            d=d,
            masks=masks,
            third_sum=wants_sum,
            dtype=cuda_extension.DTYPES[z.dtype],
            stream=stream_of(z),
        )
    return dz, h, *triton_kernels.sum_partials(partials)


def encoder_of_few(
    x: Tensor,
    layers: Sequence[LayerOfFew],
    thresholds: Sequence[float],
    heads: int,
    scale: float,
    eps: float,
) -> Tensor:
    """All layers by one kernel (of_few.py)."""
    b, n, d = x.shape
    x = readable(x)
    kept = [[readable(t) for t in layer] for layer in layers]
    y, w, o, z = (torch.empty_like(x) for _ in range(4))
    lse = torch.empty(b, heads, n, dtype=torch.float32, device=x.device)
    counters = torch.zeros(len(layers), 4, -(-b * n // ROWS), dtype=torch.int32, device=x.device)
    scratch = {"w": w, "o": o, "z": z, "lse": lse, "counters": counters}
    with on_device_of(x):
        cuda_extension.load().encoder_of_few(
            x=x.data_ptr(),
            layers=[[t.data_ptr() for t in layer] for layer in kept],
            thresholds=list(thresholds),
            y=y.data_ptr(),
            **{name: t.data_ptr() for name, t in scratch.items()},
            batch=b,
            n=n,
            d=d,
            heads=heads,
            scale=scale,
            eps=eps,
            dtype=cuda_extension.DTYPES[x.dtype],
            stream=stream_of(x),
        )
    return y
