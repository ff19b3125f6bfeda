"""cross_entropy against torch's, on torch's CPU kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cross_entropies import (
    cross_entropy_inputs,
    exactly,
    loss_and_gradient,
    published_cross_entropy,
)
from helpers import HALVES, assert_as_close_as_plain, assert_equal_results
from test_mssa import strided
from torch._subclasses.fake_tensor import FakeTensorMode

from crate_kernels import (
    cross_entropy,
    cross_entropy_reference,
    cross_entropy_reference_backward,
)

SHAPES = [((2, 5), 8), ((7,), 3), ((2, 3, 2), 11), ((1,), 1), ((), 6)]


@pytest.mark.parametrize(("rows", "v"), SHAPES, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 1, -1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_reference_and_op_equal_torchs(rows, v, ignore_index, dtype):
    logits, labels = cross_entropy_inputs(*rows, v=v, ignore_index=ignore_index)
    labels, options = labels.to(dtype), {"ignore_index": ignore_index}
    flat = (logits.view(-1, v), labels.view(-1))
    want = loss_and_gradient(published_cross_entropy, *flat, **options)
    want["dlogits"] = want["dlogits"].view(logits.shape)
    for function in (cross_entropy, cross_entropy_reference):
        got = loss_and_gradient(function, logits, labels, **options)
        assert_equal_results(got, want, function.__name__)
    dloss = torch.tensor(-1.75, dtype=torch.float64)
    by_hand = cross_entropy_reference_backward(dloss, logits, labels, **options)
    assert_equal_results({"y": want["y"], "dlogits": by_hand}, want, "by hand")


@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_reference])
@pytest.mark.parametrize("vocab_size", [None, 4, 6])
def test_gradcheck(function, vocab_size):
    logits, labels = cross_entropy_inputs(3, 2, v=6)
    labels = labels.clamp(max=3)
    options = {"vocab_size": vocab_size}
    assert torch.autograd.gradcheck(
        lambda x: function(x, labels, **options), logits.requires_grad_()
    )


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_columns_past_the_vocabulary_count_for_nothing(padding):
    logits, labels = cross_entropy_inputs(3, 4, v=11)
    want = loss_and_gradient(cross_entropy, logits, labels)
    past = torch.full((3, 4, padding), float("nan"), dtype=torch.float64)
    wide = torch.cat((logits, past), -1)
    got = loss_and_gradient(cross_entropy, wide, labels, vocab_size=11)
    assert not got["dlogits"][..., 11:].any()
    got["dlogits"] = got["dlogits"][..., :11]
    assert_equal_results(got, want, padding)
    dloss = torch.tensor(-1.75, dtype=torch.float64)
    by_hand = cross_entropy_reference_backward(dloss, wide, labels, vocab_size=11)
    assert by_hand.shape == wide.shape and not by_hand[..., 11:].any()


@pytest.mark.parametrize(
    "change",
    [strided, lambda t: t.mT.contiguous().mT, lambda t: torch.cat((t, t), -1)[..., :8]],
    ids=["gaps", "columns first", "of a wider product"],
)
def test_any_strides(change):
    logits, labels = cross_entropy_inputs(3, 5, v=8)
    want = loss_and_gradient(cross_entropy, logits, labels)
    got = loss_and_gradient(cross_entropy, change(logits), labels.T.contiguous().T)
    assert got["dlogits"].is_contiguous()
    assert_equal_results(got, want, change)


@pytest.mark.parametrize("vocab_size", [None, 9])
def test_the_gradient_of_a_bias_is_that_through_the_product(vocab_size):
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 4), (11, 4), (11,))]
    _, labels = cross_entropy_inputs(2, 5, v=vocab_size or 11)
    found = []
    for function in (None, cross_entropy, cross_entropy_reference):
        h, w, b = (t.clone().requires_grad_() for t in inputs)
        options = {"vocab_size": vocab_size}
        if function is None:
            y = published_cross_entropy(F.linear(h, w, b), labels, **options)
        else:
            logits = F.linear(h, w, b.detach())
            y = function(logits, labels, added_bias=b[:vocab_size], **options)
        y.backward()
        found.append({"y": y.detach(), "dh": h.grad, "dw": w.grad, "db": b.grad})
    for got in found[1:]:
        assert_equal_results(got, found[0], vocab_size)


@pytest.mark.parametrize("wants", [(True, False), (False, True)])
def test_only_the_gradients_that_are_wanted(wants):
    logits, labels = cross_entropy_inputs(3, v=5)
    bias, both = torch.zeros(5).half(), []
    for given in ((True, True), wants):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((logits, bias), given, strict=True)]
        cross_entropy(leaves[0], labels, added_bias=leaves[1]).backward()
        both.append([t.grad for t in leaves])
    for of_all, found, wanted in zip(*both, wants, strict=True):
        assert torch.equal(of_all, found) if wanted else found is None
    assert both[0][1].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_as_close_as_plain_pytorch(dtype, autocast, mean):
    logits, labels = cross_entropy_inputs(2, 40, v=300, mean=mean)
    logits = logits.to(dtype)
    options = {"with_bias": True}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = loss_and_gradient(cross_entropy, logits, labels, **options)
    plain = loss_and_gradient(published_cross_entropy, logits, labels, **options)
    assert got["y"].dtype == torch.float32 and got["dlogits"].dtype == dtype
    assert_as_close_as_plain(got, plain, exactly(logits, labels, **options), (dtype, mean))


def test_where_no_label_counts():
    logits, labels = cross_entropy_inputs(3, v=5)
    got = loss_and_gradient(cross_entropy, logits, torch.full_like(labels, -100))
    assert got["y"].isnan() and not got["dlogits"].any()
    got = loss_and_gradient(cross_entropy, logits[:0], labels[:0])
    assert got["y"].isnan() and got["dlogits"].shape == (0, 5)


def test_rows_that_are_ignored_change_nothing():
    logits, labels = cross_entropy_inputs(6, v=5)
    labels[3] = -100
    want = loss_and_gradient(cross_entropy, logits, labels)
    for value in (float("nan"), float("inf")):
        logits[3] = value
        got = loss_and_gradient(cross_entropy, logits, labels)
        assert_equal_results(got, want, value)


def test_logits_that_are_not_finite():
    """As torch's: minus infinity is a word that cannot be, the rest is NaN."""
    logits, labels = cross_entropy_inputs(6, v=5, ignored=0.0)
    logits[0, (labels[0] + 1) % 5] = -float("inf")
    want = loss_and_gradient(published_cross_entropy, logits, labels)
    assert_equal_results(loss_and_gradient(cross_entropy, logits, labels), want, "-inf")
    for value in (-float("inf"), float("inf"), float("nan")):
        logits[1] = value
        got = loss_and_gradient(cross_entropy, logits, labels)
        assert (
            got["y"].isnan()
            and got["dlogits"].isnan().all(-1).tolist() == [False, True] + [False] * 4
        )


@pytest.mark.parametrize("label", [5, -1, -2, 10**9])
def test_labels_out_of_range_raise_as_torchs_do(label):
    logits, labels = cross_entropy_inputs(6, v=5)
    labels[2] = label
    for function in (published_cross_entropy, cross_entropy):
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            function(logits, labels)
    padded = torch.cat((logits, logits), -1)
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy(padded, labels, vocab_size=5)


def test_what_is_kept_for_the_backward_pass():
    """Nothing that is as large as the logits, but themselves."""
    logits, labels = cross_entropy_inputs(3, 4, v=50)
    logits, found = logits.bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        cross_entropy(logits, labels)
    assert sorted(t.numel() for t in found) == [1, 12, 24, 600]
    assert next(t for t in found if t.numel() == 600) is logits


def test_inputs_are_left_alone():
    logits, labels = cross_entropy_inputs(3, v=5)
    before = logits.clone(), labels.clone()
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, labels)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * first)
    assert torch.equal(logits, before[0]) and torch.equal(labels, before[1])


def test_forward_mode_and_double_backward_are_refused():
    logits, labels = cross_entropy_inputs(3, v=5)
    with pytest.raises(RuntimeError, match="cross_entropy: forward-mode AD is not implemented"):
        torch.func.jvp(lambda x: cross_entropy(x, labels), (logits,), (logits,))
    loss = cross_entropy(logits.requires_grad_(), labels)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not implemented.*create_graph"):
        grad.sum().backward()


def test_tensors_without_values():
    loss = cross_entropy(torch.empty(3, 5, device="meta"), torch.empty(3, device="meta").long())
    assert loss.shape == () and loss.dtype == torch.float32
    with FakeTensorMode():
        x = torch.empty(2, 3, 5, dtype=torch.bfloat16, requires_grad=True)
        loss = cross_entropy(x, torch.zeros(2, 3, dtype=torch.int32))
        loss.backward()
        assert loss.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
