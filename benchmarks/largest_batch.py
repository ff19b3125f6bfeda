"""The largest batch of a model that trains on this GPU, with each of the benchmarks' candidates.

    python -m benchmarks.largest_batch --model crate_large

One training step is forward, backward and fused AdamW under bfloat16 autocast, as in ``python -m
crate_kernels bench --suite model``. The peak memory of two small batches tells which batch should
just fit; from there the batch goes down, or up, in steps of 8 until one fits and the next does not.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable

import torch

from crate_kernels.bench import peers, workloads
from crate_kernels.bench.model_cases import ModelCase

STEP, FIRST = 8, 32
GIB = 2.0**30


def peak(model: str, name: str, batch: int) -> float | None:
    """Bytes at most reserved in two training steps; None where there is not enough memory."""
    device = torch.device("cuda")
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        w = workloads.model(model, "train", batch)
        case = ModelCase.make(w, device, torch.Generator(device).manual_seed(0))
        step = case.step(peers.candidate(name), 0)
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved()
    return None


def largest(fits: Callable[[int], float | None], memory: float) -> int:
    """The largest multiple of STEP for which ``fits`` gives a number.

    Raises:
        RuntimeError: not even a batch of 2 * FIRST fits.
    """
    small, double = fits(FIRST), fits(2 * FIRST)
    if small is None or double is None:
        raise RuntimeError(f"largest_batch: expected batches of {2 * FIRST} to fit, they do not")
    per_item = max(1.0, (double - small) / FIRST)
    batch = max(2 * FIRST, int((memory - small) / per_item + FIRST) // STEP * STEP)
    if fits(batch) is not None:
        while fits(batch + STEP) is not None:
            batch += STEP
        return batch
    while fits(batch - STEP) is None:
        batch -= STEP
    return batch - STEP


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="crate_large", choices=tuple(workloads.MODELS))
    parser.add_argument("--peers", nargs="+", default=["sdpa+compile"], choices=peers.all_names())
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none")
    memory = torch.cuda.get_device_properties(0).total_memory
    print(f"{args.model} on {torch.cuda.get_device_name()}, {memory / GIB:.0f} GiB")
    found: dict[str, int] = {}
    for name in (*args.peers, peers.OURS, peers.LOW):

        def fits(batch: int, name: str = name) -> float | None:
            used = peak(args.model, name, batch)
            print(f"  {name} {batch}: {'no' if used is None else f'{used / GIB:.1f} GiB'}")
            return used

        found[name] = largest(fits, memory)
    print()
    for name, batch in found.items():
        print(f"{name:<24} {batch:>6}   {batch / found[args.peers[0]]:.2f}x {args.peers[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
