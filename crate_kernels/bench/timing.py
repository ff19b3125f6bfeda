"""Timing: candidates interleaved round-robin, medians and spread.

On CUDA each call goes into a CUDA graph where that can be captured (launch costs vanish), else it
is timed by events around eager calls; on the CPU by the host's clock. Every sample covers `inner`
calls over rotating input sets.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Step = Callable[[], object]
MIN_ROUNDS = 5
SAMPLE_US = 500.0  # a graph is repeated until its sample is about this long


@dataclass(frozen=True)
class Run:
    """Something that can be timed: ``call()`` makes ``inner`` calls."""

    call: Step
    inner: int
    method: str  # "graph", "events" or "host"
    note: str = ""


@dataclass(frozen=True)
class Timing:
    median_us: float
    p10_us: float
    p90_us: float
    rounds: int
    method: str
    note: str = ""


def percentile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values; q in [0, 100]."""
    ordered = sorted(values)
    position = q / 100 * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def input_sets(bytes_per_call: float, device: torch.device) -> int:
    """How many input sets to rotate among so that the last-level cache holds none of the next."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 1 << 26)
    return min(8, max(2, -(-2 * cache // max(1, int(bytes_per_call)))))


def prepare(steps: Sequence[Step], device: torch.device, graph: bool, inner: int = 0) -> Run:
    """Warm up ``steps`` (one per input set) and wrap them for :func:`interleave`.

    inner = 0: as many calls a sample as make it long enough to time, each set at least once.
    Call it, and run the result, on a side stream: a graph cannot be captured on the default one.
    """
    for step in steps:
        step()
    if device.type != "cuda":
        return Run(_loop(steps, inner or 1), inner or 1, "host")
    torch.cuda.synchronize(device)
    inner = inner or _inner(steps)
    loop = _loop(steps, inner)
    if not graph:
        return Run(loop, inner, "events")
    try:
        return Run(_capture(loop), inner, "graph")
    except Exception as error:  # whatever refuses capture, the eager call still can be timed
        torch.cuda.synchronize(device)
        loop()
        return Run(loop, inner, "events", f"no CUDA graph: {first_line(error)}")


def _loop(steps: Sequence[Step], inner: int) -> Step:
    """``inner`` calls in all, going on through the sets where the last sample stopped."""
    position = 0

    def loop() -> None:
        nonlocal position
        for _ in range(inner):
            steps[position % len(steps)]()
            position += 1

    return loop


def _inner(steps: Sequence[Step]) -> int:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for step in steps:
        step()
    end.record()
    end.synchronize()
    sweeps = SAMPLE_US / max(1.0, 1e3 * start.elapsed_time(end))
    return len(steps) * min(10, max(1, round(sweeps)))


def _capture(loop: Step) -> Step:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        loop()
    graph.replay()
    torch.cuda.synchronize()
    return functools.partial(_replay, graph, loop)


def _replay(graph: torch.cuda.CUDAGraph, loop: Step) -> None:
    """``loop`` is held because it owns the tensors that the graph reads."""
    graph.replay()


def interleave(
    runs: dict[str, Run], device: torch.device, rounds: int, seconds: float
) -> dict[str, Timing]:
    """Time every run once a round, for ``rounds`` rounds or about ``seconds`` seconds.

    At least MIN_ROUNDS rounds (or ``rounds``, if fewer) are made; the first round is discarded.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for done in range(rounds + 1):
        enough = done > min(rounds, MIN_ROUNDS)
        if enough and time.perf_counter() - began > seconds:
            break
        for name, us in _one_round(runs, device).items():
            if done > 0:
                samples[name].append(us)
    return {
        name: Timing(
            percentile(us, 50),
            percentile(us, 10),
            percentile(us, 90),
            len(us),
            runs[name].method,
            runs[name].note,
        )
        for name, us in samples.items()
    }


def _one_round(runs: dict[str, Run], device: torch.device) -> dict[str, float]:
    """Microseconds a call."""
    if device.type != "cuda":
        times = {}
        for name, run in runs.items():
            start = time.perf_counter()
            run.call()
            times[name] = 1e6 * (time.perf_counter() - start) / run.inner
        return times
    events = {}
    for name, run in runs.items():
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run.call()
        last.record()
        events[name] = (first, last)
    torch.cuda.synchronize(device)
    return {
        name: 1e3 * first.elapsed_time(last) / runs[name].inner
        for name, (first, last) in events.items()
    }


def peak_gib(prepare_step: Callable[[], Step], device: torch.device, resident: int) -> float | None:
    """Peak memory of one call by itself: what ``prepare_step`` and its step allocate, at most.

    ``resident`` adds the bytes of inputs that were there before. None on the CPU.
    """
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    step = prepare_step()
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before + resident) / 2**30


def first_line(error: BaseException, width: int = 160) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:width]
