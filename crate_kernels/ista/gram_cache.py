"""G = eta (W - W^T W), kept from call to call while no gradient is wanted.

A version counter cannot be trusted to tell that W changed: writes through ``.data`` (the usual
way of moving-average teachers) and replayed CUDA graphs leave it alone. So beside G lies the W it
was made from, and every call compares the two where they are. An entry lives as long as its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import torch_kernels


@dataclass
class _Entry:
    key: tuple[Any, ...]
    seen: Tensor  # the weight that gram was made from; NaN before the first time
    gram: Tensor


_entries = WeakTensorKeyDictionary()


def cached_gram(
    weight: Tensor, step_size: float, dtype: torch.dtype, kernels: Any
) -> Tensor | None:
    """An up-to-date G in ``dtype`` by ``kernels``, or None where the caller must make its own.

    That is: where comparing would stop the GPU for an answer, and in a graph capture that no
    ordinary call came before.
    """
    if weight.is_cuda and kernels is torch_kernels:
        return None
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    key = (weight.shape, weight.dtype, weight.device, dtype, step_size, kernels, stream)
    entry = _entries.get(weight)
    if entry is None or entry.key != key:
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        with torch.inference_mode(False):  # to be written in and out of that mode
            options: Any = {"dtype": weight.dtype, "device": weight.device}
            seen = torch.full(weight.shape, float("nan"), **options)
            entry = _Entry(key, seen, torch.empty_like(seen, dtype=dtype))
        _entries[weight] = entry
    with torch.no_grad():
        kernels.refresh_gram(weight.detach(), entry.seen, entry.gram, step_size)
    return entry.gram
