"""The largest batch of a model that trains on this GPU, with each of the benchmarks' candidates.

    python -m benchmarks.largest_batch --model crate_large

One training step is forward, backward and fused AdamW under bfloat16 autocast, as in ``python -m
crate_kernels bench --suite model``. The peak memory of the two largest batches that fit tells which
should just fit, until one fits and none larger by 8 or a 64th does.
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

STEP, FIRST, PARTS = 8, 64, 64
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
    """A batch for which ``fits`` gives a number, while none STEP or 1 / PARTS larger fits.

    Raises:
        RuntimeError: not even a batch of 2 * FIRST fits.
    """
    small, double = fits(FIRST), fits(2 * FIRST)
    if small is None or double is None:
        raise RuntimeError(f"largest_batch: expected batches of {2 * FIRST} to fit, they do not")
    fitting, above, below = [(FIRST, small), (2 * FIRST, double)], 0, 0
    while True:
        (a, bytes_a), (b, bytes_b) = fitting[-2:]
        step = max(STEP, b // PARTS // STEP * STEP)
        if above and above - b <= step:
            return b
        batch = b + int((memory - bytes_b) / max(1.0, (bytes_b - bytes_a) / (b - a)))
        if above:
            below = max(STEP, above // PARTS, 2 * below)  # farther at each failure
            batch = min(batch, above - below)
        batch = max(batch // STEP * STEP, b + step)
        used = fits(batch)
        if used is None:
            above = batch
        else:
            fitting.append((batch, used))
            below = 0


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
