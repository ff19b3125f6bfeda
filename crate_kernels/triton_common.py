"""What every Triton kernel of this package shares."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for a dot on ``dtype`` operands.

    float32 products honour ``torch.set_float32_matmul_precision``: full float32 for "highest",
    TF32 for "high" and "medium"; and what newer torch has in its place. Narrower dtypes have one
    way only.
    """
    if dtype != torch.float32:
        return "tf32"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; once set, the getter below raises
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a b + acc (a b where acc is None), in float32; PRECISION as dot_precision gives it."""
    return tl.dot(_for_tf32(a, PRECISION), _for_tf32(b, PRECISION), acc, input_precision=PRECISION)


@triton.jit
def add_dot(a, b, acc, PRECISION: tl.constexpr):
    """The same for a sum over many tiles, which full float32 sums each by itself first.

    One chain of FMAs through all of them would round as often as there are rows.
    """
    if PRECISION == "ieee":
        # Triton would make one chain of this too, but for a limit (of float8's) on its length.
        acc += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def _for_tf32(x, PRECISION: tl.constexpr):
    """float32 that is to be multiplied as TF32, rounded to it: tensor cores cut the bits off."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        nearest = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x


def has_bulk_copy(t: Tensor) -> bool:
    """Whether the device of ``t`` moves tensor tiles by a copy engine (compute capability 9.0)."""
    return t.is_cuda and _properties(t.device.index).major >= 9


def early_start(t: Tensor, wanted: bool = True) -> dict[str, Any]:
    """Launch options of a kernel that waits by ``wait_if_early(EARLY)`` before it touches memory:
    where the device can (as has_bulk_copy), it starts before the kernel ahead of it ends."""
    early = wanted and has_bulk_copy(t)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def wait_if_early(EARLY: tl.constexpr):
    """Until the kernel ahead has ended and what it wrote is there."""
    if EARLY:
        gdc_wait()


def multiprocessors(t: Tensor) -> int:
    """Of the device of ``t``; one for Triton's interpreter on the CPU."""
    if not t.is_cuda:
        return 1
    return _properties(t.device.index).multi_processor_count


@functools.cache
def _properties(device_index: int) -> Any:
    """Asked for at every launch, and found once."""
    return torch.cuda.get_device_properties(device_index)
