"""Learned and signed thresholds of ISTA on a GPU: against float64, repeatable, captured."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import HALVES, assert_as_close_as_plain, results
from thresholds import (
    check_single_numbers,
    off_the_threshold,
    published_thresholds,
    threshold_inputs,
)

from crate_kernels import explain, ista

pytest.importorskip("triton")

REPEATS = 50
# x's dtype and that of the products: one for all, or autocast on float32.
DTYPES = [(d, d) for d in (*HALVES, torch.float32)] + [(torch.float32, d) for d in HALVES]
# Large and small tiles, rows that fill none, widths that have no descriptors, fewer rows than D.
SHAPES = [(25216, 768), (6307, 384), (4400, 1001), (333, 100), (64, 576)]


def in_dtype(c_dtype, x_dtype, function):
    """``function`` as a layer runs it: under autocast where the two dtypes differ."""
    off = contextlib.nullcontext()

    def run(**given):
        with off if x_dtype == c_dtype else torch.autocast("cuda", c_dtype):
            return function(**given)

    return run


def inputs_on_gpu(*shape, x_dtype=torch.bfloat16, c_dtype=torch.bfloat16, signed=True):
    inputs = {k: t.to("cuda", x_dtype) for k, t in threshold_inputs(*shape).items()}
    rounded = {**inputs, "x": inputs["x"].to(c_dtype)}
    return inputs, off_the_threshold(torch.randn(shape, device="cuda").to(x_dtype), rounded, signed)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("x_dtype", "c_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_close_as_plain_and_repeatable(shape, x_dtype, c_dtype, signed):
    inputs, dy = inputs_on_gpu(*shape, x_dtype=x_dtype, c_dtype=c_dtype, signed=signed)
    fused = in_dtype(c_dtype, x_dtype, ista)
    got = results(fused, inputs, dy, signed=signed)
    plain = results(in_dtype(c_dtype, x_dtype, published_thresholds), inputs, dy, signed=signed)
    exact = results(published_thresholds, inputs, dy, torch.float64, signed=signed)
    unit = None if x_dtype == c_dtype else torch.finfo(c_dtype).eps
    assert_as_close_as_plain(got, plain, exact, shape, unit=unit)
    with torch.no_grad():
        y = fused(**inputs, signed=signed)
    assert_as_close_as_plain({"y": y}, {"y": plain["y"]}, {"y": exact["y"]}, shape, unit)
    for _ in range(REPEATS):
        again = results(fused, inputs, dy, signed=signed)
        assert all(torch.equal(again[name], got[name]) for name in got)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(6307, 384), (333, 100), (64, 576)], ids=str)
def test_gradients_of_one_number(shape, dtype, signed):
    check_single_numbers(ista, *shape, dtype=dtype, signed=signed, device="cuda")


def test_auto_takes_triton():
    inputs, _ = inputs_on_gpu(50000, 64)
    found = explain("ista", **inputs, signed=True)
    assert found.chosen == "triton"
    assert [reason.split(":")[0] for reason in found.reasons["cuda"]][-3:] == [
        "a tensor for step_size",
        "a tensor for lambd",
        "signed",
    ]


def transposed(t):
    return t.mT.contiguous().mT if t.dim() > 1 else t


def in_wider_rows(t):
    return torch.cat([t, torch.full_like(t, float("nan"))], dim=-1)[..., : t.shape[-1]]


def every_other(t):
    return torch.stack((t, torch.full_like(t, float("nan"))), -1)[..., 0]


@pytest.mark.parametrize("change", [transposed, in_wider_rows, every_other])
@pytest.mark.parametrize("shape", [(6307, 768), (100, 768)], ids=str)
def test_any_strides(change, shape):
    inputs, dy = inputs_on_gpu(*shape)
    leaves = {k: change(t).detach().requires_grad_() for k, t in inputs.items()}
    y = ista(**leaves, signed=True)
    y.backward(change(dy))
    got = {"y": y.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}}
    plain = results(published_thresholds, inputs, dy, signed=True)
    exact = results(published_thresholds, inputs, dy, torch.float64, signed=True)
    assert_as_close_as_plain(got, plain, exact)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_one_gradient_alone_and_compiled(x_dtype):
    """The same bits as with all wanted; torch.compile believes the shapes that the ops announce."""
    inputs, dy = inputs_on_gpu(1500, 384, x_dtype=x_dtype)
    fused = in_dtype(torch.bfloat16, x_dtype, ista)
    both = results(fused, inputs, dy)
    for name in inputs:
        leaves = {k: t.clone().requires_grad_(k == name) for k, t in inputs.items()}
        fused(**leaves).backward(dy)
        assert torch.equal(leaves[name].grad, both[f"d{name}"]), name
    got = results(torch.compile(fused, fullgraph=x_dtype == torch.bfloat16), inputs, dy)
    assert all(torch.equal(got[k], t) for k, t in both.items())


@pytest.mark.parametrize("signed", [False, True])
def test_nan_and_overflow_are_seen(signed):
    inputs, dy = inputs_on_gpu(192, 64, x_dtype=torch.float16, c_dtype=torch.float16)
    got = results(ista, inputs, dy * float("inf"), signed=signed)
    assert not any(got[f"d{name}"].isfinite().all() for name in inputs)
    inputs["x"][100] = float("nan")
    got = results(ista, inputs, dy, signed=signed)
    assert got["y"][100].isnan().all() and got["dweight"].isnan().all()
    assert got["dstep_size"].isnan().all()
    assert got["y"][:100].isfinite().all() and got["dx"][:100].isfinite().all()


def test_more_elements_than_32_bits_count():
    rows, d = (1 << 31) // 768 + 333, 768
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB")
    inputs, dy = inputs_on_gpu(1000, d)
    x, do = (torch.zeros(rows, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x[-1000:], do[-1000:] = inputs["x"], dy
    got = results(ista, {**inputs, "x": x}, do, signed=True)
    assert not got["y"][:-1000].any() and not got["dx"][:-1000].any()
    got |= {name: got[name][-1000:] for name in ("y", "dx")}
    plain = results(published_thresholds, inputs, dy, signed=True)
    exact = results(published_thresholds, inputs, dy, torch.float64, signed=True)
    assert_as_close_as_plain(got, plain, exact)


# ---- nothing waits for a value


@pytest.mark.parametrize("shape", [(2000, 128), (100, 128)], ids=str)
def test_nothing_waits_for_the_gpu(shape):
    inputs, dy = inputs_on_gpu(*shape)
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    for mode in ("default", "error"):  # compiled by the first
        torch.cuda.set_sync_debug_mode(mode)
        try:
            ista(**leaves, signed=True).backward(dy)
            with torch.no_grad():
                ista(**leaves)
                ista(leaves["x"], leaves["weight"], signed=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(2000, 128), (100, 128)], ids=str)
def test_a_replayed_step_sees_changed_values(shape):
    inputs, dy = inputs_on_gpu(*shape)
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}

    def step():
        y = ista(**leaves, signed=True)
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for name in ("step_size", "lambd", "weight", "x"):
        leaves[name].data.mul_(1.5)
        graph.replay()
        for replayed, eager in zip(captured, step(), strict=True):
            torch.testing.assert_close(replayed, eager)


def test_a_replay_of_inference_sees_changed_values():
    inputs, _ = inputs_on_gpu(2000, 128)
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


def test_opcheck():
    op = torch.ops.crate_kernels
    for rows in (40, 3):
        x, *given = (t.float().cuda() for t in threshold_inputs(rows, 16).values())
        xc, (weight, *numbers) = x.bfloat16(), given
        leaves = [t.clone().requires_grad_() for t in (x, *given)]
        torch.library.opcheck(op.ista_learned, (leaves[0], xc, *leaves[1:], True, "triton"))
        y, a = op.ista_learned(x, xc, *given, True, "triton")
        saved = (torch.randn_like(y), y, xc, weight, a, *numbers, x.dtype, [True] * 4, "triton")
        torch.library.opcheck(op.ista_learned_backward, saved)
        ready = weight.bfloat16()
        torch.library.opcheck(op.ista_learned_apply, (x, xc, ready, *numbers, True, "triton"))
