"""Learned and signed thresholds of ISTA in Triton's interpreter."""

from __future__ import annotations

import functools

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
from crate_kernels.ista import gram_cache
from crate_kernels.ista.learned.op import learned_ista

# Rows >= D go through A, fewer through the weight itself; more rows than one part of a sum has;
# more columns than a program sums over.
SHAPES = [(150, 17), (2, 20, 40), (10, 24)]

tiled = pytest.mark.parametrize(
    ("tiles", "dtype"),
    [("small tiles", torch.float32), ("as chosen", torch.float16), ("described", torch.float16)],
    indirect=["tiles"],
)


def in_dtype(c_dtype):
    """ista in Triton with its GEMMs in that dtype, as autocast has it, whatever fits here."""

    def run(x, weight, step_size=0.1, lambd=0.1, signed=False):
        xc = x.detach().to(c_dtype)
        return learned_ista(x, xc, weight, step_size, lambd, signed, "triton")

    return run


@pytest.mark.parametrize(
    ("kinds", "signed"),
    [(("channel", "channel"), False), ((None, "channel"), True), (("channel", None), True)],
)
@tiled
def test_as_close_as_plain(tiles, dtype, kinds, signed):
    for shape in SHAPES if tiles != "as chosen" else (*SHAPES, (140, 136)):
        inputs = {k: t.to(dtype) for k, t in threshold_inputs(*shape, kinds=kinds).items()}
        dy = off_the_threshold(torch.randn(shape).to(dtype), inputs, signed)
        before = {k: t.clone() for k, t in {**inputs, "dy": dy}.items()}
        got = results(ista, inputs, dy, signed=signed, backend="triton")
        plain = results(published_thresholds, inputs, dy, signed=signed)
        exact = results(published_thresholds, inputs, dy, torch.float64, signed=signed)
        assert_as_close_as_plain(got, plain, exact, (shape, kinds))
        with torch.no_grad():
            y = {"y": ista(**inputs, signed=signed, backend="triton")}
        assert_as_close_as_plain(y, {"y": plain["y"]}, {"y": exact["y"]}, (shape, "inference"))
        assert all(torch.equal(t, before[k]) for k, t in {**inputs, "dy": dy}.items())


@pytest.mark.parametrize(("c_dtype", "signed"), [(HALVES[0], True), (HALVES[1], False)])
def test_as_under_autocast(c_dtype, signed):
    for shape in SHAPES:
        inputs = {k: t.float() for k, t in threshold_inputs(*shape).items()}
        rounded = {**inputs, "x": inputs["x"].to(c_dtype)}
        dy = off_the_threshold(torch.randn(shape), rounded, signed)

        def plain_autocast(c_dtype=c_dtype, **kwargs):
            with torch.autocast("cpu", c_dtype):
                return published_thresholds(**kwargs)

        got = results(in_dtype(c_dtype), inputs, dy, signed=signed)
        plain = results(plain_autocast, inputs, dy, signed=signed)
        exact = results(published_thresholds, inputs, dy, torch.float64, signed=signed)
        assert_as_close_as_plain(got, plain, exact, shape, unit=torch.finfo(c_dtype).eps)


@pytest.mark.parametrize(("shape", "signed"), [((140, 24), True), ((10, 24), False)])
def test_gradients_of_one_number(shape, signed):
    function = functools.partial(ista, backend="triton")
    check_single_numbers(function, *shape, dtype=torch.float16, signed=signed, draws=8)


@pytest.mark.parametrize("shape", [(3, 1), (1, 1), (3,)])
@pytest.mark.parametrize("kinds", [("channel", "scalar"), ("one", None), (None, None)])
def test_one_row_one_column(shape, kinds):
    inputs = {k: t.float() for k, t in threshold_inputs(*shape, kinds=kinds).items()}
    got = results(ista, inputs, torch.ones(shape), signed=True, backend="triton")
    want = results(published_thresholds, inputs, torch.ones(shape), signed=True)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 20), (2, 20)])
def test_any_strides_and_expanded_gradients(shape):
    inputs = {k: t.float() for k, t in threshold_inputs(*shape).items()}
    for dy in (torch.randn(shape[1], shape[0]).mT, torch.ones(1).expand(shape)):
        leaves = {k: torch.stack((t, t), -1)[..., 0].requires_grad_() for k, t in inputs.items()}
        y = ista(**leaves, backend="triton")
        y.backward(dy)
        want = results(published_thresholds, inputs, dy)
        assert y.is_contiguous()
        got = {"y": y.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}}
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(150, 16), (2, 16)])
def test_one_gradient_alone_has_the_bits_that_it_has_with_all(shape):
    inputs = {k: t.float() for k, t in threshold_inputs(*shape).items()}
    dy = torch.randn(shape)
    both = results(ista, inputs, dy, signed=True, backend="triton")
    for name in inputs:
        leaves = {k: t.clone().requires_grad_(k == name) for k, t in inputs.items()}
        ista(**leaves, signed=True, backend="triton").backward(dy)
        assert torch.equal(leaves[name].grad, both[f"d{name}"]), name


@pytest.mark.parametrize("signed", [False, True])
def test_nan_is_kept_and_overflow_is_seen(signed):
    inputs = {k: t.float() for k, t in threshold_inputs(40, 16).items()}
    for c_dtype in (torch.float32, torch.float16):
        dy = torch.full((40, 16), float("inf"))
        got = results(in_dtype(c_dtype), inputs, dy, signed=signed)
        assert not any(got[f"d{name}"].isfinite().all() for name in inputs)
    inputs["x"][3] = float("nan")
    got = results(ista, inputs, torch.ones(40, 16), signed=signed, backend="triton")
    assert got["y"][3].isnan().all() and got["y"][:3].isfinite().all()
    assert got["dx"][:3].isfinite().all()
    assert all(got[f"d{name}"].isnan().all() for name in ("weight", "step_size"))


def test_empty_batch():
    inputs = {k: t.float() for k, t in threshold_inputs(5, 16).items()}
    inputs["x"] = inputs["x"][:0]
    got = results(ista, inputs, torch.empty(0, 16), backend="triton")
    assert got["y"].shape == (0, 16)
    assert all(torch.equal(got[f"d{k}"], torch.zeros_like(t)) for k, t in inputs.items())
    with torch.no_grad():
        assert ista(**inputs, backend="triton").shape == (0, 16)


def test_inference_keeps_a_and_sees_every_change():
    inputs = {k: t.float() for k, t in threshold_inputs(20, 16).items()}
    assert explain("ista", **inputs).chosen == "triton"
    for name in ("step_size", "lambd", "weight"):
        y = ista(**inputs)
        torch.testing.assert_close(y, published_thresholds(**inputs), rtol=1e-4, atol=1e-5)
        inputs[name].data.mul_(1.5)
    gram_cache._entries[inputs["weight"]].gram.zero_()  # nobody notices until W is seen to change
    y = ista(**inputs)
    torch.testing.assert_close(y, published_thresholds(**inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 10, 16), (2, 3, 16)])
@pytest.mark.parametrize("c_dtype", [torch.float32, torch.float16])
def test_opcheck(shape, c_dtype):
    """The shapes, dtypes and strides that torch.compile is promised are what the kernels give."""
    op = torch.ops.crate_kernels
    x, *given = (t.float() for t in threshold_inputs(*shape, kinds=("scalar", "channel")).values())
    xc, (weight, *numbers) = x.to(c_dtype), given
    leaves = [t.clone().requires_grad_() for t in (x, *given)]
    torch.library.opcheck(op.ista_learned, (leaves[0], xc, *leaves[1:], True, "triton"))
    y, a = op.ista_learned(x, xc, *given, True, "triton")
    for wants in ([True] * 4, [True, False, False, True]):
        saved = (torch.randn_like(y), y, xc, weight, a, *numbers, x.dtype, wants, "triton")
        torch.library.opcheck(op.ista_learned_backward, saved)
    ready = torch.zeros(16, 16, dtype=c_dtype)
    torch.library.opcheck(op.ista_learned_apply, (x, xc, ready, *numbers, True, "triton"))
