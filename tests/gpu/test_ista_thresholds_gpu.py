"""Learned and signed thresholds of ISTA on a GPU: against float64, repeatable, captured."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    off_the_threshold,
    published_thresholds,
    results,
    threshold_inputs,
)

from crate_kernels import ista

pytest.importorskip("triton")

REPEATS = 50
SHAPES = [(25216, 768), (6307, 384), (333, 100), (64, 576), (1, 7)]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kinds", [("channel", "channel"), ("scalar", "channel"), ("one", None)])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_close_as_plain_and_repeatable(shape, dtype, kinds, signed):
    inputs = {k: t.to("cuda", dtype) for k, t in threshold_inputs(*shape, kinds=kinds).items()}
    dy = off_the_threshold(torch.randn(shape, device="cuda").to(dtype), inputs, signed)
    got = results(ista, inputs, dy, signed=signed)
    plain = results(published_thresholds, inputs, dy, signed=signed)
    exact = results(published_thresholds, inputs, dy, torch.float64, signed=signed)
    assert_as_close_as_plain(got, plain, exact, (shape, kinds))
    for _ in range(REPEATS):
        again = results(ista, inputs, dy, signed=signed)
        assert all(torch.equal(again[name], got[name]) for name in got)


def test_a_replay_sees_changed_values():
    inputs = {k: t.to("cuda", torch.bfloat16) for k, t in threshold_inputs(2000, 128).items()}
    with torch.no_grad():
        for _ in range(2):
            ista(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ista(**inputs)
        for name in ("step_size", "lambd", "weight"):
            inputs[name].mul_(1.5)
            graph.replay()
            assert torch.equal(y, ista(**inputs)), name
