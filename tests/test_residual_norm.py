"""residual_norm against the published form, on torch's CPU kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import HALVES, assert_as_close_as_plain, assert_equal_results
from residuals import (
    FORMS,
    NUMBERS,
    both,
    cast,
    exactly,
    published_residual_norm,
    residual_inputs,
)
from test_mssa import strided, tokens_first
from torch._subclasses.fake_tensor import FakeTensorMode

from crate_kernels import (
    residual_norm,
    residual_norm_reference,
    residual_norm_reference_backward,
)

SHAPES = [(2, 5, 8), (7, 3), (2, 3, 2, 5), (6,), (1, 1, 9)]


def upstream(inputs):
    dz, dh = torch.randn(2, *inputs["x"].shape, dtype=torch.float64)
    return dz, dh


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_reference_and_op_equal_the_published_form(form, shape, eps):
    inputs = residual_inputs(*shape, form=form)
    dz, dh = upstream(inputs)
    want = both(published_residual_norm, inputs, dz, dh, eps=eps)
    for function in (residual_norm_reference, residual_norm):
        assert_equal_results(both(function, inputs, dz, dh, eps=eps), want, function.__name__)
    given = {k: t for k, t in inputs.items() if k != "bias"}
    by_hand = residual_norm_reference_backward(dz, dh, **given, eps=eps)
    names = ("dx", "dweight", "dbias", "dy", "dscale")
    found = {n: t for n, t in zip(names, by_hand, strict=True) if t is not None}
    assert_equal_results({"z": want["z"], "h": want["h"], **found}, want, "by hand")


@pytest.mark.parametrize("function", [residual_norm_reference, residual_norm])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("used", ["both", "z", "h"])
def test_gradcheck(function, form, used):
    inputs = [t.requires_grad_() for t in residual_inputs(2, 3, 4, form=form).values()]
    if (form, used) == ("norm", "z"):
        return  # z is x
    kept = {"both": slice(None), "z": slice(1), "h": slice(1, None)}[used]
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors)[kept], inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("used", ["z", "h"])
def test_one_result_may_stay_unused(form, used):
    """Then there is no gradient where torch has none."""
    inputs = residual_inputs(2, 5, 8, form=form)
    dz, dh = upstream(inputs)
    given = (dz, None) if used == "z" else (None, dh)
    want = both(published_residual_norm, inputs, *given)
    assert_equal_results(both(residual_norm, inputs, *given), want, (form, used))


DTYPES = [(d, d, None) for d in (torch.float32, *HALVES)]
DTYPES += [(x, y, c) for c in HALVES for x, y in ((torch.float32, c), (c, c), (torch.float32,) * 2)]


@pytest.mark.parametrize(("x_dtype", "y_dtype", "autocast"), DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_as_close_as_plain_pytorch(x_dtype, y_dtype, autocast, form):
    """In the published form's dtypes, under autocast or not."""
    inputs = cast(residual_inputs(2, 50, 40, form=form), x_dtype, y_dtype)
    dz, dh = upstream(inputs)
    dz, dh = dz.to(x_dtype), dh.to(autocast or x_dtype)
    got = both(residual_norm, inputs, dz, dh, autocast)
    plain = both(published_residual_norm, inputs, dz, dh, autocast)
    exact = exactly(inputs, dz, dh)
    assert_as_close_as_plain(got, plain, exact, (x_dtype, y_dtype, form))
    assert got["h"].dtype == autocast or autocast is None
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        z, h = residual_norm(**inputs)
    assert torch.equal(z, got["z"]) and torch.equal(h, got["h"])


@pytest.mark.parametrize("scale", NUMBERS)
def test_a_scale_that_is_a_number(scale):
    """As a tensor of it would do, but for its gradient."""
    inputs = residual_inputs(2, 5, 8, form="residual")
    dz, dh = upstream(inputs)
    full = {**inputs, "scale": torch.full((8,), float(scale), dtype=torch.float64)}
    want = both(published_residual_norm, full, dz, dh)
    del want["dscale"]
    for function in (residual_norm_reference, residual_norm):
        assert_equal_results(both(function, inputs, dz, dh, scale=scale), want, (function, scale))
    given = {k: t for k, t in inputs.items() if k != "bias"}
    dx, dweight, dbias, dy, dscale = residual_norm_reference_backward(dz, dh, **given, scale=scale)
    by_hand = {"dx": dx, "dweight": dweight, "dbias": dbias, "dy": dy}
    assert dscale is None
    assert_equal_results({"z": want["z"], "h": want["h"], **by_hand}, want, "by hand")
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *tensors: residual_norm(*tensors, scale), leaves)


@pytest.mark.parametrize(("x_dtype", "y_dtype", "autocast"), DTYPES, ids=str)
def test_a_difference_is_as_close_as_plain_pytorch(x_dtype, y_dtype, autocast):
    inputs = cast(residual_inputs(2, 50, 40, form="residual"), x_dtype, y_dtype)
    dz, dh = upstream(inputs)
    dz, dh = dz.to(x_dtype), dh.to(autocast or x_dtype)
    got = both(residual_norm, inputs, dz, dh, autocast, scale=-1.0)
    plain = both(published_residual_norm, inputs, dz, dh, autocast, scale=-1.0)
    exact = exactly(inputs, dz, dh, scale=-1.0)
    assert_as_close_as_plain(got, plain, exact, (x_dtype, y_dtype))
    assert torch.equal(got["z"], inputs["x"] - inputs["y"])


def test_autocast_leaves_float64_and_unites_the_others():
    inputs = residual_inputs(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert [t.dtype for t in residual_norm(**inputs)] == [torch.float64] * 2
        narrow = {**cast(inputs, torch.float16, torch.bfloat16), "bias": inputs["bias"].float()}
        z, h = residual_norm(**narrow)
    assert (z.dtype, h.dtype) == (torch.float32, torch.bfloat16)


def test_without_y_the_sum_is_x_itself():
    inputs = residual_inputs(3, 8, form="norm")
    z, _ = residual_norm(**inputs)
    assert z is inputs["x"]


def test_the_sum_of_a_stream_far_from_zero():
    """Mean and variance are of the row about its mean."""
    inputs = cast(residual_inputs(9, 64, form="residual", mean=300.0), *[torch.float32] * 2)
    dz, dh = (t.float() for t in upstream(inputs))
    plain = both(published_residual_norm, inputs, dz, dh)
    assert_as_close_as_plain(both(residual_norm, inputs, dz, dh), plain, exactly(inputs, dz, dh))


def test_every_subset_of_gradients():
    inputs = residual_inputs(2, 5, 8)
    dz, dh = upstream(inputs)
    full = both(residual_norm, inputs, dz, dh)
    for wanted in itertools.product([False, True], repeat=len(inputs)):
        leaves = {
            k: t.clone().requires_grad_(w) for (k, t), w in zip(inputs.items(), wanted, strict=True)
        }
        z, h = residual_norm(**leaves)
        assert z.requires_grad == h.requires_grad == any(wanted)
        if any(wanted):
            torch.autograd.backward([z, h], [dz, dh])
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, full[f"d{name}"], msg=f"{name} {wanted}")
            else:
                assert leaf.grad is None, (name, wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [strided, tokens_first], ids=["gaps", "tokens first"])
def test_any_strides(form, change):
    inputs = residual_inputs(2, 5, 8, form=form)
    dz, dh = upstream(inputs)
    want = both(residual_norm, inputs, dz, dh)
    leaves = {
        k: (change(t) if t.dim() > 1 else strided(t)).requires_grad_() for k, t in inputs.items()
    }
    z, h = residual_norm(**leaves)
    assert h.is_contiguous() and (z.is_contiguous() or form == "norm")
    torch.autograd.backward([z, h], [change(dz), change(dh)])
    got = {"z": z.detach(), "h": h.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}}
    assert_equal_results(got, want, change)


@pytest.mark.parametrize("ones", [(1, 1, 1), (2, 1, 8), (1, 5, 8)], ids=str)
def test_expanded_gradients(ones):
    inputs = residual_inputs(2, 5, 8)
    dz, dh = (torch.randn(ones, dtype=torch.float64).expand(2, 5, 8) for _ in range(2))
    want = both(published_residual_norm, inputs, dz, dh)
    assert_equal_results(both(residual_norm, inputs, dz, dh), want, ones)


@pytest.mark.parametrize("shape", [(0, 8), (0, 5, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(shape, form):
    inputs = residual_inputs(*shape, form=form)
    got = both(residual_norm, inputs, *upstream(inputs))
    for name in ("z", "h", "dx"):
        assert got[name].shape == shape
    for name in {"weight", "bias", "scale"} & set(inputs):
        assert torch.equal(got[f"d{name}"], torch.zeros(8, dtype=torch.float64))


def test_nan_stays_in_its_row_and_inf_reaches_every_gradient():
    inputs = residual_inputs(3, 4, 8)
    inputs["y"][1, 2, 3] = float("nan")
    got = both(residual_norm, inputs, *upstream(inputs))
    for name in ("h", "dx", "dy"):
        assert got[name].isfinite().all(-1).sum() == 11 and got[name][1, 2].isnan().all(), name
    inputs = residual_inputs(3, 4, 8)
    infinite = torch.full((3, 4, 8), float("inf"), dtype=torch.float64)
    got = both(residual_norm, inputs, infinite, infinite)
    assert not any(got[f"d{name}"].isfinite().any() for name in inputs)


KEPT = [("norm", {}, 15), ("residual", {}, 15), ("residual", {"scale": -1}, 15), ("scaled", {}, 30)]


@pytest.mark.parametrize(("form", "options", "kept"), KEPT)
def test_what_is_kept_for_the_backward_pass(form, options, kept):
    """Beside parameters and two numbers a row."""
    inputs = {k: t.requires_grad_() for k, t in residual_inputs(3, 5, form=form).items()}
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        residual_norm(**inputs, **options)
    assert sum(t.numel() for t in found if t.shape == (3, 5)) == kept


def test_inputs_are_left_alone():
    inputs = residual_inputs(3, 8)
    dz, dh = upstream(inputs)
    leaves = {k: t.clone().requires_grad_() for k, t in inputs.items()}
    results = residual_norm(**leaves)
    before = [t.detach().clone() for t in (*results, dz, dh)]
    torch.autograd.backward(results, [dz, dh], retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves.values()]
    torch.autograd.backward(results, [dz, dh])
    for leaf, grad in zip(leaves.values(), first, strict=True):
        assert torch.equal(leaf.grad, 2 * grad)
    assert all(map(torch.equal, (*results, dz, dh), before))
    assert all(torch.equal(leaves[name], t) for name, t in inputs.items())


def test_gradients_of_x_and_y_are_not_one_to_write_to():
    """Where dy is dx, one tensor is handed out for both."""
    leaves = {k: t.requires_grad_() for k, t in residual_inputs(3, 8, form="residual").items()}
    torch.autograd.backward(residual_norm(**leaves), [torch.ones(3, 8, dtype=torch.float64)] * 2)
    want = leaves["y"].grad.clone()
    leaves["x"].grad.mul_(2)
    assert torch.equal(leaves["y"].grad, want)


def test_a_sum_written_to_before_the_backward_pass_is_noticed():
    inputs = {k: t.requires_grad_() for k, t in residual_inputs(3, 8).items()}
    z, h = residual_norm(**inputs)
    with torch.no_grad():
        z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_forward_mode_and_double_backward_are_refused():
    x, *rest = residual_inputs(3, 8).values()
    with pytest.raises(RuntimeError, match="residual_norm: forward-mode AD is not implemented"):
        torch.func.jvp(lambda x: residual_norm(x, *rest), (x,), (x,))
    _, h = residual_norm(x.requires_grad_(), *rest)
    (grad,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not implemented.*create_graph"):
        grad.sum().backward()


def test_tensors_without_values():
    given = {k: t.to("meta") for k, t in residual_inputs(3, 8).items()}
    assert [t.shape for t in residual_norm(**given)] == [(3, 8)] * 2
    with FakeTensorMode():
        z, h = residual_norm(torch.empty(5, 4), torch.empty(4), torch.empty(4), torch.empty(5, 4))
        assert z.shape == h.shape == (5, 4)
