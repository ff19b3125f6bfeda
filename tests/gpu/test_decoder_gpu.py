"""A layer of CRATE-MAE's decoder as one op on a GPU: memory modes, repeatable, two in a row."""

from __future__ import annotations

import pytest
import torch
from decoders import layers_of_ours, published_layers
from helpers import HALVES, assert_as_close_as_plain, block_inputs, results
from test_block_gpu import BACKENDS, SHAPES, skip_unfit

REPEATS = 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("depth", [1, 2])
def test_as_close_as_plain_and_repeatable(shape, dtype, backend, depth):
    inputs = {k: t.to("cuda", dtype) for k, t in block_inputs(*shape).items()}
    heads = shape[2]
    skip_unfit(backend, inputs, heads)
    options = {"heads": heads, "depth": depth}
    dy = torch.randn_like(inputs["x"])
    plain = results(published_layers, inputs, dy, **options)
    exact = results(published_layers, inputs, dy, torch.float64, **options)
    for memory in ("default", "low"):
        ours = {**options, "memory": memory, "backend": backend}
        got = results(layers_of_ours, inputs, dy, **ours)
        assert_as_close_as_plain(got, plain, exact, (shape, memory))
        for _ in range(REPEATS // 2):
            again = results(layers_of_ours, inputs, dy, **ours)
            assert all(torch.equal(again[name], got[name]) for name in got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    shape = (0, 197, 12, 64, 768)
    inputs = {k: t.to("cuda", torch.bfloat16) for k, t in block_inputs(*shape).items()}
    skip_unfit(backend, inputs, 12)
    dy = torch.empty_like(inputs["x"])
    got = results(layers_of_ours, inputs, dy, heads=12, backend=backend)
    assert got["y"].shape == (0, 197, 768)
    assert all(not t.any() for name, t in got.items() if name != "y")


def test_under_autocast():
    """Parameters and x in float32: their gradients too, y and what is between in bfloat16."""
    inputs = {k: t.to("cuda", torch.float32) for k, t in block_inputs(24, 197, 12, 64).items()}
    narrow = {k: t.bfloat16() for k, t in inputs.items()}
    options = {"heads": 12, "depth": 2}
    dy = torch.randn_like(narrow["x"])
    exact = results(published_layers, inputs, dy, torch.float64, **options)
    plain = results(published_layers, narrow, dy, **options)
    with torch.autocast("cuda", torch.bfloat16):
        got = results(layers_of_ours, inputs, dy, **options)
    assert got["y"].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for name, t in got.items() if name != "y")
    got = {name: t.bfloat16() for name, t in got.items()}
    assert_as_close_as_plain(got, plain, exact)
