"""What the tests of ``python -m crate_kernels train`` share: small runs, and what they left."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from crate_kernels import train
from crate_kernels.train import config, data, distributed, log, loop

TINY = ["--dim", "32", "--depth", "2", "--heads", "2", "--optimizer", "adamw"]
STEPS = ["--steps", "12", "--log-every", "3", "--validate-every", "6"]


def arguments(*argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", *map(str, argv)])


def run(out: Path, *argv: object) -> int:
    return train.main(arguments("--out", out, *argv))


def rows(out: Path, split: str | None = None) -> list[dict[str, str]]:
    """metrics.csv but for the speed."""
    found = [{**r, "per_second": ""} for r in log.read(out / "metrics.csv")]
    return [r for r in found if split in (None, r["split"])]


def losses(out: Path, split: str) -> list[float]:
    return [float(r["loss"]) for r in rows(out, split)]


def saved(out: Path, name: str = "last.pt") -> dict[str, Any]:
    return torch.load(out / name, weights_only=True)


def assert_same_state(a: Any, b: Any) -> None:
    """Bit by bit, through nested dicts and sequences."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same_state(left, right)
    else:
        assert a == b


def prepared(*argv: object) -> loop.Run:
    """A run of one process, before its first step."""
    options = vars(arguments(*argv))
    chosen = config.Config(**options).resolved(1, "cpu")
    sets = data.load(chosen)
    world = distributed.World.from_environment("cpu")
    return loop.Run(chosen, world, sets, len(sets.train) // chosen.batch_size)


def batches_of(run: loop.Run) -> Any:
    order = data.Order(run.config, run.world, len(run.sets.train), 0, run.steps)
    return iter(data.batches(run.sets.train, order, run.config, run.world))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As the processes that are started here have, so that sums come out alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
