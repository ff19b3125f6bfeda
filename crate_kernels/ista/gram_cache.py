"""G = eta (W - W^T W), kept from call to call while no gradient is wanted.

A version counter cannot be trusted to tell that W changed: writes through ``.data`` (the usual
way of moving-average teachers) and replayed CUDA graphs leave it alone. So beside G lies the W it
was made from, and every call compares the two where they are. An entry lives as long as its weight,
or until a call with another dtype, step size or stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..library import autocast_off, stream_of
from . import torch_kernels


@dataclass
class _Entry:
    key: tuple[Any, ...]
    seen: Tensor  # the weight that gram was made from; NaN before the first time
    gram: Tensor


_entries = WeakTensorKeyDictionary()


def through_gram(x: Tensor) -> bool:
    """One GEMM with G pays for making G once there are as many tokens as columns."""
    return x.numel() // x.shape[-1] >= x.shape[-1]


def cached_gram(
    weight: Tensor, step_size: float, dtype: torch.dtype, kernels: Any
) -> Tensor | None:
    """An up-to-date G in ``dtype`` by ``kernels``, or None where the caller must make its own.

    That is: where comparing would stop the GPU for an answer, where a CUDA graph is captured
    (it would outlive the entry), and where there are no values to compare (meta, tracing).
    """
    if not _can_compare(weight, kernels):
        return None
    stream = stream_of(weight) if weight.is_cuda else 0
    key = (weight.shape, weight.dtype, weight.device, dtype, step_size, kernels, stream)
    # Out while it is refreshed, when seen may be ahead of gram: an interruption leaves nothing
    # behind, and another thread makes an entry of its own.
    entry = _entries.pop(weight, None)
    if entry is None or entry.key != key:
        with torch.inference_mode(False):  # to be written in and out of that mode
            options: Any = {"dtype": weight.dtype, "device": weight.device}
            seen = torch.full(weight.shape, float("nan"), **options)
            entry = _Entry(key, seen, torch.empty_like(seen, dtype=dtype))
    with torch.no_grad(), autocast_off(weight.device.type):
        kernels.refresh_gram(weight.detach(), entry.seen, entry.gram, step_size)
    _entries[weight] = entry
    return entry.gram


def _can_compare(weight: Tensor, kernels: Any) -> bool:
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.is_meta:
        return False
    if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
        return False
    if not weight.is_cuda:
        return True
    return kernels is not torch_kernels and not torch.cuda.is_current_stream_capturing()
