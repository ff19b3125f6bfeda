"""A whole layer on a GPU: every configuration of its passes, both memory modes, repeatable."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    block_inputs,
    distinct,
    off_the_blocks_kink,
    published_block,
    results,
)

from crate_kernels import crate_block, explain

triton_kernels = pytest.importorskip("crate_kernels.block.triton_kernels")

REPEATS = 50
# batch, tokens, heads, head_dim, width
SHAPES = [
    *((16, 197, 6, 64, 384), (9, 197, 12, 48, 576), (16, 197, 12, 64, 768), (5, 257, 16, 64, 1024)),
    *((2, 33, 3, 80, 240), (1, 1, 2, 16, 32), (3, 130, 2, 20, 44)),
]
BACKENDS = ["cuda", "triton"]


def skip_unfit(backend, inputs, heads):
    against = explain("crate_block", **{"w_out": None, "b_out": None, **inputs}, heads=heads)
    if against.reasons[backend]:
        pytest.skip(f"{backend}: {'; '.join(against.reasons[backend])}")


def inputs_on_gpu(shape, dtype, out=True):
    return {k: t.to("cuda", dtype) for k, t in block_inputs(*shape, out=out).items()}


def run(**inputs):
    return crate_block(**{"w_out": None, "b_out": None, **inputs})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_close_as_plain_and_repeatable(shape, dtype, backend):
    heads = shape[2]
    inputs = inputs_on_gpu(shape, dtype)
    skip_unfit(backend, inputs, heads)
    dy = off_the_blocks_kink(torch.randn_like(inputs["x"]), inputs, heads=heads)
    plain = results(published_block, inputs, dy, heads=heads)
    exact = results(published_block, inputs, dy, torch.float64, heads=heads)
    for memory in ("default", "low"):
        options = {"heads": heads, "memory": memory, "backend": backend}
        got = results(run, inputs, dy, **options)
        assert_as_close_as_plain(got, plain, exact, (shape, memory))
        for _ in range(REPEATS // 2):
            again = results(run, inputs, dy, **options)
            assert all(torch.equal(again[name], got[name]) for name in got)
    with torch.no_grad():
        y = run(**inputs, heads=heads, backend=backend)
    assert_as_close_as_plain({"y": y}, {"y": plain["y"]}, {"y": exact["y"]}, shape)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("memory", ["default", "low"])
def test_without_output_projection_under_autocast(memory, causal):
    """As under autocast: parameters and x in float32, what is between the GEMMs in bfloat16."""
    inputs = inputs_on_gpu((8, 197, 6, 64, 384), torch.float32, out=False)
    options = {"heads": 6, "causal": causal}
    narrow = {k: t.bfloat16() for k, t in inputs.items()}
    dy = off_the_blocks_kink(torch.randn_like(inputs["x"]).bfloat16(), narrow, **options)
    exact = results(published_block, inputs, dy, torch.float64, **options)
    plain = results(published_block, narrow, dy, **options)
    with torch.autocast("cuda", torch.bfloat16):
        got = results(run, inputs, dy, memory=memory, **options)
    assert got["y"].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for name, t in got.items() if name != "y")
    got = {name: t.bfloat16() for name, t in got.items()}
    assert_as_close_as_plain(got, plain, exact, (memory, causal))


def configurations():
    for d, adds in itertools.product(range(8, 1600, 8), (False, True)):
        key = (triton_kernels.forward_config(d, adds), triton_kernels.backward_config(d), adds)
        yield (key, triton_kernels.triton.next_power_of_2(d)), (d, adds)


@pytest.mark.parametrize(("d", "adds"), distinct(configurations()))
def test_every_configuration_of_the_passes(d, adds):
    from crate_kernels.block import torch_kernels

    rows = 3001
    x, p, dh = (torch.randn(rows, d, device="cuda").bfloat16() for _ in range(3))
    gamma, beta, bias = (torch.randn(d, device="cuda") for _ in range(3))
    given = (x, p, bias) if adds else (x, None, None)
    z, h, stats = triton_kernels.normalise(*given, gamma, beta, 1e-5, torch.bfloat16)
    wide = [None if t is None else t.double() for t in given]
    exact = torch_kernels.normalise(*wide, gamma.double(), beta.double(), 1e-5, torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(z.double(), exact[0], rtol=eps, atol=0)
    torch.testing.assert_close(h.double(), exact[1], rtol=eps, atol=eps * 1e-2)
    skip = p if adds else None
    got = triton_kernels.normalise_backward(dh, z, stats, gamma, beta, skip, True, True)
    exact = torch_kernels.normalise_backward(
        *(t.double() for t in (dh, z, stats, gamma, beta)), wide[1] if adds else None, True, True
    )
    for a, b in zip(got, exact, strict=True):
        # One rounding of an element; a sum of float32 is good to far less than bfloat16's unit.
        scale = b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=eps, atol=eps * 1e-2 * scale)
