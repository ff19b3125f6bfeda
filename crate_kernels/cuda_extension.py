"""The compiled CUDA kernels (csrc/): loaded at the first use; where they are not, why not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODULE = "crate_kernels._cuda"
CAPABILITY = "9.0"
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
# setup.py installs it in place of the module.
WHY_NOT_BUILT = Path(__file__).with_name("_cuda_not_built.txt")


@functools.cache
def load() -> Any:
    return importlib.import_module(MODULE)


@functools.cache
def against(device_type: str, device_index: int | None) -> tuple[str, ...]:
    """The reasons, if any, for which the kernels cannot run on this device."""
    reasons = []
    if importlib.util.find_spec(MODULE) is None:
        recorded = WHY_NOT_BUILT.exists()
        why = WHY_NOT_BUILT.read_text().strip() if recorded else "run `make build`"
        reasons.append(f"not built: {why}")
    if device_type != "cuda":
        reasons.append(f"device {device_type}: CUDA kernels run on CUDA devices")
    else:
        found = "{}.{}".format(*torch.cuda.get_device_capability(device_index))
        if found != CAPABILITY:
            reasons.append(
                f"built for compute capability {CAPABILITY} (sm_90a), this device has {found}"
            )
    if not reasons:
        try:
            load()
        except Exception as error:  # whatever the loader has against it: an old C library, say
            reasons.append(f"built, but cannot be loaded: {error}")
    return tuple(reasons)


# ---- what the kernels ask of tensors

BLOCK_ROWS, BLOCK_COLUMNS = 128, 64  # of a mask, which comes in whole blocks


def mask_bytes(rows: int, d: int) -> int:
    """Size of the mask of (rows, d): a bit for each element of the blocks that it takes."""
    blocks = ((rows + BLOCK_ROWS - 1) // BLOCK_ROWS) * ((d + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS)
    return blocks * (BLOCK_ROWS * BLOCK_COLUMNS // 8)


def readable(t: Tensor) -> Tensor:
    """t itself where bulk copies can read it (contiguous, at a multiple of 16 bytes), or a copy."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def moments_shape(rows: int, d: int) -> tuple[int, ...]:
    """Of the moments that a GEMM writes of (rows, d), which there are where 64 divides d: of each
    192 or 128 elements of a row (moments_span in csrc/crate_kernels.h) their sum and the sum of
    their squares."""
    span = 192 if d % 192 == 0 else 128
    return ((d + span - 1) // span, rows, 2) if d % 64 == 0 else (0,)
