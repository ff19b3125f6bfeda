"""Overcomplete ISTA in Triton's interpreter: other shapes of ISTA's GEMM, results masked."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_as_close_as_plain,
    off_the_kinks,
    overcomplete_codes,
    overcomplete_inputs,
    published_overcomplete_ista,
    results,
)

from crate_kernels import explain, overcomplete_ista
from crate_kernels.overcomplete_ista.op import MEMORY

# x and M: tiles that end inside, K and N of either order, one column, one token.
SHAPES = [((17, 24), 40), ((2, 9, 7), 13), ((18, 40), 16), ((3,), 1)]


pytestmark = pytest.mark.usefixtures("tiles")


as_chosen = pytest.mark.parametrize("tiles", ["as chosen"], indirect=True)


def in_dtype(dtype, memory="default"):
    """The op in Triton with its GEMMs in that dtype, as autocast has it, whatever fits here."""

    def run(x, dictionary, decoder=None, step_size=0.1, lambd=0.1):
        given = (x, x.detach().to(dtype), dictionary, decoder, step_size, lambd, memory, "triton")
        return torch.ops.crate_kernels.overcomplete_ista(*given)[0]

    return run


def autocast(function, dtype):
    def call(**kwargs):
        with torch.autocast("cpu", dtype):
            return function(**kwargs)

    return call


def compare(shape, m, x_dtype, dtype, tied, memory):
    inputs = overcomplete_inputs(*shape, width=m, tied=tied)
    inputs = {k: t.to(x_dtype) for k, t in inputs.items()}
    op = torch.ops.crate_kernels.overcomplete_ista
    given = (inputs["x"], inputs["x"].to(dtype), inputs["dictionary"], inputs.get("decoder"))
    ours = op(*given, 0.1, 0.1, "default", "triton")[2:4]
    unit = torch.finfo(dtype).eps

    def plain(function):
        return function if x_dtype == dtype else autocast(function, dtype)

    several = (ours, plain(overcomplete_codes)(**inputs))
    dout = off_the_kinks(torch.randn(shape).to(dtype), inputs, several, unit)
    before = {k: t.clone() for k, t in {**inputs, "dout": dout}.items()}
    got = results(in_dtype(dtype, memory), inputs, dout)
    want = results(plain(published_overcomplete_ista), inputs, dout)
    exact = results(published_overcomplete_ista, inputs, dout, torch.float64)
    what = (shape, m, dtype, tied, memory)
    assert_as_close_as_plain(got, want, exact, what, unit=None if x_dtype == dtype else unit)
    assert all(torch.equal(t, before[k]) for k, t in {**inputs, "dout": dout}.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_dtype(dtype):
    for shape, m in SHAPES:
        compare(shape, m, dtype, dtype, tied=False, memory="default")


def test_as_under_autocast():
    for shape, m in SHAPES:
        compare(shape, m, torch.float32, torch.float16, tied=False, memory="low")


@pytest.mark.parametrize("memory", MEMORY)
def test_tied(memory):
    compare((20, 24), 40, torch.float32, torch.float16, True, memory)


@as_chosen
@pytest.mark.parametrize("options", [{"step_size": 0.4, "lambd": 0.7}, {"step_size": 0.0}])
def test_options(options):
    inputs, dout = overcomplete_inputs(18, 8, width=24), torch.randn(18, 8)
    inputs = {k: t.float() for k, t in inputs.items()}
    got = results(in_dtype(torch.float32), inputs, dout, **options)
    want = results(published_overcomplete_ista, inputs, dout, **options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


@as_chosen
def test_any_strides_and_expanded_gradients():
    inputs = {k: t.float() for k, t in overcomplete_inputs(10, 8, width=24).items()}
    for dout in (torch.randn(10, 8), torch.randn(8, 10).mT, torch.ones(1).expand(10, 8)):
        leaves = {k: t.mT.contiguous().mT.requires_grad_() for k, t in inputs.items()}
        y = in_dtype(torch.float32)(**leaves)
        y.backward(dout)
        want = results(published_overcomplete_ista, inputs, dout)
        assert y.is_contiguous()
        torch.testing.assert_close(y.detach(), want["y"], rtol=1e-4, atol=1e-5)
        for name in inputs:
            torch.testing.assert_close(leaves[name].grad, want[f"d{name}"], rtol=1e-4, atol=1e-4)


@as_chosen
def test_nan_stays_in_its_image():
    inputs = {k: t.float() for k, t in overcomplete_inputs(3, 5, 16, width=24).items()}
    inputs["x"][1] = float("nan")
    got = results(in_dtype(torch.float32), inputs, torch.ones(3, 5, 16))
    for name in ("y", "dx"):
        assert got[name][[0, 2]].isfinite().all(), name
    assert got["y"][1].isnan().all() and got["ddictionary"].isnan().all()


@as_chosen
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_overflowed_loss_scale_reaches_every_gradient(dtype):
    inputs = {k: t.float() for k, t in overcomplete_inputs(20, 16, width=24).items()}
    got = results(in_dtype(dtype), inputs, torch.full((20, 16), float("inf")))
    for name in inputs:
        assert not got[f"d{name}"].isfinite().all(), name


@as_chosen
def test_empty_batch():
    inputs = {k: t.float() for k, t in overcomplete_inputs(0, 5, 16).items()}
    got = results(in_dtype(torch.float32), inputs, torch.empty(0, 5, 16))
    assert got["y"].shape == got["dx"].shape == (0, 5, 16)
    assert torch.equal(got["ddictionary"], torch.zeros(16, 64))


@as_chosen
def test_auto_takes_triton_here():
    inputs = {k: t.float() for k, t in overcomplete_inputs(20, 16).items()}
    assert explain("overcomplete_ista", **inputs).chosen == "triton"
    assert torch.equal(overcomplete_ista(**inputs), in_dtype(torch.float32)(**inputs))


@as_chosen
@pytest.mark.parametrize(("dtype", "memory"), [(torch.float32, "low"), (torch.float16, "default")])
def test_opcheck(dtype, memory):
    """The shapes, dtypes and strides that torch.compile is promised are what the kernels give."""
    op = torch.ops.crate_kernels
    x, dictionary, decoder = (t.float() for t in overcomplete_inputs(3, 8, width=12).values())
    xc, numbers = x.to(dtype), (0.1, 0.2)
    out, *kept = op.overcomplete_ista(x, xc, dictionary, decoder, *numbers, memory, "triton")
    leaves = [t.clone().requires_grad_() for t in (x, dictionary, decoder)]
    given = (leaves[0], xc.clone(), *leaves[1:], *numbers, memory, "triton")
    torch.library.opcheck(op.overcomplete_ista, given)
    saved = (torch.randn_like(out), xc, *kept, dictionary, decoder, [True] * 3, *numbers)
    torch.library.opcheck(op.overcomplete_ista_backward, (*saved, torch.float32, memory, "triton"))
