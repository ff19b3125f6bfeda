"""tied_embedding against torch's embeddings, on torch's CPU kernels."""

from __future__ import annotations

import pytest
import torch
from embeddings import drawn_upstream, embedding_inputs, published_embedding, results
from helpers import HALVES, assert_as_close_as_plain, assert_equal_results
from torch._subclasses.fake_tensor import FakeTensorMode

from crate_kernels import (
    tied_embedding,
    tied_embedding_reference,
    tied_embedding_reference_backward,
)

CASES = [
    (embedding_inputs, (2, 5, 7, 4), {}),
    (embedding_inputs, (3, 4, 9, 3), {"places": 6, "often": 0.5}),
    (embedding_inputs, (1, 1, 1, 1), {}),
]


@pytest.mark.parametrize(("make", "shape", "options"), CASES)
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_reference_and_op_equal_torchs(make, shape, options, padding_idx, dtype):
    inputs = make(*shape, **options)
    inputs = {k: t if t.is_floating_point() else t.to(dtype) for k, t in inputs.items()}
    upstream, chosen = drawn_upstream(inputs), {"padding_idx": padding_idx}
    for given in (upstream, (upstream[0], None), (None, upstream[1])):
        want = results(published_embedding, inputs, given, **chosen)
        for function in (tied_embedding, tied_embedding_reference):
            assert_equal_results(results(function, inputs, given, **chosen), want, given)
    sizes = (len(inputs["weight"]), len(inputs["position_weight"]), inputs.get("positions"))
    want = results(published_embedding, inputs, upstream, **chosen)
    by_hand = tied_embedding_reference_backward(*upstream, inputs["idx"], *sizes, **chosen)
    by_hand = dict(zip(("dweight", "dposition_weight"), by_hand, strict=True))
    assert_equal_results(by_hand, {name: want[name] for name in by_hand}, "by hand")


@pytest.mark.parametrize("autocast", HALVES)
@pytest.mark.parametrize("places", [None, 12])
def test_as_close_as_plain_pytorch(autocast, places):
    exact_inputs = embedding_inputs(8, 20, 30, 16, places=places, often=0.4)
    inputs = {k: t.float() if t.is_floating_point() else t for k, t in exact_inputs.items()}
    exact_inputs = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    upstream = drawn_upstream(inputs)
    got = results(tied_embedding, inputs, upstream, autocast)
    plain = results(published_embedding, inputs, upstream, autocast)
    exact = results(published_embedding, exact_inputs, upstream)
    assert got["y"].dtype == got["head"].dtype == autocast
    assert got["dweight"].dtype == got["dposition_weight"].dtype == torch.float32
    assert_as_close_as_plain(got, plain, exact, (autocast, places))


def test_the_weight_itself_where_nothing_is_cast():
    inputs = embedding_inputs(2, 3, 5, 4)
    assert tied_embedding(**inputs)[1] is inputs["weight"]


def test_any_strides():
    inputs = embedding_inputs(3, 4, 6, 5, places=7)
    upstream = drawn_upstream(inputs)
    want = results(tied_embedding, inputs, upstream)
    turned = {k: t.mT.contiguous().mT for k, t in inputs.items()}
    upstream = tuple(t.mT.contiguous().mT for t in upstream)
    assert_equal_results(results(tied_embedding, turned, upstream), want, "turned")


@pytest.mark.parametrize("wants", [(True, False), (False, True)])
def test_only_the_gradients_that_are_wanted(wants):
    inputs = {k: t.float() if t.is_floating_point() else t
              for k, t in embedding_inputs(2, 3, 5, 4).items()}  # fmt: skip
    upstream = drawn_upstream(inputs)
    want = results(tied_embedding, inputs, upstream, torch.bfloat16)
    names = ("weight", "position_weight")
    leaves = {n: inputs[n].requires_grad_(w) for n, w in zip(names, wants, strict=True)}
    with torch.autocast("cpu", torch.bfloat16):
        found = tied_embedding(**{**inputs, **leaves})
    kept = [(t, g.to(t.dtype)) for t, g in zip(found, upstream, strict=True) if t.requires_grad]
    assert len(kept) == 2  # the op's outputs: both may lead to it
    torch.autograd.backward(*map(list, zip(*kept, strict=True)))
    for name, wanted in zip(names, wants, strict=True):
        grad = leaves[name].grad
        assert torch.equal(grad, want[f"d{name}"]) if wanted else grad is None


@pytest.mark.parametrize("name", ["idx", "positions"])
@pytest.mark.parametrize("index", [-1, 5])
def test_indices_out_of_range_raise_as_torchs_do(name, index):
    inputs = embedding_inputs(2, 3, 5, 4, places=5)
    inputs[name][1, 2] = index
    for function in (published_embedding, tied_embedding):
        with pytest.raises(IndexError, match="out of range"):
            function(**inputs)


def test_nothing_for_no_tokens():
    inputs = embedding_inputs(0, 3, 5, 4)
    got = results(tied_embedding, inputs, drawn_upstream(inputs))
    assert got["y"].shape == (0, 3, 4) and not got["dposition_weight"].any()


def test_double_backward_is_refused():
    inputs = embedding_inputs(2, 3, 5, 4)
    x, _ = tied_embedding(**{**inputs, "weight": inputs["weight"].requires_grad_()})
    (grad,) = torch.autograd.grad(x.square().sum(), inputs["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not implemented.*create_graph"):
        grad.sum().backward()


def test_tensors_without_values():
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        weight = torch.empty(7, 4, requires_grad=True)
        places = torch.empty(5, 4, requires_grad=True)
        x, head = tied_embedding(torch.zeros(2, 5, dtype=torch.int32), weight, places)
        (x.sum() + head.sum()).backward()
    assert x.dtype == head.dtype == torch.bfloat16 and x.shape == (2, 5, 4)
    assert weight.grad.shape == (7, 4) and places.grad.dtype == torch.float32
