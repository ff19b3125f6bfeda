"""Build the kernels that a launcher asks for, for any NVIDIA GPU, without one or a launch.

Inside ``builds_for((9, 0))`` tensors say that they are on a GPU of that kind (let them be on
"meta"), and every ``kernel[grid](...)`` is specialised on its real arguments by Triton itself and
compiled. Yields the list of builds, complete once the block ends.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from crate_kernels import triton_common


@contextlib.contextmanager
def builds_for(capability: tuple[int, int], threads: int = 2) -> Iterator[list[Any]]:
    """Launches that differ only in integers that are no constants of the kernel are built once."""
    run = JITFunction.run
    pending: dict[Any, Any] = {}
    builds: list[Any] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kinds = [getattr(a, "dtype", type(a)) for a in args]
        key = f"{self.__name__} {kinds} {sorted(kwargs.items())}"
        if key not in pending:
            pending[key] = run(self, *args, grid=grid, warmup=True, **kwargs)

    with (
        mock.patch.object(driver, "_active", _Driver(capability)),
        mock.patch.object(JITFunction, "run", compile_only),
        ThreadPoolExecutor(threads) as pool,
    ):
        with triton.AsyncCompileMode(pool), _OnTheGPU(capability):
            yield builds
        builds.extend(b.result() if hasattr(b, "result") else b for b in pending.values())


class _Driver:
    """What Triton asks of a GPU before it launches; one device number for each architecture."""

    def __init__(self, capability: tuple[int, int]):
        self.arch = capability[0] * 10 + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class _OnTheGPU(TorchFunctionMode):
    """What torch says of tensors and of the GPU that they are on."""

    def __init__(self, capability: tuple[int, int]):
        super().__init__()
        self.patches = contextlib.ExitStack()
        self.answers = {
            "current_device": None,  # also the device index of a meta tensor
            "get_device_properties": SimpleNamespace(
                major=capability[0], minor=capability[1], multi_processor_count=132
            ),
        }

    def __enter__(self) -> Any:
        for name, answer in self.answers.items():
            self.patches.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        triton_common._properties.cache_clear()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.patches.close()
        triton_common._properties.cache_clear()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return function(*args, **(kwargs or {}))


def transposed_accumulators(ttir: str) -> list[str]:
    """The dots with an operand that is a transpose of another dot's result, or may be."""
    made = {}  # value: (operation, its operands)
    for line in ttir.splitlines():
        found = re.match(r"\s*(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)", line)
        if found:
            made[found[1]] = (found[2], re.findall(r"%\w+", found[3]))

    def hazardous(value: str, transposed: bool, seen: set[Any]) -> bool:
        if (value, transposed) in seen:
            return False
        seen.add((value, transposed))
        operation, operands = made.get(value, ("block argument", []))
        if operation in ("tt.load", "tt.descriptor_load", "arith.constant"):
            return False
        if operation in ("tt.dot", "scf.for", "block argument"):
            return transposed
        transposed = transposed or operation == "tt.trans"
        return any(hazardous(operand, transposed, seen) for operand in operands)

    return [
        result
        for result, (operation, operands) in made.items()
        if operation == "tt.dot"
        and any(hazardous(operand, False, set()) for operand in operands[:2])
    ]
