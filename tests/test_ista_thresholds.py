"""ista with step sizes and thresholds in tensors, and of both signs, on torch's CPU kernels."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    assert_equal_results,
    block_inputs,
    overcomplete_inputs,
    results,
)
from thresholds import (
    check_single_numbers,
    off_the_threshold,
    published_thresholds,
    threshold_inputs,
)

import crate_kernels
from crate_kernels import (
    crate_block,
    ista,
    ista_reference,
    ista_reference_backward,
    models,
    overcomplete_ista,
)
from crate_kernels.ista import torch_kernels
from crate_kernels.nn import ISTA
from crate_kernels.nn.layers import FeedForward

# Tokens >= D go through A, fewer through W itself.
SHAPES = [(2, 5, 4), (7, 3), (2, 3, 8), (6,), (1, 1)]
KINDS = [
    ("scalar", "channel"),
    ("channel", "scalar"),
    ("one", None),
    (None, "channel"),
    (None, None),
]


def cases():
    for shape, kinds, signed in itertools.product(SHAPES, KINDS, (False, True)):
        if kinds == (None, None) and not signed:
            continue
        inputs = threshold_inputs(*shape, kinds=kinds)
        yield (shape, kinds, signed), inputs, torch.randn(shape, dtype=torch.float64), signed


def test_reference_and_its_gradients_equal_the_formula():
    for what, inputs, dy, signed in cases():
        want = results(published_thresholds, inputs, dy, signed=signed)
        assert_equal_results(results(ista_reference, inputs, dy, signed=signed), want, what)
        by_hand = ista_reference_backward(dy, **inputs, signed=signed)
        got = dict(zip([f"d{name}" for name in inputs], by_hand, strict=True))
        assert_equal_results({"y": want["y"], **got}, want, what)


def test_float64_op_equals_the_formula():
    for what, inputs, dy, signed in cases():
        want = results(published_thresholds, inputs, dy, signed=signed)
        assert_equal_results(results(ista, inputs, dy, signed=signed), want, what)
        with torch.no_grad():
            y = ista(**inputs, signed=signed)
        assert_equal_results({"y": y}, {"y": want["y"]}, (what, "inference"))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 5)])
def test_gradcheck(shape, signed):
    for kinds in (("channel", "channel"), ("scalar", "scalar")):
        inputs = threshold_inputs(*shape, kinds=kinds)
        names = list(inputs)

        def run(*tensors, names=names):
            return ista(**dict(zip(names, tensors, strict=True)), signed=signed)

        assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs.values()])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(2, 50, 48), (10, 64)])
def test_as_close_as_plain_pytorch(shape, dtype, signed):
    inputs = {k: t.to(dtype) for k, t in threshold_inputs(*shape).items()}
    dy = off_the_threshold(torch.randn(shape).to(dtype), inputs, signed)
    exact = results(published_thresholds, inputs, dy, torch.float64, signed=signed)
    plain = results(published_thresholds, inputs, dy, signed=signed)
    assert_as_close_as_plain(results(ista, inputs, dy, signed=signed), plain, exact)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(2, 50, 48), (10, 64)])
def test_gradients_of_one_number(shape, dtype, signed):
    check_single_numbers(ista, *shape, dtype=dtype, signed=signed)


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 8)])
def test_under_autocast_dtypes_are_the_layers(shape):
    inputs = {k: t.float() for k, t in threshold_inputs(*shape).items()}
    inputs["x"] = inputs["x"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = results(ista, inputs, torch.ones(shape))
    assert got.pop("y").dtype == torch.bfloat16
    assert [got[f"d{name}"].dtype for name in inputs] == [t.dtype for t in inputs.values()]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 50, 48), (10, 64)])
def test_under_autocast_as_close_as_plain_pytorch(shape, dtype, signed):
    inputs = {k: t.float() for k, t in threshold_inputs(*shape).items()}

    def autocast(function):
        def call(**kwargs):
            with torch.autocast("cpu", dtype):
                return function(**kwargs, signed=signed)

        return call

    rounded = {**inputs, "x": inputs["x"].to(dtype)}
    dy = off_the_threshold(torch.randn(shape), rounded, signed)
    got, plain = (results(autocast(f), inputs, dy) for f in (ista, published_thresholds))
    exact = results(published_thresholds, inputs, dy, torch.float64, signed=signed)
    assert_as_close_as_plain(got, plain, exact, unit=torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 8)])
def test_any_subset_of_gradients(shape):
    inputs, dy = threshold_inputs(*shape), torch.randn(shape, dtype=torch.float64)
    want = results(published_thresholds, inputs, dy)
    for wanted in itertools.product([False, True], repeat=4):
        flags = dict(zip(inputs, wanted, strict=True))
        leaves = {k: t.clone().requires_grad_(flags[k]) for k, t in inputs.items()}
        y = ista(**leaves)
        if any(wanted):
            y.backward(dy)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == flags[name]
            if flags[name]:
                torch.testing.assert_close(leaf.grad, want[f"d{name}"])


def test_strides_of_any_kind():
    inputs = threshold_inputs(2, 5, 4)
    dy = torch.ones(1, dtype=torch.float64).expand(2, 5, 4)
    want = results(published_thresholds, inputs, dy)
    leaves = {k: torch.stack((t, t), -1)[..., 0].requires_grad_() for k, t in inputs.items()}
    y = ista(**leaves)
    y.backward(dy)
    assert y.is_contiguous() and all(t.grad.shape == t.shape for t in leaves.values())
    got = {"y": y.detach(), **{f"d{k}": t.grad.contiguous() for k, t in leaves.items()}}
    assert_equal_results(got, want, "strided")


def test_inference_sees_changed_steps_thresholds_and_weights():
    inputs = threshold_inputs(6, 4)
    with torch.no_grad():
        for name in ("step_size", "lambd", "weight"):
            before = ista(**inputs)
            inputs[name].data.mul_(1.5)
            after = ista(**inputs)
            assert not torch.equal(before, after)
            torch.testing.assert_close(after, published_thresholds(**inputs))


def test_what_is_kept_for_inference_is_the_weights_alone(monkeypatch):
    inputs, made, make_gram = threshold_inputs(6, 4), [], torch_kernels.make_gram
    monkeypatch.setattr(torch_kernels, "make_gram", lambda *a: made.append(a) or make_gram(*a))
    with torch.no_grad():
        for change in (1.0, 1.5):
            inputs["step_size"].mul_(change)
            inputs["lambd"].mul_(change)
            ista(**inputs)
        ista(**inputs, signed=True)
        assert len(made) == 1
        inputs["weight"].data.mul_(1.5)
        torch.testing.assert_close(ista(**inputs), published_thresholds(**inputs))
        assert len(made) == 2


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 8)])
def test_nothing_asks_for_a_value(shape):
    """Tensors on meta have none to give."""
    leaves = {k: t.to("meta").requires_grad_() for k, t in threshold_inputs(*shape).items()}
    y = ista(**leaves, signed=True)
    y.backward(torch.empty_like(y))
    assert all(t.grad.shape == t.shape for t in leaves.values())
    with torch.no_grad():
        assert ista(**leaves).shape == shape


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 3), (3, 1, 5)])
def test_nan_stays_in_its_image_and_overflow_is_seen(shape, signed):
    inputs, dy = threshold_inputs(*shape), torch.ones(shape, dtype=torch.float64)
    got = results(ista, inputs, dy * float("inf"), signed=signed)
    assert not any(got[f"d{name}"].isfinite().all() for name in inputs)
    inputs["x"][1] = float("nan")
    got = results(ista, inputs, dy, signed=signed)
    assert got["y"][1].isnan().all() and got["dweight"].isnan().any()
    assert got["dstep_size"].isnan().all()
    assert got["y"][[0, 2]].isfinite().all() and got["dx"][[0, 2]].isfinite().all()


def test_inputs_are_left_alone():
    for shape in [(6, 4), (2, 8)]:
        inputs, dy = threshold_inputs(*shape), torch.randn(shape, dtype=torch.float64)
        before = {k: t.clone() for k, t in {**inputs, "dy": dy}.items()}
        leaves = {k: t.requires_grad_() for k, t in inputs.items()}
        ista(**leaves, signed=True).backward(dy)
        assert all(torch.equal(t, before[k]) for k, t in {**leaves, "dy": dy}.items())


def test_numbers_and_tensors_of_them_agree():
    x, weight, *_ = threshold_inputs(6, 4).values()
    want = ista(x, weight, step_size=0.3, lambd=0.2)
    step, lambd = (torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.2))
    for given in ((step, 0.2), (0.3, lambd.expand(4)), (step, lambd)):
        got = ista(x, weight, step_size=given[0], lambd=given[1])
        torch.testing.assert_close(got, want)


def test_empty_batch():
    inputs = threshold_inputs(6, 4)
    inputs["x"] = inputs["x"][:0]
    got = results(ista, inputs, torch.empty(0, 4))
    assert got["y"].shape == (0, 4)
    assert all(not got[f"d{name}"].any() for name in inputs)


def test_double_backward_is_refused():
    leaves = {k: t.requires_grad_() for k, t in threshold_inputs(6, 4).items()}
    (dx,) = torch.autograd.grad(ista(**leaves).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"ista: double backward.*\(use ista_reference"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"step_size": torch.ones(3).double()}, ValueError, r"step_size a number or of shape \(\)"),
        ({"lambd": torch.ones(1, 4).double()}, ValueError, r"= \(4,\), got \(1, 4\)"),
        ({"lambd": torch.ones(4)}, TypeError, "lambd of the dtype of x"),
        ({"step_size": -0.1}, ValueError, "step_size to be finite and >= 0"),
        ({"signed": 1}, TypeError, "signed to be a bool, got int"),
        ({"backend": "cuda"}, ValueError, "a tensor for lambd"),
    ],
)
def test_bad_input(change, error, says):
    with pytest.raises(error, match=says):
        ista(**{**threshold_inputs(6, 4), **change})


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = models.Transformer(8, 2, 2, 4)

    def forward(self, x):
        return self.encoder(x)


@pytest.mark.parametrize("shape", [(), (8,)])
def test_modules_learn_them(shape):
    """In an encoder such a layer runs module by module, and says so."""
    model = Model().double()
    layer = model.encoder.layers[1][1].fn
    layer.step_size = torch.nn.Parameter(torch.full(shape, 0.2).double())
    plain = copy.deepcopy(model)
    report = crate_kernels.fuse(model)
    assert [entry.kind for entry in report.skipped] == ["ISTA", "Encoder"]
    assert "step_size" in report.skipped[0].reason
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    want = plain(x)
    torch.testing.assert_close(model(x), want)
    # Learned from after the swap on.
    model = Model().double()
    crate_kernels.fuse(model)
    layer = model.encoder.layers[1][1].fn
    layer.step_size = torch.nn.Parameter(torch.full(shape, 0.2).double())
    got = model(x)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(layer.step_size.grad, plain.encoder.layers[1][1].fn.step_size.grad)
    crate_kernels.prepare_for_inference(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)
    assert f"step_size={shape}" in repr(model)


@pytest.mark.parametrize("module", [ISTA, FeedForward])
def test_modules_are_built_with_them(module):
    assert list(module(8).state_dict()) == ["weight"]
    torch.manual_seed(0)
    eta, lambd = (torch.nn.Parameter(torch.full(s, 0.2).double()) for s in ((), (8,)))
    layer = module(8, eta, lambd, dtype=torch.float64)
    assert set(layer.state_dict()) == {"weight", "step_size", "lambd"}
    assert "step_size=(), lambd=(8,)" in repr(layer)
    x = torch.randn(9, 8, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(2):
        given = {name: t.detach().clone() for name, t in layer.named_parameters()}
        want = results(published_thresholds, {"x": x, **given}, torch.ones_like(x))
        y = layer(x)
        torch.testing.assert_close(y, want["y"])
        optimizer.zero_grad()
        y.sum().backward()
        for name, t in layer.named_parameters():
            torch.testing.assert_close(t.grad, want[f"d{name}"])
        optimizer.step()
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin(x), layer(x))


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (torch.nn.Parameter(torch.ones(7)), ValueError, r"\(D,\) = \(8,\), got \(7,\)"),
        (torch.nn.Parameter(torch.ones(1, 8)), ValueError, r"got \(1, 8\)"),
        (torch.ones(8), TypeError, "lambd to be a float, got Tensor"),
        (-0.1, ValueError, "lambd to be finite and >= 0, got -0.1"),
    ],
)
def test_modules_refuse(value, error, says):
    with pytest.raises(error, match=says):
        ISTA(8, lambd=value)


@pytest.mark.parametrize("name", ["step_size", "lambd"])
def test_ops_without_them_refuse(name):
    given = {name: torch.tensor(0.1)}
    for op, inputs in (
        (crate_block, {**block_inputs(2, 5, 2, 4), "heads": 2}),
        (overcomplete_ista, overcomplete_inputs(5, 8)),
    ):
        with pytest.raises(TypeError, match=f"{op.__name__}: expected {name} to be a float, got T"):
            op(**inputs, **given)


def test_a_text_model_learns_them():
    torch.manual_seed(0)
    model = models.crate_gpt(20, context=8, dim=8, depth=2, heads=2)
    layer = model.transformer["h"][0].ista
    layer.lambd = torch.nn.Parameter(torch.full((8,), 0.1))
    idx = torch.randint(20, (2, 8))
    _, loss = model(idx, idx)
    loss.backward()
    assert layer.lambd.grad.abs().sum() > 0


def test_explain():
    inputs = threshold_inputs(6, 4)
    found = crate_kernels.explain("ista", **inputs, signed=True)
    assert found.chosen == "reference"
    assert any(reason.startswith("signed") for reason in found.reasons["cuda"])
