"""mssa and tied_attention against the published formulas, on torch's CPU kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    assert_equal_results,
    mssa_inputs,
    published_attention,
    published_mssa,
    results,
)
from torch.overrides import TorchFunctionMode

import crate_kernels
from crate_kernels import (
    mssa,
    mssa_reference,
    mssa_reference_backward,
    tied_attention,
    tied_attention_reference,
    tied_attention_reference_backward,
)
from crate_kernels.mssa import torch_kernels
from crate_kernels.mssa.projected import attention_projected

# batch, N, heads, head_dim, width
SHAPES = [(2, 5, 2, 3, 4), (1, 1, 1, 4, 4), (3, 7, 1, 5, 2), (2, 33, 3, 4, 7)]
OPTIONS = [{}, {"causal": True}, {"scale": 0.7}, {"scale": 2, "causal": True}]


def cases():
    for (b, n, h, hd, width), options in itertools.product(SHAPES, OPTIONS):
        inputs = mssa_inputs(b, n, h, hd, width)
        forms = {
            "with bias": inputs,
            "without bias": {k: v for k, v in inputs.items() if k != "b_out"},
            "without w_out": {k: inputs[k] for k in ("x", "w_qkv")},
        }
        for form, given in forms.items():
            yield (b, n, h, hd, width, options, form), given, {"heads": h, **options}


def output_gradient(function, inputs, **options):
    return torch.randn_like(function(**inputs, **options))


# ---- the reference


def test_reference_and_its_gradients_equal_the_published_layer():
    for what, inputs, options in cases():
        dy = output_gradient(published_mssa, inputs, **options)
        want = results(published_mssa, inputs, dy, **options)
        assert_equal_results(results(mssa_reference, inputs, dy, **options), want, what)
        by_hand = mssa_reference_backward(dy, **inputs, **options)
        names = ("dx", "dw_qkv", "dw_out", "db_out")
        got = {name: d for name, d in zip(names, by_hand, strict=True) if d is not None}
        assert_equal_results({"y": want["y"], **got}, want, what)


def test_core_reference_and_its_gradient_equal_the_published_attention():
    for (b, n, h, hd, _), options in itertools.product(SHAPES, OPTIONS):
        w = torch.randn(b, n, h * hd, dtype=torch.float64)
        do = torch.randn_like(w)
        want = results(published_attention, {"w": w}, do, heads=h, **options)
        got = results(tied_attention_reference, {"w": w}, do, heads=h, **options)
        assert_equal_results(got, want, options)
        dw = tied_attention_reference_backward(do, w, heads=h, **options)
        assert_equal_results({"y": want["y"], "dw": dw}, want, options)


@pytest.mark.parametrize("function", [mssa_reference, mssa])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(function, options):
    inputs = [t.requires_grad_() for t in mssa_inputs(2, 4, 2, 3, 5).values()]
    assert torch.autograd.gradcheck(lambda *t: function(*t, heads=2, **options), inputs)


def test_reference_has_second_derivatives():
    w = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w: tied_attention_reference(w, heads=2), w)


# ---- the ops on the CPU


def test_float64_op_equals_the_published_layer():
    for what, inputs, options in cases():
        dy = output_gradient(published_mssa, inputs, **options)
        got = results(mssa, inputs, dy, backend="reference", **options)
        assert_equal_results(got, results(published_mssa, inputs, dy, **options), what)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("causal", [False, True])
def test_op_is_as_close_as_plain_pytorch(dtype, causal):
    for b, n, h, hd in [(2, 50, 3, 64), (2, 197, 2, 48), (1, 1, 2, 16), (3, 17, 1, 20)]:
        inputs = {k: t.to(dtype) for k, t in mssa_inputs(b, n, h, hd).items()}
        dy = torch.randn_like(inputs["x"])
        options = {"heads": h, "causal": causal}
        got = results(mssa, inputs, dy, **options)
        plain = results(published_mssa, inputs, dy, **options)
        exact = results(published_mssa, inputs, dy, torch.float64, **options)
        assert_as_close_as_plain(got, plain, exact, (b, n, h, hd))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("w_dtype", "dtype"), [("float64",) * 2, ("bfloat16", "float32")])
def test_with_its_projection_as_one_op(w_dtype, dtype, with_bias):
    """The same numbers as attention and projection one after the other."""
    w, weight = torch.randn(2, 7, 12), torch.randn(5, 12)
    bias = torch.randn(5) if with_bias else None
    leaves = [w.to(getattr(torch, w_dtype)), weight, bias]
    leaves[1:] = [None if t is None else t.to(getattr(torch, dtype)) for t in leaves[1:]]
    dy = torch.randn(2, 7, 5).to(leaves[0].dtype)
    found = []
    for fused in (False, True):
        w, weight, bias = (None if t is None else t.clone().requires_grad_() for t in leaves)
        if fused:
            options = {"heads": 3, "scale": 0.5, "causal": True, "backend": "reference"}
            y = attention_projected(w, weight, bias, **options)
        else:
            o = tied_attention(w, heads=3, scale=0.5, causal=True)
            y = F.linear(o, weight.to(o.dtype), None if bias is None else bias.to(o.dtype))
        y.backward(dy)
        found.append([y, *(t.grad for t in (w, weight, bias) if t is not None)])
    for got, want in zip(found[1], found[0], strict=True):
        assert got.dtype == want.dtype
        # Gradients of parameters are rounded to the dtype of w there, and not here.
        unit = torch.finfo(dy.dtype).eps
        torch.testing.assert_close(got, want, rtol=unit, atol=unit * want.abs().max().item())


def test_options_have_the_published_defaults():
    w = torch.randn(2, 5, 12, dtype=torch.float64)
    plain = tied_attention(w, heads=3)
    torch.testing.assert_close(plain, tied_attention(w, heads=3, scale=0.5, causal=False))
    assert not torch.allclose(plain, tied_attention(w, heads=3, scale=0.4))
    assert not torch.allclose(plain, tied_attention(w, heads=3, causal=True))
    assert not torch.allclose(plain, tied_attention(w, heads=2))


def test_causal_output_ignores_later_tokens():
    w = torch.randn(1, 9, 8)
    later = w.clone()
    later[:, 6:] = torch.randn(1, 3, 8)
    a, b = (tied_attention(t, heads=2, causal=True) for t in (w, later))
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast(dtype, mixed):
    """Output and gradients in the published layer's dtypes, and as accurate."""
    inputs = {k: t.float() for k, t in mssa_inputs(2, 21, 3, 16).items()}
    if mixed:
        inputs["x"] = inputs["x"].to(dtype)
    dy = torch.randn(2, 21, 48).to(dtype)

    def autocast(function):
        def call(**kwargs):
            with torch.autocast("cpu", dtype):
                return function(**kwargs)

        return call

    got = results(autocast(mssa), inputs, dy, heads=3)
    plain = results(autocast(published_mssa), inputs, dy, heads=3)
    assert got["y"].dtype == dtype
    exact = results(published_mssa, inputs, dy, torch.float64, heads=3)
    assert_as_close_as_plain(got, plain, exact, unit=torch.finfo(dtype).eps)


def test_autocast_takes_the_core_to_its_dtype_and_leaves_float64():
    w = torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert tied_attention(w, heads=2).dtype == torch.bfloat16
        assert tied_attention(w.double(), heads=2).dtype == torch.float64


def test_empty_batch():
    inputs = mssa_inputs(0, 5, 2, 3, 4)
    got = results(mssa, inputs, torch.empty(0, 5, 4), heads=2)
    assert got["y"].shape == (0, 5, 4)
    for name, t in inputs.items():
        assert torch.equal(got[f"d{name}"], torch.zeros_like(t)), name
    assert tied_attention(torch.empty(0, 3, 8, dtype=torch.bfloat16), heads=2).shape == (0, 3, 8)


def test_every_subset_of_gradients():
    inputs = mssa_inputs(2, 5, 2, 3, 4)
    dy = torch.randn(2, 5, 4, dtype=torch.float64)
    full = results(mssa, inputs, dy, heads=2)
    for wanted in itertools.product([False, True], repeat=4):
        leaves = {
            k: t.clone().requires_grad_(w) for (k, t), w in zip(inputs.items(), wanted, strict=True)
        }
        y = mssa(**leaves, heads=2)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dy)
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, full[f"d{name}"], msg=f"{name} {wanted}")
            else:
                assert leaf.grad is None, (name, wanted)


def strided(t):
    """Equal to ``t``, but with gaps between all elements."""
    wide = torch.full([2 * s for s in t.shape], float("nan"), dtype=t.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def tokens_first(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def test_any_strides():
    inputs = mssa_inputs(2, 5, 2, 3, 4)
    dy = torch.randn(2, 5, 4, dtype=torch.float64)
    want = results(mssa, inputs, dy, heads=2)
    for change in (strided, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t):
        leaves = {k: change(t).requires_grad_() for k, t in inputs.items()}
        y = mssa(**leaves, heads=2)
        y.backward(change(dy))
        got = {"y": y.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}}
        assert_equal_results({k: t.contiguous() for k, t in got.items()}, want, change)


def test_core_takes_any_strides_and_returns_contiguous():
    w, do = torch.randn(2, 2, 7, 12, dtype=torch.float64)
    want = results(tied_attention, {"w": w}, do, heads=3)
    for change in (strided, lambda t: t.mT.contiguous().mT, tokens_first):
        leaf = change(w).requires_grad_()
        y = tied_attention(leaf, heads=3)
        assert y.is_contiguous()
        y.backward(change(do))
        assert_equal_results({"y": y.detach(), "dw": leaf.grad}, want, change)


def test_expanded_gradients():
    w = torch.randn(2, 6, 8, dtype=torch.float64)
    for shape in [(1, 1, 1), (2, 6, 1), (2, 1, 8), (1, 6, 8)]:
        do = torch.randn(shape, dtype=torch.float64).expand(2, 6, 8)
        want = results(published_attention, {"w": w}, do, heads=2)
        assert_equal_results(results(tied_attention, {"w": w}, do, heads=2), want, shape)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_image(bad):
    inputs = mssa_inputs(3, 5, 2, 3, 4)
    inputs["x"][1, 2, 0] = bad
    got = results(mssa, inputs, torch.ones(3, 5, 4, dtype=torch.float64), heads=2)
    for name in ("y", "dx"):
        finite = got[name].isfinite()
        assert finite[[0, 2]].all(), name
        assert not finite[1].all(dim=-1).any(), name
    assert not got["dw_qkv"].isfinite().any()


def test_overflowed_loss_scale_reaches_every_gradient():
    """What GradScaler looks for: inf in dy must not vanish."""
    inputs = mssa_inputs(2, 5, 2, 3, 4)
    got = results(mssa, inputs, torch.full((2, 5, 4), float("inf")), heads=2)
    for name in inputs:
        assert not got[f"d{name}"].isfinite().any(), name


def test_inputs_are_left_alone():
    w, do = torch.randn(2, 2, 5, 8)
    leaf, w0, do0 = w.requires_grad_(), w.detach().clone(), do.clone()
    o = tied_attention(leaf, heads=2)
    o0 = o.detach().clone()
    o.backward(do)
    assert torch.equal(leaf, w0) and torch.equal(do, do0) and torch.equal(o, o0)


@pytest.mark.parametrize("function", [mssa, tied_attention])
def test_forward_mode_is_refused(function):
    inputs = mssa_inputs(1, 3, 2, 2)
    given = list(inputs.values()) if function is mssa else [inputs["x"]]
    with pytest.raises(RuntimeError, match="forward-mode AD is not implemented"):
        torch.func.jvp(lambda *t: function(*t, heads=2), tuple(given), tuple(given))


def test_a_result_may_be_written_to():
    w = torch.randn(1, 4, 6, requires_grad=True)
    o = tied_attention(w, heads=2)
    o.mul_(2.0)
    torch.testing.assert_close(o, 2 * published_attention(w, heads=2))


@pytest.mark.parametrize("function", [mssa, tied_attention])
def test_double_backward_is_refused(function):
    inputs = mssa_inputs(1, 3, 2, 2)
    given = [t.requires_grad_() for t in inputs.values()] if function is mssa else [inputs["x"]]
    given[0].requires_grad_()
    (grad,) = torch.autograd.grad(
        function(*given, heads=2).square().sum(), given[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"double backward is not implemented.*create_graph"):
        grad.sum().backward()


def test_backward_twice_adds_up():
    w = torch.randn(1, 4, 6, requires_grad=True)
    o = tied_attention(w, heads=2)
    o.sum().backward(retain_graph=True)
    once = w.grad.clone()
    o.sum().backward()
    torch.testing.assert_close(w.grad, 2 * once)


# ---- the same op on devices without a fused kernel, a few heads at a time


class Elsewhere(TorchFunctionMode):
    """Tensors are on the CPU and say that they are on another device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("meta")
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "device"}
        return function(*args, **kwargs)


@pytest.mark.parametrize("max_scores", [1, 26, 150, 10**6])
@pytest.mark.parametrize("causal", [False, True])
def test_a_few_heads_at_a_time(max_scores, causal, monkeypatch):
    monkeypatch.setattr(torch_kernels, "MAX_SCORES", max_scores)
    w, do = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    want = results(published_attention, {"w": w}, do, heads=4, scale=0.3, causal=causal)
    _, lse_here = torch_kernels.forward(w, 4, 0.3, causal)
    with Elsewhere():
        o, lse = torch_kernels.forward(w, 4, 0.3, causal)
        dw = torch_kernels.backward(do, w, o, lse, 4, 0.3, causal)
    assert_equal_results({"y": o, "dw": dw}, want, max_scores)
    torch.testing.assert_close(lse, lse_here)


@pytest.mark.parametrize(("batch", "heads", "n"), [(1, 1, 1), (3, 4, 5), (5, 2, 10), (2, 7, 3)])
@pytest.mark.parametrize("max_scores", [1, 99, 100, 250, 700, 10**6])
def test_steps_cover_every_head_once_within_memory(batch, heads, n, max_scores, monkeypatch):
    monkeypatch.setattr(torch_kernels, "MAX_SCORES", max_scores)
    visited = torch.zeros(batch, heads)
    for step in torch_kernels._steps(batch, heads, n):
        visited[step] += 1
        assert visited[step].numel() * n * n <= max(max_scores, n * n)
    assert torch.equal(visited, torch.ones(batch, heads))


def test_package_exports_what_its_documents_name():
    for name in crate_kernels.__all__:
        assert hasattr(crate_kernels, name), name
