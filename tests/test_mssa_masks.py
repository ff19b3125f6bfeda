"""Lengths, packed sequences and windows of mssa and tied_attention, on torch's CPU kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    assert_equal_results,
    attention_by_sequence,
    mssa_by_sequence,
    mssa_inputs,
    published_attention,
    results,
)
from test_mssa import Elsewhere, strided
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from crate_kernels import (
    Explanation,
    explain,
    mssa,
    mssa_reference,
    mssa_reference_backward,
    tied_attention,
    tied_attention_reference,
    tied_attention_reference_backward,
)
from crate_kernels.mssa import torch_kernels
from crate_kernels.mssa.dropout import kept, philox
from crate_kernels.mssa.masks import Mask
from crate_kernels.nn import MSSA, layers

LENGTHS = (5, 0, 7, 1)
WINDOWS = (None, 0, 2, 100)


def padded(lengths=LENGTHS, dtype=torch.int64):
    return {"lengths": torch.tensor(lengths, dtype=dtype)}


def packed(lengths=LENGTHS, dtype=torch.int32, room=0):
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)
    return {"cu_seqlens": ends, "max_seqlen": max(lengths) + room}


def cases():
    """(arguments of mssa in float64, options)."""
    for causal, window in itertools.product((False, True), WINDOWS):
        options = {"heads": 2, "causal": causal, "window": window}
        yield mssa_inputs(4, 7, 2, 3, 5), {**options, **padded()}
        yield mssa_inputs(2, 7, 2, 3, 5), options
        inputs = mssa_inputs(1, sum(LENGTHS), 2, 3, 5)
        inputs["x"] = inputs["x"][0]
        yield inputs, {**options, **packed(room=causal)}


# ---- the reference


def test_reference_and_its_gradients_are_those_of_each_sequence_by_itself():
    for inputs, options in cases():
        dy = torch.randn_like(inputs["x"])
        want = results(mssa_by_sequence, inputs, dy, **options)
        assert_equal_results(results(mssa_reference, inputs, dy, **options), want, options)
        by_hand = mssa_reference_backward(dy, **inputs, **options)
        names = ("dx", "dw_qkv", "dw_out", "db_out")
        got = {"y": want["y"], **dict(zip(names, by_hand, strict=True))}
        assert_equal_results(got, want, options)


def test_core_reference_and_its_gradient():
    for inputs, options in cases():
        w = inputs["x"].repeat_interleave(2, -1)[..., :8]
        do = torch.randn_like(w)
        want = results(attention_by_sequence, {"w": w}, do, **options)
        got = results(tied_attention_reference, {"w": w}, do, **options)
        assert_equal_results(got, want, options)
        dw = tied_attention_reference_backward(do, w, **options)
        assert_equal_results({"y": want["y"], "dw": dw}, want, options)


@pytest.mark.parametrize("function", [mssa_reference, mssa])
def test_gradcheck(function):
    for masks in ({**padded((3, 0))}, {**packed((3, 0, 2))}, {"window": 1}):
        inputs = mssa_inputs(2, 3, 2, 2, 3)
        if "cu_seqlens" in masks:
            inputs["x"] = torch.randn(5, 3, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in inputs.values()]
        options = {"heads": 2, "causal": "window" not in masks, **masks}
        assert torch.autograd.gradcheck(lambda *t, o=options: function(*t, **o), leaves)


# ---- the ops on the CPU


def test_float64_op_is_each_sequence_by_itself():
    for inputs, options in cases():
        dy = torch.randn_like(inputs["x"])
        want = results(mssa_by_sequence, inputs, dy, **options)
        got = results(mssa, inputs, dy, backend="reference", **options)
        assert_equal_results(got, want, options)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("masks", [padded((50, 0, 33)), packed((50, 0, 33)), {"window": 9}])
def test_op_is_as_close_as_plain_pytorch(dtype, masks):
    inputs = {k: t.to(dtype) for k, t in mssa_inputs(3, 50, 2, 16).items()}
    if "cu_seqlens" in masks:
        inputs["x"] = inputs["x"].flatten(0, 1)[:83].clone()
    dy = torch.randn_like(inputs["x"])
    options = {"heads": 2, **masks}
    got = results(mssa, inputs, dy, **options)
    plain = results(mssa_by_sequence, inputs, dy, **options)
    exact = results(mssa_by_sequence, inputs, dy, torch.float64, **options)
    assert_as_close_as_plain(got, plain, exact, masks)


def test_padding_is_neither_seen_nor_written():
    inputs = {k: t.float() for k, t in mssa_inputs(4, 7, 2, 3, 4).items()}
    dy = torch.randn_like(inputs["x"])
    past = torch.arange(7) >= padded()["lengths"][:, None]
    want = results(mssa, inputs, dy, heads=2, **padded())
    inputs["x"][past], dy[past] = 1e4, 1e4
    got = results(mssa, inputs, dy, heads=2, **padded())
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)
    assert not got["y"][past].any() and not got["dx"][past].any()
    w = torch.randn(4, 7, 6)
    w[past] = float("nan")
    got = results(tied_attention, {"w": w}, torch.full_like(w, float("inf")), heads=2, **padded())
    assert got["y"].isfinite().all() and not got["dw"][past].any()


def test_window_of_all_and_lengths_of_all_change_nothing():
    w, do = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    for causal in (False, True):
        want = results(tied_attention, {"w": w}, do, heads=2, causal=causal)
        for masks in ({"window": 5}, {"window": 2**50}, padded((6, 6, 6), torch.int32)):
            got = results(tied_attention, {"w": w}, do, heads=2, causal=causal, **masks)
            assert_equal_results(got, want, masks)


@pytest.mark.parametrize("masks", [padded((4, 2)), packed((4, 2)), {"window": 1}])
def test_any_strides_and_expanded_gradients(masks):
    shape = (6, 8) if "cu_seqlens" in masks else (2, 4, 8)
    w = torch.randn(shape, dtype=torch.float64)
    for do in (torch.randn_like(w), torch.randn(1, dtype=torch.float64).expand(shape)):
        want = results(attention_by_sequence, {"w": w}, do, heads=2, **masks)
        for change in (strided, lambda t: t.mT.contiguous().mT):
            leaf = change(w).requires_grad_()
            y = tied_attention(leaf, heads=2, **masks)
            assert y.is_contiguous()
            y.backward(do)
            assert_equal_results({"y": y.detach(), "dw": leaf.grad}, want, masks)


def test_no_rows():
    for w, masks in [
        (torch.randn(0, 5, 16), padded(())),
        (torch.randn(2, 5, 16), padded((0, 0))),
        (torch.randn(0, 16), packed((0, 0), room=9)),
        (torch.randn(0, 16), {"cu_seqlens": torch.zeros(1, dtype=torch.int32), "max_seqlen": 0}),
    ]:
        got = results(tied_attention, {"w": w}, w, heads=2, **masks)
        assert all(torch.equal(t, torch.zeros_like(w)) for t in got.values())


def test_every_subset_of_gradients():
    inputs, dy = mssa_inputs(4, 7, 2, 3, 4), torch.randn(4, 7, 4, dtype=torch.float64)
    full = results(mssa, inputs, dy, heads=2, window=3, **padded())
    for wanted in itertools.product([False, True], repeat=4):
        leaves = {
            k: t.clone().requires_grad_(w) for (k, t), w in zip(inputs.items(), wanted, strict=True)
        }
        y = mssa(**leaves, heads=2, window=3, **padded())
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dy)
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, full[f"d{name}"])
            else:
                assert leaf.grad is None


def test_autocast():
    inputs = {k: t.float() for k, t in mssa_inputs(4, 7, 2, 8).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = mssa(**inputs, heads=2, **padded())
        want = mssa_by_sequence(**inputs, heads=2, **padded())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)


def test_double_backward_and_forward_mode_are_refused():
    w = torch.randn(1, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(
        tied_attention(w, heads=2, window=1).square().sum(), w, create_graph=True
    )
    with pytest.raises(RuntimeError, match="tied_attention_reference for higher orders"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="forward-mode AD is not implemented"):
        torch.func.jvp(lambda w: tied_attention(w, heads=2, window=1), (w,), (w,))


@pytest.mark.parametrize("max_scores", [1, 150, 10**6])
@pytest.mark.parametrize("masks", [Mask(torch.tensor([5, 2])), Mask(window=1)])
def test_a_few_heads_at_a_time(max_scores, masks, monkeypatch):
    monkeypatch.setattr(torch_kernels, "MAX_SCORES", max_scores)
    w, do = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    options = {"heads": 4, "scale": 0.3, "lengths": masks.sequences, "window": masks.window}
    want = results(attention_by_sequence, {"w": w}, do, **options)
    _, lse_here = torch_kernels.forward(w, 4, 0.3, False, masks)
    with Elsewhere():
        o, lse = torch_kernels.forward(w, 4, 0.3, False, masks)
        dw = torch_kernels.backward(do, w, o, lse, 4, 0.3, False, masks)
    assert_equal_results({"y": o, "dw": dw}, want, max_scores)
    torch.testing.assert_close(lse, lse_here)


# ---- torch.compile


@pytest.mark.parametrize("masks", [padded((5, 2)), packed((5, 2)), {"window": 2}])
@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(masks, dynamic):
    inputs = mssa_inputs(2, 5, 2, 3, 4)
    if "cu_seqlens" in masks:
        inputs["x"] = torch.randn(7, 4, dtype=torch.float64)
    dy, options = torch.randn_like(inputs["x"]), {"heads": 2, "causal": True, **masks}
    compiled = torch.compile(mssa, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want = results(mssa, inputs, dy, **options)
    assert_equal_results(results(compiled, inputs, dy, **options), want, masks)


def test_any_packing_with_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tied_attention, fullgraph=True, backend=counter, dynamic=True)
    for lengths in ((5, 4), (7, 4), (9, 9), (30, 2)):
        w = torch.randn(sum(lengths), 8, dtype=torch.float64)
        options = {"heads": 2, **packed(lengths)}
        got = results(compiled, {"w": w}, w, **options)
        assert_equal_results(got, results(tied_attention, {"w": w}, w, **options), lengths)
    assert counter.frame_count == 1


# ---- what is refused


def test_explain_says_what_cuda_lacks():
    w = torch.randn(4, 7, 8)
    against = explain("tied_attention", w, heads=2, window=3, **padded()).reasons["cuda"]
    assert "lengths: the CUDA kernels do not have it" in against
    assert "window: the CUDA kernels do not have it" in against
    x = torch.randn(13, 8)
    found = explain("mssa", x, torch.randn(8, 8), heads=2, **packed())
    assert "cu_seqlens: the CUDA kernels do not have it" in found.reasons["cuda"]


W3, W2 = torch.randn(4, 7, 8), torch.randn(13, 8)
REFUSED = {
    "both": (W2, {**padded(), **packed()}, ValueError, "either lengths or cu_seqlens"),
    "rank": (W3, packed(), ValueError, r"packed w of shape .*got \(4, 7, 8\)"),
    "rank 2": (W2, {}, ValueError, r"\(B, N, heads\*head_dim\)"),
    "no max_seqlen": (W2, {"cu_seqlens": torch.zeros(3).int()}, ValueError, "together"),
    "max_seqlen alone": (W3, {"max_seqlen": 7}, ValueError, "together"),
    "negative max_seqlen": (W2, {**packed(), "max_seqlen": -1}, ValueError, "max_seqlen >= 0"),
    "max_seqlen a tensor": (W2, {**packed(), "max_seqlen": torch.tensor(7)}, TypeError, "Tensor"),
    "lengths of another B": (W3, padded((1, 2)), ValueError, r"\(B,\) = \(4,\), got \(2,\)"),
    "lengths a list": (W3, {"lengths": [1, 2, 3, 4]}, TypeError, "lengths to be a torch.Tensor"),
    "float lengths": (W3, {"lengths": torch.ones(4)}, TypeError, "int32 or int64.*float32"),
    "lengths elsewhere": (
        W3,
        {"lengths": torch.zeros(4, dtype=torch.int32, device="meta")},
        ValueError,
        "device of the tokens, cpu, got meta",
    ),
    "empty cu_seqlens": (
        W2,
        {"cu_seqlens": torch.zeros(0, dtype=torch.int32), "max_seqlen": 3},
        ValueError,
        r"\(S\+1,\)",
    ),
    "negative window": (W3, {"window": -1}, ValueError, "window >= 0, got -1"),
    "window a float": (W3, {"window": 2.0}, TypeError, "window to be an int, got float"),
    "window a bool": (W3, {"window": True}, TypeError, "window to be an int, got bool"),
    "too long": (W3, padded((8, 1, 1, 1)), ValueError, "lengths from 0 to N = 7"),
    "below zero": (W3, padded((3, -1, 1, 1)), ValueError, "lengths from 0 to N = 7"),
    "not all rows": (W2, packed((5, 7)), ValueError, "cu_seqlens from 0 to T = 13"),
    "longer than max_seqlen": (W2, {**packed(), "max_seqlen": 6}, ValueError, "steps of 0 to 6"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    w, masks, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        tied_attention(w, heads=2, backend="reference", **masks)


def test_packed_mssa_checks_its_tokens():
    with pytest.raises(ValueError, match=r"mssa: expected packed x of shape \(T, D\) with D = 8"):
        mssa(torch.randn(13, 7), torch.randn(8, 8), heads=2, **packed())
    with pytest.raises(ValueError, match=r"mssa: expected packed x"):
        mssa(torch.randn(1, 13, 8), torch.randn(8, 8), heads=2, **packed())


# ---- dropout


def test_philox_gives_its_published_words():
    """The known answers of Random123 for philox4x32 with 7 rounds."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    for seed, counter, want in [
        (zero, zero, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (torch.tensor(-1), ones, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ]:
        assert tuple(int(word) for word in philox(seed, (counter,) * 4)) == want


def test_dropped_weights_are_as_many_as_asked_for_and_independent():
    n, heads = 64, torch.arange(12).view(3, 4)
    for dropout in (0.1, 0.5, 0.9):
        keep = kept(n, heads, dropout, torch.tensor([11])).double()
        spread = (dropout * (1 - dropout)) ** 0.5
        z = (keep - (1 - dropout)) / spread  # mean 0, variance 1
        assert abs(z.mean()) < 4 * z.numel() ** -0.5
        assert (z.mean((-1, -2)).abs() < 4.5 / n).all(), "in every head"
        assert (z.mean(-1).abs() < 5 * n**-0.5).all() and (z.mean(-2).abs() < 5 * n**-0.5).all()
        flat = z.flatten(0, 1).flatten(1)
        between = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0)
        assert between.abs().max() < 4.5 / n, "between heads"
        for other in (z.mT, z.roll(1, -1), z.roll(1, -2)):
            pairs = (z * other).flatten(2)
            off_diagonal = ~torch.eye(n, dtype=torch.bool).flatten()
            assert abs(pairs[..., off_diagonal].mean()) < 4.5 * pairs.numel() ** -0.5
        again = kept(n, heads, dropout, torch.tensor([12])).double()
        assert abs((z * (again - (1 - dropout)) / spread).mean()) < 4.5 * z.numel() ** -0.5


def test_what_is_kept_does_not_depend_on_n():
    """Padded and packed sequences of any length in a batch drop alike."""
    heads, seed = torch.tensor([3]), torch.tensor([-5])
    small, large = (kept(n, heads, 0.4, seed) for n in (9, 30))
    assert torch.equal(small, large[:, :9, :9])
    w, do = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    past = torch.arange(7) >= padded()["lengths"][:, None]
    options = {"heads": 2, "dropout": 0.4, "seed": 5}
    one = results(tied_attention, {"w": w}, do, **options, **padded())
    two = results(tied_attention, {"w": w[~past]}, do[~past], **options, **packed())
    assert_equal_results({name: t[~past] for name, t in one.items()}, two, "packed")


@pytest.mark.parametrize("masks", [{}, {"causal": True, "window": 2}, padded((3, 4))])
def test_dropout_and_its_gradients_given_the_weights_to_keep(masks):
    w, do = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    options = {"heads": 2, "dropout": 0.3, "seed": 3}
    if "lengths" in masks:
        want = results(tied_attention_reference, {"w": w}, do, **options, **masks)
    else:
        keep = kept(4, torch.arange(4).view(2, 2), 0.3, torch.tensor(3)).double() / 0.7
        want = results(published_attention, {"w": w}, do, heads=2, keep=keep, **masks)
    got = results(tied_attention, {"w": w}, do, **options, **masks)
    assert_equal_results(got, want, masks)
    dw = tied_attention_reference_backward(do, w, **options, **masks)
    assert_equal_results({"y": want["y"], "dw": dw}, want, masks)
    leaf = w.clone().requires_grad_()
    for function in (tied_attention, tied_attention_reference):
        assert torch.autograd.gradcheck(lambda w, f=function: f(w, **options, **masks), leaf)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_dropout_is_as_close_as_plain_pytorch(dtype):
    w, do = torch.randn(2, 2, 40, 48).to(dtype)
    keep = kept(40, torch.arange(6).view(2, 3), 0.2, torch.tensor(9)) / 0.8
    options = {"heads": 3, "dropout": 0.2, "seed": 9}
    got = results(tied_attention, {"w": w}, do, **options)

    def given(w):
        return published_attention(w, heads=3, keep=keep.to(w.dtype))

    plain = results(given, {"w": w}, do)
    exact = results(
        lambda w: published_attention(w, heads=3, keep=keep.double().mul(0.8).round() / 0.8),
        {"w": w},
        do,
        torch.float64,
    )
    assert_as_close_as_plain(got, plain, exact)


def test_seeds():
    w = torch.randn(2, 5, 8, requires_grad=True)

    def run(**options):
        return tied_attention(w, heads=2, dropout=0.5, **options)

    assert torch.equal(run(seed=4), run(seed=torch.tensor([4])))
    assert torch.equal(run(seed=4), run(seed=torch.tensor(4)))
    assert not torch.equal(run(seed=4), run(seed=4 + 2**40))
    torch.manual_seed(1)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    assert torch.equal(tied_attention(w, heads=2, dropout=0.0, seed=4), tied_attention(w, heads=2))
    torch.manual_seed(2)
    again = checkpoint(run, use_reentrant=False)
    (dw,) = torch.autograd.grad(again.sum(), w)
    torch.manual_seed(2)
    (want,) = torch.autograd.grad(run().sum(), w)
    assert torch.equal(dw, want)


def test_a_seed_changed_before_the_backward_is_found_out():
    seed = torch.tensor([4])
    w = torch.randn(2, 5, 8, requires_grad=True)
    o = tied_attention(w, heads=2, dropout=0.5, seed=seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_dropout_compiles():
    compiled = torch.compile(tied_attention, fullgraph=True, backend="aot_eager")
    w, do = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    options = {"heads": 2, "dropout": 0.3, "seed": torch.tensor([3])}
    want = results(tied_attention, {"w": w}, do, **options)
    assert_equal_results(results(compiled, {"w": w}, do, **options), want, "seed")
    drawn = compiled(w, heads=2, dropout=0.3)
    assert not torch.equal(drawn, compiled(w, heads=2, dropout=0.3))


def test_layer_drops_inside_the_kernel_where_there_is_one(monkeypatch):
    """In training the fused layer calls the op, with torch's dropout after the projection."""
    layer = MSSA(12, heads=3, dim_head=4, dropout=0.3).train()
    monkeypatch.setattr(layers, "explain", lambda *args: Explanation("mssa", "triton", {}))
    x = torch.randn(2, 5, 12)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    out = layer.to_out[0]
    weights = (layer.qkv.weight, out.weight, out.bias)
    want = F.dropout(mssa(x, *weights, heads=3, dropout=0.3), 0.3)
    assert torch.equal(y, want) and (y == 0).any()
    layer.eval()
    assert torch.equal(layer(x), mssa(x, *weights, heads=3))


DROPOUT_REFUSED = {
    "one": ({"dropout": 1.0}, ValueError, "dropout < 1, got 1.0"),
    "negative": ({"dropout": -0.1}, ValueError, "dropout to be finite and >= 0"),
    "a bool": ({"dropout": True}, TypeError, "dropout to be a float"),
    "seed a float": ({"dropout": 0.1, "seed": 1.0}, TypeError, "seed to be an int or a torch"),
    "seed of 65 bits": ({"dropout": 0.1, "seed": 2**63}, ValueError, "seed of 64 bits"),
    "two seeds": ({"dropout": 0.1, "seed": torch.tensor([1, 2])}, ValueError, r"one int64.*\(2,\)"),
    "int32 seed": ({"seed": torch.tensor([1]).int()}, ValueError, "one int64 on cpu.*int32"),
}


@pytest.mark.parametrize("case", DROPOUT_REFUSED)
def test_dropout_refused(case):
    options, error, match = DROPOUT_REFUSED[case]
    with pytest.raises(error, match=match):
        tied_attention(W3, heads=2, **options)
    with pytest.raises(ValueError, match="expected a seed with dropout"):
        tied_attention_reference(W3, heads=2, dropout=0.1)


def test_explain_says_that_cuda_lacks_dropout():
    reasons = explain("tied_attention", W3, heads=2, dropout=0.1).reasons
    assert "dropout: the CUDA kernels do not have it" in reasons["cuda"]
