"""tied_embedding on a GPU: as close as plain PyTorch, repeatable, captured; in CRATE-GPT."""

from __future__ import annotations

import pytest
import torch
from embeddings import drawn_upstream, embedding_inputs, published_embedding, results
from helpers import HALVES, assert_as_close_as_plain, calls

from crate_kernels import explain, models, tied_embedding

pytest.importorskip("crate_kernels.tied_embedding.triton_kernels")

REPEATS = 10
SHAPES = [(16, 1024, 50304, 768), (8, 512, 50265, 768), (3, 100, 11, 48), (2, 7, 1, 2048)]


def on_gpu(*shape, **options):
    inputs = embedding_inputs(*shape, **options)
    return {k: (t.float() if t.is_floating_point() else t).cuda() for k, t in inputs.items()}


def ours(**inputs):
    return tied_embedding(**inputs, backend="triton")


@pytest.mark.parametrize("autocast", [*HALVES, None], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("places", "often"), [(None, 0.0), (None, 0.3), (300, 0.9)])
def test_as_close_as_plain_and_repeatable(shape, places, often, autocast):
    inputs = on_gpu(*shape, places=places, often=often)
    exact = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    upstream, options = drawn_upstream(inputs), {"padding_idx": 0}
    got = results(ours, inputs, upstream, autocast, **options)
    plain = results(published_embedding, inputs, upstream, autocast, **options)
    wanted = results(published_embedding, exact, upstream, **options)
    assert_as_close_as_plain(got, plain, wanted, (shape, places, often, autocast))
    for _ in range(REPEATS):
        again = results(ours, inputs, upstream, autocast, **options)
        assert all(torch.equal(again[name], t) for name, t in got.items())


def test_captured_in_a_cuda_graph():
    inputs = on_gpu(4, 64, 100, 64, places=70)
    for name in ("weight", "position_weight"):
        inputs[name].requires_grad_()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            x, head = tied_embedding(**inputs)
        pair = (inputs["weight"], inputs["position_weight"])
        return torch.autograd.grad(x.float().square().sum() + (3 * head.float()).sum(), pair)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    inputs["idx"].copy_(inputs["idx"].flip(0) // 2)
    inputs["positions"].fill_(3)
    graph.replay()
    for got, want in zip(found, step(), strict=True):
        assert torch.equal(got, want)


def test_auto_takes_triton():
    found = explain("tied_embedding", **on_gpu(2, 5, 11, 64))
    assert found.chosen == "triton"
    assert "tied_embedding: no CUDA kernels are built for it" in found.reasons["cuda"]


def test_a_training_step_of_the_language_model_is_repeatable():
    torch.manual_seed(0)
    model = models.CRATEGPT(vocab_size=1000, context=64, dim=64, depth=2, heads=1).cuda()
    idx, targets = torch.randint(1000, (2, 4, 64), device="cuda").unbind()

    def gradients():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            (_, loss), count = calls(lambda idx: model(idx, targets), idx)
        loss.backward()
        assert count["tied_embedding"] == 1
        return [p.grad.clone() for p in model.parameters()]

    first = gradients()
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
