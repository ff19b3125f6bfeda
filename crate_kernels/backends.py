"""Which backend runs an op, why, and why not the others.

``auto`` takes the first of BACKENDS that fits and says so once in the log
(``logging.getLogger("crate_kernels")``, level INFO); a backend asked for by name runs or raises
with every reason against it. The one environment variable of this package is read here.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cuda_extension

logger = logging.getLogger("crate_kernels")

# In order of preference under "auto".
BACKENDS = ("cuda", "triton", "reference")
# Replaces backend="auto" everywhere: "auto", or one of BACKENDS ("cuda" where csrc/ has the op).
BACKEND_VARIABLE = "CRATE_KERNELS_BACKEND"

ISTA_OPS = ("ista", "overcomplete_ista")
CUDA_DTYPES = (torch.float16, torch.bfloat16)
CUDA_HEAD_DIMS = (48, 64, 80, 128)  # kHeadDims of csrc/crate_kernels.h
# Elements of x below which the CUDA kernel has too few tiles of 128 x 128 for a GPU's 132
# multiprocessors: 7.9 us against Triton's 5.4 at 197 x 768, 8.8 against 8.2 at 1576 x 768.
CUDA_ISTA_LEAST = 128 * 128 * 132
# Columns below which overcomplete_ista stays with Triton; measured at 25216 x 768 alone, where CUDA
# takes 2.18 ms against 2.47, forward and backward.
CUDA_OVERCOMPLETE_LEAST_D = 384
# Ops that csrc/ has no kernels for.
WITHOUT_CUDA = (
    "cross_entropy",
    "masked_loss",
    "masked_tokens",
    "residual_norm",
    "tied_attention_decode",
    "tied_embedding",
)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found: the backend "auto" takes, and each one's reasons against it."""

    op: str
    chosen: str
    reasons: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"{self.op}: auto takes {self.chosen}"]
        for name, reasons in self.reasons.items():
            lines.append(f"  {name}: {'; '.join(reasons) if reasons else 'fits'}")
        return "\n".join(lines)


def explain(
    op: str,
    x: Tensor,
    dtype: torch.dtype,
    head_dim: int | None,
    options: tuple[str, ...] = (),
    columns: int | None = None,
) -> Explanation:
    """What fits op on ``x`` computing in ``dtype``; head_dim is None for ops without heads.

    ``options`` are those in use that not every backend has; columns those of a dictionary that is
    not square.
    """
    reasons = {
        "cuda": _against_cuda(op, x, dtype, head_dim, options, columns),
        "triton": _against_triton(x, dtype, head_dim),
        "reference": (),
    }
    fits = [name for name in BACKENDS if not reasons[name]]
    return Explanation(op, _best(op, x, fits), reasons)


def _best(op: str, x: Tensor, fits: list[str]) -> str:
    """What "auto" takes of the backends that fit: the first, but where another measured faster."""
    small = op in ISTA_OPS and x.numel() < CUDA_ISTA_LEAST
    small |= op == "overcomplete_ista" and x.shape[-1] < CUDA_OVERCOMPLETE_LEAST_D
    return "triton" if small and "triton" in fits else fits[0]


def choose(
    op: str,
    backend: str,
    x: Tensor,
    dtype: torch.dtype,
    head_dim: int | None,
    options: tuple[str, ...] = (),
    columns: int | None = None,
) -> str:
    """The backend to run: ``backend`` itself if it fits, or the best that does for "auto"."""
    if backend == "auto":
        backend = os.environ.get(BACKEND_VARIABLE, "auto")
        if backend == "cuda" and op in WITHOUT_CUDA:  # ops that layers call of themselves, too
            backend = "auto"
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"{op}: expected backend to be one of {('auto', *BACKENDS)}, got {backend!r}"
        )
    if backend == "reference":
        return backend
    found = explain(op, x, dtype, head_dim, options, columns)
    if backend == "auto":
        if not torch.compiler.is_compiling():
            _log_once(op, str(x.device.type), found)
        return found.chosen
    if found.reasons[backend]:
        raise ValueError(
            f"{op}: expected arguments that backend={backend!r} supports, got "
            + "; ".join(found.reasons[backend])
        )
    return backend


def _against_cuda(
    op: str,
    x: Tensor,
    dtype: torch.dtype,
    head_dim: int | None,
    options: tuple[str, ...],
    columns: int | None,
) -> tuple[str, ...]:
    reasons = list(_against_cuda_on(x.device.type, x.device.index))
    if op in WITHOUT_CUDA:
        reasons.append(f"{op}: no CUDA kernels are built for it")
    if dtype not in CUDA_DTYPES:
        reasons.append(f"dtype {dtype}: CUDA kernels compute in float16 and bfloat16")
    if head_dim is not None and head_dim not in CUDA_HEAD_DIMS:
        reasons.append(f"head_dim {head_dim}: CUDA kernels are built for {CUDA_HEAD_DIMS}")
    if op in ISTA_OPS and x.shape[-1] % 8 != 0:
        reasons.append(f"D = {x.shape[-1]}: CUDA kernels take multiples of 8")
    if columns is not None and columns % 8 != 0:
        reasons.append(f"M = {columns}: CUDA kernels take multiples of 8")
    reasons += [f"{option}: the CUDA kernels do not have it" for option in options]
    return tuple(reasons)


def _against_cuda_on(device_type: str, device_index: int | None) -> tuple[str, ...]:
    return cuda_extension.against(device_type, device_index)


def _against_triton(x: Tensor, dtype: torch.dtype, head_dim: int | None) -> tuple[str, ...]:
    reasons = list(_against_triton_on(x.device.type, x.device.index))
    if dtype not in TRITON_DTYPES:
        reasons.append(f"dtype {dtype}: Triton kernels compute in float16, bfloat16 and float32")
    if head_dim is not None and head_dim > TRITON_MAX_HEAD_DIM:
        reasons.append(f"head_dim {head_dim}: Triton kernels take up to {TRITON_MAX_HEAD_DIM}")
    return tuple(reasons)


def _against_triton_on(device_type: str, device_index: int | None) -> tuple[str, ...]:
    return _look_for_triton(device_type, device_index)


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo and Triton.
for _constant in (_against_cuda_on, _against_triton_on):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _look_for_triton(device_type: str, device_index: int | None) -> tuple[str, ...]:
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed: pip install triton",)
    if interpreted():
        return ()
    if device_type != "cuda":
        return (f"device {device_type}: Triton kernels run on CUDA devices",)
    capability = torch.cuda.get_device_capability(device_index)
    if capability < (8, 0):
        return (f"compute capability {capability[0]}.{capability[1]}: at least 8.0 is needed",)
    return ()


def interpreted() -> bool:
    """Whether Triton's own TRITON_INTERPRET runs its kernels on the CPU (slow: for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_logged: set[tuple[str, str, str]] = set()


def _log_once(op: str, device_type: str, found: Explanation) -> None:
    key = (op, device_type, found.chosen)
    if key not in _logged:
        _logged.add(key)
        logger.info("%s", found)
