"""cross_entropy on a GPU: as close as plain PyTorch, repeatable, captured; the models' losses."""

from __future__ import annotations

import copy

import pytest
import torch
from cross_entropies import (
    cross_entropy_inputs,
    exactly,
    loss_and_gradient,
    published_cross_entropy,
)
from helpers import HALVES, assert_as_close_as_plain

from crate_kernels import cross_entropy, explain, models

pytest.importorskip("crate_kernels.cross_entropy.triton_kernels")

REPEATS = 20
VOCABULARIES = [50304, 50265, 4097, 1000, 7, 1]


def on_gpu(*rows, v, dtype, **options):
    logits, labels = cross_entropy_inputs(*rows, v=v, **options)
    return logits.to(dtype).cuda(), labels.cuda()


def ours(*args, **options):
    return cross_entropy(*args, backend="triton", **options)


def check(logits, labels, **options):
    got = loss_and_gradient(ours, logits, labels, **options)
    plain = loss_and_gradient(published_cross_entropy, logits, labels, **options)
    what = (tuple(logits.shape), logits.dtype, options)
    assert got["y"].dtype == torch.float32 and got["dlogits"].is_contiguous()
    assert_as_close_as_plain(got, plain, exactly(logits, labels, **options), what)
    for _ in range(REPEATS):
        again = loss_and_gradient(ours, logits, labels, **options)
        assert all(torch.equal(again[name], t) for name, t in got.items())
    if not options.get("with_bias"):
        check(logits, labels, with_bias=True, **options)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("rows", [(1,), (3, 100)], ids=str)
def test_as_close_as_plain_and_repeatable(rows, v, dtype):
    logits, labels = on_gpu(*rows, v=v, dtype=dtype)
    check(logits, labels)
    check(logits, labels.int())


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("v", "width"), [(50265, 50272), (1000, 1001), (7, 300)])
def test_padded_and_narrowed(v, width, dtype):
    wide, labels = on_gpu(2, 60, v=width, dtype=dtype)
    labels = labels.clamp(max=v - 1)
    check(wide, labels, vocab_size=v)
    check(wide[..., :v], labels)


def test_a_mean_far_from_zero_and_labels_ignored_inside_the_vocabulary():
    for dtype in (*HALVES, torch.float32):
        logits, labels = on_gpu(2, 150, v=5000, dtype=dtype, mean=100.0, ignore_index=1)
        check(logits, labels, ignore_index=1)


def test_rows_beyond_offsets_of_32_bits():
    """The last of 45000 rows of 50304 begins at 2.26e9 elements."""
    logits = torch.zeros(45000, 50304, dtype=torch.bfloat16, device="cuda")
    labels = torch.full((45000,), -100, device="cuda")
    labels[-1], logits[-1, 5] = 5, 12.0
    got = loss_and_gradient(ours, logits, labels)
    want = loss_and_gradient(published_cross_entropy, logits[-1:], labels[-1:])
    torch.testing.assert_close(got["y"], want["y"])
    torch.testing.assert_close(got["dlogits"][-1:], want["dlogits"])
    assert not got["dlogits"][:-1].any()


def test_labels_that_count_for_nothing_and_labels_that_are_none():
    logits, labels = on_gpu(300, v=1000, dtype=torch.bfloat16, ignored=0.0)
    labels[3] = -100
    logits[3] = float("nan")
    got = loss_and_gradient(ours, logits, labels)
    assert got["y"].isfinite() and got["dlogits"].isfinite().all() and not got["dlogits"][3].any()
    logits[3] = 0
    for label in (1000, -1, 2**40):
        labels[3] = label
        got = loss_and_gradient(ours, logits, labels)
        assert got["y"].isnan() and got["dlogits"].isnan().any(-1).nonzero().tolist() == [[3]]
    got = loss_and_gradient(ours, logits, torch.full_like(labels, -100))
    assert got["y"].isnan() and not got["dlogits"].any()


def test_logits_that_are_not_finite():
    logits, labels = on_gpu(4, v=5000, dtype=torch.float32, ignored=0.0)
    hidden = (labels[0] + 1 + torch.arange(4990, device="cuda")) % 5000
    logits[0, hidden] = -float("inf")
    check(logits, labels)
    for value in (-float("inf"), float("inf"), float("nan")):
        logits[1] = value
        got = loss_and_gradient(ours, logits, labels)
        assert got["y"].isnan()
        assert got["dlogits"].isnan().all(-1).tolist() == [False, True, False, False]


def test_captured_in_a_cuda_graph():
    logits, labels = on_gpu(300, v=1000, dtype=torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cross_entropy(leaf, labels).backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    leaf.grad = None
    with torch.cuda.graph(graph):
        loss = cross_entropy(leaf, labels)
        loss.backward()
    with torch.no_grad():
        leaf.copy_(logits.flip(0))
    labels[:100] = -100
    graph.replay()
    again = logits.flip(0).requires_grad_()
    want = cross_entropy(again, labels)
    want.backward()
    assert torch.equal(loss, want) and torch.equal(leaf.grad, again.grad)


def test_no_copy_of_the_logits():
    """The backward pass takes the gradient alone: 1 GB of logits, 0.1 GB beside it."""
    logits = torch.randn(10000, 50304, dtype=torch.bfloat16, device="cuda").requires_grad_()
    labels = torch.randint(50304, (10000,), device="cuda")
    size = logits.numel() * 2
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = cross_entropy(logits, labels)
    assert torch.cuda.max_memory_allocated() - before < size / 10
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * size


def test_auto_takes_triton():
    found = explain("cross_entropy", *on_gpu(5, v=64, dtype=torch.bfloat16))
    assert found.chosen == "triton"
    assert "cross_entropy: no CUDA kernels are built for it" in found.reasons["cuda"]


# ---- the models


@pytest.mark.parametrize("model", ["gpt", "bert"])
@pytest.mark.parametrize("vocabulary", [1000, 1003])
def test_losses_of_models_are_torchs_of_their_logits(model, vocabulary):
    torch.manual_seed(0)
    size = {"vocab_size": vocabulary, "dim": 64, "depth": 1, "heads": 1}
    if model == "gpt":
        built, ignored = models.CRATEGPT(context=32, **size).cuda(), -1
    else:
        built, ignored = models.CRATEBERT(positions=34, dropout=0.0, **size).cuda(), -100
    idx = torch.randint(2, vocabulary, (4, 32), device="cuda")
    targets = torch.randint(vocabulary, (4, 32), device="cuda")
    targets = targets.masked_fill(torch.rand(4, 32, device="cuda") < 0.5, ignored)
    with torch.autocast("cuda", torch.bfloat16):
        logits, loss = built(idx, targets)
        want = published_cross_entropy(logits, targets, ignore_index=ignored)
    assert logits.shape == (4, 32, vocabulary) and loss.dtype == torch.float32
    torch.testing.assert_close(loss, want)
    exact = copy.deepcopy(built).double()
    in_double = published_cross_entropy(exact(idx, targets)[0], targets, ignore_index=ignored)

    def gradients(loss, model):
        named = dict(model.named_parameters())
        found = torch.autograd.grad(loss, named.values(), retain_graph=True)
        return {f"d {name}": g for name, g in zip(named, found, strict=True)}

    got, plain = gradients(loss, built), gradients(want, built)
    assert_as_close_as_plain(got, plain, gradients(in_double, exact), (model, vocabulary))
