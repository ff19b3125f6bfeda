"""The workloads of ``python -m crate_kernels bench`` under pytest-benchmark: the same code.

python -m pytest benchmarks [--full] [-k ista] [--benchmark-json FILE]

A case whose results fail the check against float64 fails, and is not timed.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from crate_kernels.bench import cases, peers, roofline, timing, workloads
from crate_kernels.bench.run import OK, STEPS_A_SAMPLE, UNAVAILABLE, Settings, run_workload
from crate_kernels.bench.workloads import Workload

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = workloads.named_set(DEVICE.type, quick=not metafunc.config.getoption("--full"))
    pairs = [
        pytest.param(w, name, id=f"{suite} {w.label} {name}".replace(" ", "-"))
        for suite, several in found.items()
        for w in several
        for name in peers.default_names(w, DEVICE.type)
    ]
    metafunc.parametrize(("w", "name"), pairs)


@functools.cache
def ceilings(dtype: torch.dtype) -> roofline.Ceilings:
    return roofline.ceilings_for(DEVICE, dtype)


def test_workload(w: Workload, name: str, benchmark: Any) -> None:
    candidate, gate = peers.candidate(name), Settings(DEVICE, check_only=True)
    (checked,) = run_workload(w, [candidate], gate, None)
    if checked.status == UNAVAILABLE:
        pytest.skip(checked.note)
    assert checked.status == OK, checked.note
    case = cases.make_case(w, DEVICE, seed=0)
    steps = [case.step(candidate, i) for i in range(case.sets)]
    # As many calls for every candidate, else pytest-benchmark could not compare them.
    inner = STEPS_A_SAMPLE * case.sets if DEVICE.type == "cuda" else 1
    run = timing.prepare(steps, DEVICE, graph=False, inner=inner)

    def calls() -> None:
        run.call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = f"{w.suite} {w.label}, {run.inner} calls"
    benchmark.name = name
    benchmark.pedantic(calls, rounds=10, warmup_rounds=1)
    floor = roofline.floor_us(w, ceilings(w.torch_dtype))
    benchmark.extra_info.update(
        device=str(DEVICE), dtype=w.dtype, calls=run.inner, floor_us=floor,
        over_floor=1e6 * benchmark.stats.stats.median / run.inner / floor,
    )  # fmt: skip
