"""ista and its cached G against the published formula, on torch's CPU kernels."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    assert_equal_results,
    ista_inputs,
    off_the_kink,
    published_ista,
    results,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from crate_kernels import ista, ista_reference, ista_reference_backward
from crate_kernels.ista import gram_cache, torch_kernels

# Tokens >= D go through G, fewer through W itself; D, 1-D and deeper x, one token.
SHAPES = [(2, 5, 4), (7, 3), (2, 3, 2, 5), (4, 4), (2, 3, 8), (6,), (1, 9), (3, 1, 7), (1, 1)]
OPTIONS = [{}, {"step_size": 0.3, "lambd": 0.5}, {"lambd": 0}, {"step_size": 0}]


def cases():
    for shape, options in itertools.product(SHAPES, OPTIONS):
        inputs = ista_inputs(*shape)
        yield (shape, options), inputs, torch.randn(shape, dtype=torch.float64), options


# ---- the reference


def test_reference_and_its_gradients_equal_the_published_layer():
    for what, inputs, dy, options in cases():
        want = results(published_ista, inputs, dy, **options)
        assert_equal_results(results(ista_reference, inputs, dy, **options), want, what)
        by_hand = ista_reference_backward(dy, **inputs, **options)
        got = dict(zip(("dx", "dweight"), by_hand, strict=True))
        assert_equal_results({"y": want["y"], **got}, want, what)


@pytest.mark.parametrize("function", [ista_reference, ista])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 5)])
def test_gradcheck(function, shape):
    inputs = [t.requires_grad_() for t in ista_inputs(*shape).values()]
    assert torch.autograd.gradcheck(
        lambda x, w: function(x, w, step_size=0.4, lambd=0.3), inputs, eps=1e-7
    )


# ---- the op on the CPU


def test_float64_op_equals_the_published_layer():
    for what, inputs, dy, options in cases():
        want = results(published_ista, inputs, dy, **options)
        assert_equal_results(results(ista, inputs, dy, **options), want, what)
        with torch.no_grad():
            y = ista(**inputs, **options)
        assert_equal_results({"y": y}, {"y": want["y"]}, (what, "inference"))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(2, 50, 48), (200, 64), (10, 64), (96,)])
def test_op_is_as_close_as_plain_pytorch(dtype, shape):
    inputs = {k: t.to(dtype) for k, t in ista_inputs(*shape).items()}
    dy = off_the_kink(torch.randn(shape).to(dtype), **inputs)
    exact = results(published_ista, inputs, dy, torch.float64)
    plain = results(published_ista, inputs, dy)
    assert_as_close_as_plain(results(ista, inputs, dy), plain, exact)
    with torch.no_grad():
        got, plain, exact = ({"y": t} for t in (ista(**inputs), plain["y"], exact["y"]))
    assert_as_close_as_plain(got, plain, exact, "inference")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("x_dtype", [torch.float32, "autocast"])
@pytest.mark.parametrize("shape", [(2, 50, 48), (10, 64)])
def test_autocast(dtype, x_dtype, shape):
    """Output and gradients in the published layer's dtypes, and as accurate."""
    inputs = {k: t.float() for k, t in ista_inputs(*shape).items()}
    if x_dtype == "autocast":
        inputs["x"] = inputs["x"].to(dtype)

    def autocast(function):
        def call(**kwargs):
            with torch.autocast("cpu", dtype):
                return function(**kwargs)

        return call

    dy = off_the_kink(torch.randn(shape), inputs["x"].to(dtype), inputs["weight"])
    dy = dy.to(inputs["x"].dtype)
    got = results(autocast(ista), inputs, dy)
    plain = results(autocast(published_ista), inputs, dy)
    assert got["y"].dtype == inputs["x"].dtype
    exact = results(published_ista, inputs, dy, torch.float64)
    assert_as_close_as_plain(got, plain, exact, unit=torch.finfo(dtype).eps)
    with torch.no_grad():
        got = {"y": autocast(ista)(**inputs)}
    assert_as_close_as_plain(got, {"y": plain["y"]}, {"y": exact["y"]}, "inference")


def test_autocast_leaves_float64():
    inputs = ista_inputs(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ista(**inputs).dtype == torch.float64


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 5)])
def test_every_subset_of_gradients(shape):
    inputs, dy = ista_inputs(*shape), torch.randn(shape, dtype=torch.float64)
    full = results(ista, inputs, dy)
    for wanted in itertools.product([False, True], repeat=2):
        leaves = {
            k: t.clone().requires_grad_(w) for (k, t), w in zip(inputs.items(), wanted, strict=True)
        }
        y = ista(**leaves)
        torch.testing.assert_close(y.detach(), full["y"])
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dy)
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, full[f"d{name}"], msg=f"{name} {wanted}")
            else:
                assert leaf.grad is None, (name, wanted)


def gaps(t):
    wide = torch.full([2 * s for s in t.shape], float("nan"), dtype=t.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


@pytest.mark.parametrize("change", [gaps, lambda t: t.mT.contiguous().mT])
@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 5)])
def test_any_strides(change, shape):
    inputs, dy = ista_inputs(*shape), torch.randn(shape, dtype=torch.float64)
    want = results(ista, inputs, dy)
    leaves = {k: change(t).requires_grad_() for k, t in inputs.items()}
    y = ista(**leaves)
    assert y.is_contiguous()
    y.backward(change(dy))
    got = {"y": y.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}}
    assert_equal_results(got, want, change)
    with torch.no_grad():
        y = ista(**{k: change(t) for k, t in inputs.items()})
    assert y.is_contiguous()
    assert_equal_results({"y": y}, {"y": want["y"]}, change)


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 4, 6)])
def test_expanded_gradients(shape):
    inputs = ista_inputs(*shape)
    for ones in [(1, 1, 1), (shape[0], 4, 1), (shape[0], 1, 6), (1, 4, 6)]:
        dy = torch.randn(ones, dtype=torch.float64).expand(shape)
        want = results(published_ista, inputs, dy)
        assert_equal_results(results(ista, inputs, dy), want, ones)


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4)])
def test_empty_batch(shape):
    inputs = ista_inputs(*shape)
    got = results(ista, inputs, torch.empty(shape))
    assert got["y"].shape == got["dx"].shape == shape
    assert torch.equal(got["dweight"], torch.zeros(4, 4, dtype=torch.float64))
    with torch.no_grad():
        assert ista(**inputs).shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(3, 4, 3), (3, 1, 5)])
def test_nan_and_inf_stay_in_their_image(bad, shape):
    inputs = ista_inputs(*shape)
    inputs["x"][1] = bad
    dy = torch.ones(shape, dtype=torch.float64)
    got, want = (results(f, inputs, dy) for f in (ista, published_ista))
    with torch.no_grad():
        inference = {"y": ista(**inputs)}
    for found in (got, inference):
        assert found["y"][[0, 2]].isfinite().all()
    if bad != bad:
        for found in (got, inference):
            assert found["y"][1].isnan().all()
        assert got["dx"][[0, 2]].isfinite().all()
        assert got["dweight"].isnan().all() and want["dweight"].isnan().all()
    else:
        assert not got["y"][1].isfinite().all() and not inference["y"][1].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 4, 3), (3, 1, 5)])
def test_overflowed_loss_scale_reaches_every_gradient(shape):
    """What GradScaler looks for: inf in dy must not vanish."""
    got = results(ista, ista_inputs(*shape), torch.full(shape, float("inf")))
    for name in ("dx", "dweight"):
        assert not got[name].isfinite().all(), name


@pytest.mark.parametrize("shape", [(5, 4), (2, 5)])
def test_inputs_are_left_alone(shape):
    inputs, dy = ista_inputs(*shape), torch.randn(shape, dtype=torch.float64)
    leaves = {k: t.clone().requires_grad_() for k, t in inputs.items()}
    y = ista(**leaves)
    y0, dy0 = y.detach().clone(), dy.clone()
    y.backward(dy)
    assert torch.equal(y, y0) and torch.equal(dy, dy0)
    with torch.no_grad():
        ista(**leaves)
    for name in inputs:
        assert torch.equal(leaves[name], inputs[name]), name


def test_forward_mode_is_refused():
    x, weight = ista_inputs(5, 4).values()
    with pytest.raises(RuntimeError, match="ista: forward-mode AD is not implemented"):
        torch.func.jvp(lambda x: ista(x, weight), (x,), (x,))


@pytest.mark.parametrize("shape", [(5, 4), (2, 5)])
def test_a_result_may_be_written_to(shape):
    """By whoever wants no gradient of the step; otherwise autograd notices."""
    x, weight = ista_inputs(*shape).values()
    y = ista(x, weight.requires_grad_())
    y.mul_(2.0)
    torch.testing.assert_close(y, 2 * published_ista(x, weight))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_refused():
    inputs = [t.requires_grad_() for t in ista_inputs(5, 4).values()]
    (grad,) = torch.autograd.grad(ista(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not implemented.*create_graph"):
        grad.sum().backward()


# ---- G, kept while no gradient is wanted


@pytest.fixture
def grams_made(monkeypatch):
    """One entry for every G that is computed."""
    made = []
    make_gram = torch_kernels.make_gram

    def counted(*args):
        made.append(args)
        return make_gram(*args)

    monkeypatch.setattr(torch_kernels, "make_gram", counted)
    return made


def change_in_place(weight):
    weight.mul_(1.5)


def change_through_data(weight):
    weight.data.mul_(1.5)


def change_data(weight):
    weight.data = weight.data * 1.5


def change_one_entry_unseen_by_version_counter(weight):
    weight.data.view(-1)[-1] += 3.0


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_through_data,
        change_data,
        change_one_entry_unseen_by_version_counter,
    ],
)
def test_a_changed_weight_is_never_missed(change, grams_made):
    inputs = ista_inputs(5, 4)
    x, weight = inputs["x"], torch.nn.Parameter(inputs["weight"])
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(ista(x, weight), published_ista(x, weight))
        assert len(grams_made) == 1
        change(weight)
        for _ in range(3):
            torch.testing.assert_close(ista(x, weight), published_ista(x, weight))
        assert len(grams_made) == 2


def test_load_state_dict_and_optimizer_steps_are_seen(grams_made):
    layer = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(5, 4)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(ista(x, layer.weight), published_ista(x, layer.weight))

    check()
    layer.load_state_dict({"weight": torch.randn(4, 4)})
    check()
    ista(x, layer.weight).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.5).step()
    check()
    assert len(grams_made) == 4  # the one in grad mode included


def test_step_size_and_dtype_belong_to_the_cached_gram(grams_made):
    x, weight = torch.randn(5, 4), torch.randn(4, 4)
    with torch.no_grad():
        for step_size in (0.1, 0.2):
            torch.testing.assert_close(
                ista(x, weight, step_size=step_size), published_ista(x, weight, step_size=step_size)
            )
        assert len(grams_made) == 2
        ista(x, weight, step_size=0.2, lambd=0.3)
        assert len(grams_made) == 2
        with torch.autocast("cpu", torch.bfloat16):
            ista(x, weight, step_size=0.2)
        assert [args[2] for args in grams_made] == [torch.float32] * 2 + [torch.bfloat16]
        layer = torch.nn.Linear(4, 4)
        ista(x, layer.weight)
        layer.double()
        y = ista(x.double(), layer.weight)
        torch.testing.assert_close(y, published_ista(x.double(), layer.weight))


def test_nan_weight_gives_nan_however_often():
    weight = torch.randn(4, 4)
    weight[1, 2] = float("nan")
    with torch.no_grad():
        for _ in range(2):
            assert ista(torch.ones(5, 4), weight).isnan().any()
        weight[1, 2] = 0.0
        assert ista(torch.ones(5, 4), weight).isfinite().all()


def test_grad_mode_neither_uses_nor_fills_the_cache(grams_made):
    x, weight = torch.randn(5, 4), torch.nn.Parameter(torch.randn(4, 4))
    for count in (1, 2):
        ista(x, weight)
        assert len(grams_made) == count
    assert weight not in gram_cache._entries


def test_tensors_without_gradient_use_the_cache_in_grad_mode_too(grams_made):
    x, weight = torch.randn(5, 4), torch.randn(4, 4)
    for _ in range(3):
        ista(x, weight)
    assert len(grams_made) == 1


def test_cache_goes_with_its_weight():
    gc.collect()  # what other tests left in cycles
    before = len(gram_cache._entries)
    weight = torch.randn(4, 4)
    with torch.no_grad():
        ista(torch.randn(5, 4), weight)
    assert len(gram_cache._entries) == before + 1
    alive = weakref.ref(gram_cache._entries[weight].gram)
    del weight
    gc.collect()
    assert len(gram_cache._entries) == before
    assert alive() is None


def test_copies_have_entries_of_their_own():
    x, layer = torch.randn(5, 4), torch.nn.Linear(4, 4)
    with torch.no_grad():
        ista(x, layer.weight)
        twin = copy.deepcopy(layer)
        twin.weight.mul_(2.0)
        for weight in (twin.weight, layer.weight, twin.weight):
            torch.testing.assert_close(ista(x, weight), published_ista(x, weight))


def test_weights_sharing_memory_have_entries_of_their_own():
    x, weight = torch.randn(5, 4), torch.randn(4, 4)
    with torch.no_grad():
        for w in (weight, weight.mT, weight.view(4, 4), weight.mT):
            torch.testing.assert_close(ista(x, w), published_ista(x, w))


def test_inference_mode_and_no_grad_share_a_weight():
    """A G made in inference mode must still be refreshable outside of it, and the reverse."""
    x, weight = torch.randn(5, 4), torch.randn(4, 4)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(ista(x, weight), published_ista(x, weight))
        weight.mul_(1.1)


def test_an_interrupted_refresh_leaves_no_stale_gram(monkeypatch):
    x, weight = torch.randn(5, 4), torch.randn(4, 4)

    def interrupted(weight, seen, gram, step_size):
        seen.copy_(weight)
        raise KeyboardInterrupt

    with torch.no_grad():
        for change in (1.0, 1.5):
            weight.mul_(change)
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(torch_kernels, "refresh_gram", interrupted)
                ista(x, weight)
            for _ in range(2):
                torch.testing.assert_close(ista(x, weight), published_ista(x, weight))


def test_inference_equals_training_under_autocast():
    x, weight = torch.randn(100, 64), torch.nn.Parameter(torch.randn(64, 64) / 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = ista(x, weight)
        with torch.no_grad():
            assert torch.equal(ista(x, weight), y)


def test_tensors_without_values():
    x, weight = torch.empty(5, 4, device="meta"), torch.empty(4, 4, device="meta")
    assert ista(x, weight).shape == (5, 4)
    with FakeTensorMode():
        assert ista(torch.empty(5, 4), torch.empty(4, 4)).shape == (5, 4)


def test_a_thread_never_takes_what_another_has_half_made(monkeypatch):
    """One thread is stopped between seen and gram, as on a GPU; the other goes on."""
    x, weight = torch.randn(5, 4), torch.randn(4, 4)
    refresh, halfway, done = torch_kernels.refresh_gram, threading.Event(), threading.Event()

    def stopped(weight, seen, gram, step_size):
        monkeypatch.setattr(torch_kernels, "refresh_gram", refresh)
        refresh(weight, seen, torch.empty_like(gram), step_size)
        halfway.set()
        assert done.wait(30)
        gram.copy_(torch_kernels.make_gram(weight, step_size, gram.dtype))

    ista(x, weight)
    weight.mul_(1.5)
    want = published_ista(x, weight)
    monkeypatch.setattr(torch_kernels, "refresh_gram", stopped)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ista, x, weight)
        assert halfway.wait(30)
        second = ista(x, weight)
        done.set()
        for y in (second, first.result(), ista(x, weight)):
            torch.testing.assert_close(y, want)


def test_a_result_is_never_an_alias_of_the_cache():
    x, weight = torch.randn(5, 4), torch.randn(4, 4)
    with torch.no_grad():
        y = ista(x, weight)
        want = y.clone()
        ista(x + 1, weight)
        assert torch.equal(y, want)
        y.zero_()
        torch.testing.assert_close(ista(x, weight), want)
