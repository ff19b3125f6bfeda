"""The ISTA kernels in Triton's interpreter: GEMM edges, epilogues, the flags that spare G."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    ista_inputs,
    off_the_kink,
    published_ista,
    results,
)

from crate_kernels import explain, ista
from crate_kernels.ista import gram_cache

# Rows >= D go through G, fewer through the weight itself; small and odd widths.
SHAPES = [(70, 64), (33, 17), (2, 40, 20), (64, 64), (10, 48), (1, 7), (5, 1), (3,), (2, 3, 50)]


pytestmark = pytest.mark.usefixtures("tiles")


def in_dtype(c_dtype):
    """ista in Triton with its GEMMs in that dtype, as autocast has it, whatever fits here."""

    def run(x, weight, step_size=0.1, lambd=0.1):
        xc = x.detach().to(c_dtype)
        return torch.ops.crate_kernels.ista(x, xc, weight, step_size, lambd, "triton")[0]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_one_dtype(dtype):
    for shape in SHAPES:
        inputs = {k: t.to(dtype) for k, t in ista_inputs(*shape).items()}
        dy = off_the_kink(torch.randn(shape).to(dtype), **inputs)
        before = {k: t.clone() for k, t in {**inputs, "dy": dy}.items()}
        got = results(in_dtype(dtype), inputs, dy)
        plain = results(published_ista, inputs, dy)
        exact = results(published_ista, inputs, dy, torch.float64)
        assert_as_close_as_plain(got, plain, exact, shape)
        assert all(torch.equal(t, before[k]) for k, t in {**inputs, "dy": dy}.items())


@pytest.mark.parametrize("c_dtype", HALVES)
def test_as_under_autocast(c_dtype):
    for shape in SHAPES:
        inputs = {k: t.float() for k, t in ista_inputs(*shape).items()}
        dy = off_the_kink(torch.randn(shape), inputs["x"].to(c_dtype), inputs["weight"])

        def plain_autocast(**kwargs):
            with torch.autocast("cpu", c_dtype):
                return published_ista(**kwargs)

        got = results(in_dtype(c_dtype), inputs, dy)
        plain = results(plain_autocast, inputs, dy)
        exact = results(published_ista, inputs, dy, torch.float64)
        assert_as_close_as_plain(got, plain, exact, shape, unit=torch.finfo(c_dtype).eps)


@pytest.mark.parametrize("options", [{"step_size": 0.4, "lambd": 0.7}, {"step_size": 0.0}])
def test_options(options):
    inputs, dy = ista_inputs(40, 20), torch.randn(40, 20)
    inputs = {k: t.float() for k, t in inputs.items()}
    got = results(in_dtype(torch.float32), inputs, dy, **options)
    want = results(published_ista, inputs, dy, **options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 20), (2, 20)])
def test_any_strides_and_expanded_gradients(shape):
    inputs = {k: t.float() for k, t in ista_inputs(*shape).items()}
    for dy in (torch.randn(shape), torch.randn(shape[1], shape[0]).mT, torch.ones(1).expand(shape)):
        leaves = {k: t.mT.contiguous().mT.requires_grad_() for k, t in inputs.items()}
        y = in_dtype(torch.float32)(**leaves)
        y.backward(dy)
        want = results(published_ista, inputs, dy)
        assert y.is_contiguous()
        torch.testing.assert_close(y.detach(), want["y"], rtol=1e-4, atol=1e-5)
        for name in inputs:
            torch.testing.assert_close(leaves[name].grad, want[f"d{name}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 20, 16), (3, 2, 16)])
def test_nan_stays_in_its_image(shape):
    inputs = {k: t.float() for k, t in ista_inputs(*shape).items()}
    inputs["x"][1] = float("nan")
    got = results(in_dtype(torch.float32), inputs, torch.ones(shape))
    for name in ("y", "dx"):
        assert got[name][[0, 2]].isfinite().all(), name
    assert got["y"][1].isnan().all() and got["dweight"].isnan().all()


@pytest.mark.parametrize("shape", [(20, 16), (2, 16)])
def test_overflowed_loss_scale_reaches_every_gradient(shape):
    inputs = {k: t.float() for k, t in ista_inputs(*shape).items()}
    for c_dtype in (torch.float32, torch.float16):
        got = results(in_dtype(c_dtype), inputs, torch.full(shape, float("inf")))
        assert not got["dx"].isfinite().all() and not got["dweight"].isfinite().all()


def test_empty_batch():
    inputs = {k: t.float() for k, t in ista_inputs(0, 5, 16).items()}
    got = results(in_dtype(torch.float32), inputs, torch.empty(0, 5, 16))
    assert got["y"].shape == got["dx"].shape == (0, 5, 16)
    assert torch.equal(got["dweight"], torch.zeros(16, 16))
    with torch.no_grad():
        assert ista(**inputs, backend="triton").shape == (0, 5, 16)


# ---- G, kept while no gradient is wanted


@pytest.mark.parametrize("width", [8, 80])  # 80 x 80: more than one block looks for changes
def test_cached_gram_is_made_again_only_where_the_weight_changed(width):
    x, weight = (t.float() for t in ista_inputs(width + 5, width).values())

    def check():
        y = ista(x, weight, backend="triton")
        torch.testing.assert_close(y, published_ista(x, weight), rtol=1e-4, atol=1e-5)

    check()
    entry = gram_cache._entries[weight]
    made = entry.gram.clone()
    check()
    assert torch.equal(entry.gram, made)
    entry.gram.zero_()  # nobody notices, for the weight is the same
    torch.testing.assert_close(ista(x, weight, backend="triton"), torch.relu(x - 0.01))
    for at in (0, -1):
        weight.data.view(-1)[at] += 1.0
        check()
    weight.data[0, 1] = float("nan")
    for _ in range(2):
        assert ista(x, weight, backend="triton").isnan().any()
    weight.data[0, 1] = 0.0
    check()


def test_auto_takes_triton_here():
    inputs = {k: t.float() for k, t in ista_inputs(20, 16).items()}
    assert explain("ista", **inputs).chosen == "triton"
    dy = torch.randn(20, 16)
    got = results(ista, inputs, dy)
    assert torch.equal(got["y"], results(ista, inputs, dy, backend="triton")["y"])
    want = results(ista, inputs, dy, backend="reference")
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 10, 16), (2, 3, 16)])
@pytest.mark.parametrize("c_dtype", [torch.float32, torch.float16])
def test_opcheck(shape, c_dtype):
    """The shapes, dtypes and strides that torch.compile is promised are what the kernels give."""
    op = torch.ops.crate_kernels
    x, weight = (t.float() for t in ista_inputs(*shape).values())
    xc = x.to(c_dtype)
    y, gram, mask = op.ista(x, xc, weight, 0.1, 0.2, "triton")
    assert mask.numel() == 0
    leaves = (x.clone().requires_grad_(), xc.clone(), weight.clone().requires_grad_())
    torch.library.opcheck(op.ista, (*leaves, 0.1, 0.2, "triton"))
    saved = (torch.randn_like(y), y, xc, weight, gram, 0.1, torch.float32, True, True, "triton")
    torch.library.opcheck(op.ista_backward, saved)
    torch.library.opcheck(op.ista_apply, (x, xc, torch.zeros(16, 16, dtype=c_dtype), 0.1, "triton"))
