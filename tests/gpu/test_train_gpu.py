"""train --graph: the captured passes do what the passes do that are not captured."""

from __future__ import annotations

import argparse

import pytest
import torch

from crate_kernels import train
from crate_kernels.train import config, data, distributed, loop

pytest.importorskip("sklearn")
SIZE = ["--dim", "128", "--depth", "2", "--heads", "2", "--optimizer", "adamw", "--steps", "6"]


def prepared(*argv: str) -> loop.Run:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    options = vars(parser.parse_args([*SIZE, *argv]))
    chosen = config.Config(**options).resolved(1, "cuda")
    sets = data.load(chosen)
    world = distributed.World.from_environment("cuda")
    return loop.Run(chosen, world, sets, len(sets.train) // chosen.batch_size)


def trained(run: loop.Run) -> tuple[torch.Tensor, list[torch.Tensor]]:
    order = data.Order(run.config, run.world, len(run.sets.train), 0, run.steps)
    batches = iter(data.batches(run.sets.train, order, run.config, run.world))
    for _ in range(run.steps):
        run.train_step(batches)
    return run.window.clone(), [p.detach().clone() for p in run.net.parameters()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("more", [(), ("--accumulate", "2"), ("--mixup", "0.2", "--ema", "0.9")])
def test_captured_steps_are_the_steps(dtype: str, more: tuple[str, ...]) -> None:
    argv = ("--dtype", dtype, *more)
    (sums, weights), (captured_sums, captured_weights) = (
        trained(prepared(*argv, *graph)) for graph in ((), ("--graph",))
    )
    torch.testing.assert_close(captured_sums, sums)
    for captured, weight in zip(captured_weights, weights, strict=True):
        torch.testing.assert_close(captured, weight)


def test_a_batch_of_another_shape_is_refused() -> None:
    run = prepared("--graph")
    x, y = torch.rand(8, 1, 16, 16, device="cuda"), torch.zeros(8, dtype=torch.long, device="cuda")
    run.captured_passes(x, y, True)
    with pytest.raises(ValueError, match=r"expected batches of torch.float32 \(8, 1, 16, 16\)"):
        run.captured_passes(x[:4], y[:4], True)
