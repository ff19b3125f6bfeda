"""overcomplete_ista against the published formula, on torch's CPU kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    assert_equal_results,
    off_the_kinks,
    overcomplete_codes,
    overcomplete_inputs,
    published_overcomplete_ista,
    results,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from crate_kernels import (
    overcomplete_ista,
    overcomplete_ista_reference,
    overcomplete_ista_reference_backward,
)
from crate_kernels.library import autocast_dtype
from crate_kernels.overcomplete_ista.op import MEMORY

# Tokens many and few, 1-D and deeper x, one token, one column; dictionaries wide and not.
SHAPES = [(2, 5, 4), (7, 3), (2, 3, 2, 5), (6,), (1, 9), (3, 1, 7), (1, 1)]
OPTIONS = [{}, {"step_size": 0.3, "lambd": 0.5}, {"lambd": 0}, {"step_size": 0}]


def cases():
    for shape, options, tied in itertools.product(SHAPES, OPTIONS, (False, True)):
        inputs = overcomplete_inputs(*shape, tied=tied, width=None if tied else 2 * shape[-1] + 1)
        what = (shape, options, tied)
        yield what, inputs, torch.randn(shape, dtype=torch.float64), options


# ---- the reference


def test_reference_and_its_gradients_equal_the_published_layer():
    for what, inputs, dout, options in cases():
        want = results(published_overcomplete_ista, inputs, dout, **options)
        assert_equal_results(
            results(overcomplete_ista_reference, inputs, dout, **options), want, what
        )
        by_hand = overcomplete_ista_reference_backward(dout, **inputs, **options)
        found = dict(zip(("dx", "ddictionary", "ddecoder"), by_hand, strict=True))
        got = {"y": want["y"], **{name: t for name, t in found.items() if t is not None}}
        assert_equal_results(got, want, what)


@pytest.mark.parametrize("function", [overcomplete_ista_reference, overcomplete_ista])
@pytest.mark.parametrize("tied", [False, True])
def test_gradcheck(function, tied):
    inputs = [t.requires_grad_() for t in overcomplete_inputs(2, 3, 4, tied=tied).values()]
    assert torch.autograd.gradcheck(
        lambda *tensors: function(*tensors, step_size=0.4, lambd=0.3), inputs, eps=1e-7
    )


# ---- the op on the CPU


@pytest.mark.parametrize("memory", MEMORY)
def test_float64_op_equals_the_published_layer(memory):
    for what, inputs, dout, options in cases():
        want = results(published_overcomplete_ista, inputs, dout, **options)
        got = results(overcomplete_ista, inputs, dout, **options, memory=memory)
        assert_equal_results(got, want, what)
        with torch.no_grad():
            y = overcomplete_ista(**inputs, **options)
        assert_equal_results({"y": y}, {"y": want["y"]}, (what, "inference"))


def codes(x, dictionary, decoder=None):
    """The z1 and z2 that the op keeps."""
    given = (x, x.to(autocast_dtype(x)), dictionary, decoder, 0.1, 0.1, "default", "reference")
    return torch.ops.crate_kernels.overcomplete_ista(*given)[2:4]


def autocast(function, dtype):
    def call(**kwargs):
        with torch.autocast("cpu", dtype):
            return function(**kwargs)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(2, 150, 12), (300, 20), (8, 16)])
@pytest.mark.parametrize("tied", [False, True])
def test_op_is_as_close_as_plain_pytorch(dtype, shape, tied):
    inputs = {k: t.to(dtype) for k, t in overcomplete_inputs(*shape, tied=tied).items()}
    several = (codes(**inputs), overcomplete_codes(**inputs))
    dout = off_the_kinks(torch.randn(shape).to(dtype), inputs, several, torch.finfo(dtype).eps)
    exact = results(published_overcomplete_ista, inputs, dout, torch.float64)
    plain = results(published_overcomplete_ista, inputs, dout)
    got = results(overcomplete_ista, inputs, dout)
    assert_as_close_as_plain(got, plain, exact)
    with torch.no_grad():
        assert torch.equal(overcomplete_ista(**inputs), got["y"])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("x_dtype", [torch.float32, "autocast"])
@pytest.mark.parametrize("tied", [False, True])
def test_autocast(dtype, x_dtype, tied):
    """Output and gradients in the published layer's dtypes, and as accurate."""
    inputs = {k: t.float() for k, t in overcomplete_inputs(2, 150, 20, tied=tied).items()}
    if x_dtype == "autocast":
        inputs["x"] = inputs["x"].to(dtype)
    several = [autocast(f, dtype)(**inputs) for f in (codes, overcomplete_codes)]
    unit = torch.finfo(dtype).eps
    dout = off_the_kinks(torch.randn(2, 150, 20).to(dtype), inputs, several, unit)
    got = results(autocast(overcomplete_ista, dtype), inputs, dout)
    plain = results(autocast(published_overcomplete_ista, dtype), inputs, dout)
    assert got["y"].dtype == dtype
    exact = results(published_overcomplete_ista, inputs, dout, torch.float64)
    assert_as_close_as_plain(got, plain, exact, unit=unit)
    with torch.no_grad():
        inference = autocast(overcomplete_ista, dtype)(**inputs)
    assert torch.equal(inference, got["y"])


def test_autocast_leaves_float64():
    with torch.autocast("cpu", torch.bfloat16):
        assert overcomplete_ista(**overcomplete_inputs(5, 4)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_made_again_is_what_was_not_kept(dtype):
    inputs = {k: t.to(dtype) for k, t in overcomplete_inputs(2, 9, 12).items()}
    dout = torch.randn(2, 9, 12).to(dtype)
    default, low = (results(overcomplete_ista, inputs, dout, memory=m) for m in MEMORY)
    assert all(torch.equal(low[name], t) for name, t in default.items())


@pytest.mark.parametrize(("memory", "elements"), [("default", 2 * 4 + 2 * 16), ("low", 2 * 4)])
def test_what_is_kept_for_the_backward_pass(memory, elements):
    """Beside the weights; x itself counts."""
    inputs = {k: t.requires_grad_() for k, t in overcomplete_inputs(3, 5, 4).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        overcomplete_ista(**inputs, memory=memory)
    weights = {inputs[name].data_ptr() for name in ("dictionary", "decoder")}
    assert sum(t.numel() for t in kept if t.data_ptr() not in weights) == 15 * elements


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
def test_every_subset_of_gradients(tied, memory):
    inputs = overcomplete_inputs(2, 5, 4, tied=tied)
    dout = torch.randn(2, 5, 4, dtype=torch.float64)
    full = results(overcomplete_ista, inputs, dout)
    for wanted in itertools.product([False, True], repeat=len(inputs)):
        leaves = {
            k: t.clone().requires_grad_(w) for (k, t), w in zip(inputs.items(), wanted, strict=True)
        }
        y = overcomplete_ista(**leaves, memory=memory)
        torch.testing.assert_close(y.detach(), full["y"])
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dout)
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, full[f"d{name}"], msg=f"{name} {wanted}")
            else:
                assert leaf.grad is None, (name, wanted)


def test_a_dictionary_that_is_the_decoder_too():
    """Passed twice or once: the same result, and both gradients in one."""
    inputs = overcomplete_inputs(2, 5, 4, tied=True)
    dout = torch.randn(2, 5, 4, dtype=torch.float64)

    def twice(x, dictionary):
        return overcomplete_ista(x, dictionary, dictionary)

    assert_equal_results(
        results(twice, inputs, dout), results(overcomplete_ista, inputs, dout), "twice"
    )


def gaps(t):
    wide = torch.full([2 * s for s in t.shape], float("nan"), dtype=t.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


@pytest.mark.parametrize("change", [gaps, lambda t: t.mT.contiguous().mT])
@pytest.mark.parametrize("memory", MEMORY)
def test_any_strides(change, memory):
    inputs, dout = overcomplete_inputs(2, 5, 4), torch.randn(2, 5, 4, dtype=torch.float64)
    want = results(overcomplete_ista, inputs, dout)
    leaves = {k: change(t).requires_grad_() for k, t in inputs.items()}
    y = overcomplete_ista(**leaves, memory=memory)
    assert y.is_contiguous()
    y.backward(change(dout))
    got = {"y": y.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}}
    assert_equal_results(got, want, change)
    with torch.no_grad():
        y = overcomplete_ista(**{k: change(t) for k, t in inputs.items()})
    assert y.is_contiguous()
    assert_equal_results({"y": y}, {"y": want["y"]}, change)


def test_a_transposed_weight():
    """As crate-lm stores it: one (4 D, D), dictionary and decoder."""
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    weight = torch.randn(16, 4, dtype=torch.float64) / 2

    def crate_lm(x, weight, eta=0.1, lambd=0.1):
        first = torch.relu(eta * (x @ weight.T) - eta * lambd)
        step = eta * (x @ weight.T - first @ weight @ weight.T) - eta * lambd
        return torch.relu(first + step) @ weight

    def ours(x, weight):
        return overcomplete_ista(x, weight.T)

    dout = torch.randn(2, 5, 4, dtype=torch.float64)
    inputs = {"x": x, "weight": weight}
    assert_equal_results(results(ours, inputs, dout), results(crate_lm, inputs, dout), "crate-lm")


@pytest.mark.parametrize("ones", [(1, 1, 1), (3, 4, 1), (3, 1, 6), (1, 4, 6)])
def test_expanded_gradients(ones):
    inputs = overcomplete_inputs(3, 4, 6)
    dout = torch.randn(ones, dtype=torch.float64).expand(3, 4, 6)
    want = results(published_overcomplete_ista, inputs, dout)
    assert_equal_results(results(overcomplete_ista, inputs, dout), want, ones)


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4)])
@pytest.mark.parametrize("memory", MEMORY)
def test_empty_batch(shape, memory):
    inputs = overcomplete_inputs(*shape)
    got = results(overcomplete_ista, inputs, torch.empty(shape), memory=memory)
    assert got["y"].shape == got["dx"].shape == shape
    for name in ("ddictionary", "ddecoder"):
        assert torch.equal(got[name], torch.zeros(4, 16, dtype=torch.float64))
    with torch.no_grad():
        assert overcomplete_ista(**inputs).shape == shape


def test_nan_stays_in_its_image():
    inputs = overcomplete_inputs(3, 4, 3)
    inputs["x"][1] = float("nan")
    got = results(overcomplete_ista, inputs, torch.ones(3, 4, 3, dtype=torch.float64))
    assert got["y"][[0, 2]].isfinite().all() and got["y"][1].isnan().all()
    assert got["dx"][[0, 2]].isfinite().all()
    assert got["ddictionary"].isnan().all() and got["ddecoder"].isnan().all()


@pytest.mark.parametrize("tied", [False, True])
def test_overflowed_loss_scale_reaches_every_gradient(tied):
    """What GradScaler looks for: inf in dout must not vanish."""
    inputs = overcomplete_inputs(3, 4, 3, tied=tied)
    got = results(overcomplete_ista, inputs, torch.full((3, 4, 3), float("inf")))
    for name in inputs:
        assert not got[f"d{name}"].isfinite().all(), name


@pytest.mark.parametrize("memory", MEMORY)
def test_inputs_are_left_alone(memory):
    inputs, dout = overcomplete_inputs(5, 4), torch.randn(5, 4, dtype=torch.float64)
    leaves = {k: t.clone().requires_grad_() for k, t in inputs.items()}
    y = overcomplete_ista(**leaves, memory=memory)
    y0, dout0 = y.detach().clone(), dout.clone()
    y.backward(dout, retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves.values()]
    y.backward(dout)  # what was kept is as it was
    for leaf, grad in zip(leaves.values(), first, strict=True):
        assert torch.equal(leaf.grad, 2 * grad)
    assert torch.equal(y, y0) and torch.equal(dout, dout0)
    for name in inputs:
        assert torch.equal(leaves[name], inputs[name]), name


def test_a_result_may_be_written_to():
    """It is not kept: the gradient is that of before."""
    inputs = {k: t.requires_grad_() for k, t in overcomplete_inputs(5, 4).items()}
    y = overcomplete_ista(**inputs)
    y.mul_(2.0)
    torch.testing.assert_close(y, 2 * published_overcomplete_ista(**inputs))
    got = torch.autograd.grad(y.sum(), inputs.values())
    want = torch.autograd.grad(2 * published_overcomplete_ista(**inputs).sum(), inputs.values())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_an_input_written_to_before_the_backward_pass_is_noticed():
    inputs = overcomplete_inputs(5, 4)
    y = overcomplete_ista(inputs["x"], inputs["dictionary"].requires_grad_())
    inputs["x"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_forward_mode_is_refused():
    x, *rest = overcomplete_inputs(5, 4).values()
    with pytest.raises(RuntimeError, match="overcomplete_ista: forward-mode AD is not implemented"):
        torch.func.jvp(lambda x: overcomplete_ista(x, *rest), (x,), (x,))


def test_double_backward_is_refused():
    inputs = [t.requires_grad_() for t in overcomplete_inputs(5, 4).values()]
    loss = overcomplete_ista(*inputs).square().sum()
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not implemented.*create_graph"):
        grad.sum().backward()


def test_tensors_without_values():
    given = {k: t.to("meta") for k, t in overcomplete_inputs(5, 4).items()}
    assert overcomplete_ista(**given).shape == (5, 4)
    with FakeTensorMode():
        assert overcomplete_ista(torch.empty(5, 4), torch.empty(4, 7)).shape == (5, 4)


def test_without_a_gradient_nothing_is_kept():
    inputs = overcomplete_inputs(5, 4)
    op = torch.ops.crate_kernels.overcomplete_ista
    given = (inputs["x"], inputs["x"], inputs["dictionary"], None, 0.1, 0.1)
    sizes = {m: [t.numel() for t in op(*given, m, "reference")] for m in (*MEMORY, "none")}
    assert sizes == {
        "default": [20, 20, 80, 80, 0],
        "low": [20, 20, 0, 0, 0],
        "none": [20, 0, 0, 0, 0],
    }
