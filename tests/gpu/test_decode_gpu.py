"""The decoding kernels on a GPU: every configuration against float64, repeatable, in a graph."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import HALVES, assert_as_close_as_plain, check_decode, decode_inputs, distinct

from crate_kernels import explain, models, tied_attention, tied_attention_decode
from crate_kernels.ista import gram_cache

triton_kernels = pytest.importorskip("crate_kernels.decode.triton_kernels")

REPEATS = 50
FAR = 2**31 - 1


def inputs(n_new, heads, head_dim, capacity, lengths, dtype=torch.bfloat16):
    w, cache, lengths = decode_inputs(n_new, heads, head_dim, capacity, lengths)
    return w.to("cuda", dtype), cache.to("cuda", dtype), lengths.cuda()


def check(*sizes, dtype=torch.bfloat16, **options):
    """As close to float64 as the criterion asks, and the same bits every time."""
    w, cache, lengths = inputs(*sizes, dtype)
    options = {"heads": sizes[1], "backend": "triton", **options}
    plain = {k: v for k, v in options.items() if k != "backend"}

    def decode(w, cache, lengths, **_):
        return tied_attention_decode(w, cache, lengths, **options)

    o = check_decode(decode, w, cache, lengths, **plain)
    for _ in range(REPEATS):
        assert torch.equal(decode(w, cache, lengths).nan_to_num(), o.nan_to_num())


def configurations():
    """(dtype, head_dim, T), one for each way in which the kernels are built."""
    dtypes = (*HALVES, torch.float32)
    for dtype, head_dim, n_new in itertools.product(
        dtypes, (64, 48, 128, 80, 256, 16), (1, 2, 16, 17, 100)
    ):
        config = triton_kernels.decode_config(dtype, head_dim, n_new, 3)
        yield (dtype, head_dim, config), (dtype, head_dim, n_new)


@pytest.mark.parametrize("case", distinct(configurations()), ids=str)
def test_configuration(case):
    dtype, head_dim, n_new = case
    check(n_new, 3, head_dim, 1100, (0, 1, 63, 64, 65, 700, 1000), dtype=dtype)


@pytest.mark.parametrize("n_new", [1, 4])
@pytest.mark.parametrize("capacity", [1, 200, 257, 4096, 9000])
def test_contexts_in_one_part_and_in_many(n_new, capacity):
    lengths = [n for n in (0, 1, 100, 255, 256, 511, 4000, 8192, capacity - 1) if n < capacity]
    check(n_new, 2, 64, capacity, lengths)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (64, 12), (300, 3), (70_000, 1)])
def test_many_items_and_heads(batch, heads):
    capacity = 40 if batch > 1000 else 600
    check(1, heads, 64, capacity, [(7 * b) % capacity for b in range(min(batch, 64))])
    w, cache, lengths = inputs(1, heads, 16, capacity, [(7 * b) % capacity for b in range(batch)])
    o = tied_attention_decode(w, cache, lengths, heads=heads)
    for b in (0, batch // 2, batch - 1):
        whole = cache[b : b + 1, : int(lengths[b]) + 1]
        want = tied_attention(whole.double(), heads=heads, causal=True)[:, -1:]
        plain = tied_attention(whole, heads=heads, causal=True, backend="reference")[:, -1:]
        alone = [{"y": t} for t in (o[b : b + 1], plain, want)]
        assert_as_close_as_plain(*alone, (batch, b))


@pytest.mark.parametrize("n_new", [1, 4])
def test_what_does_not_fit_is_not_written_and_is_nan(n_new):
    w, cache, _ = inputs(n_new, 2, 64, 300, (298, 299, 300, 301, FAR, -1, -FAR))
    lengths = torch.tensor([298, 299, 300, 301, FAR, -1, -FAR], device="cuda", dtype=torch.int32)
    wide = torch.full((7, 310, 128), 3.0, device="cuda", dtype=w.dtype)
    inside = wide[:, 5:305]
    inside.copy_(cache.nan_to_num())
    check_decode(tied_attention_decode, w, inside, lengths, heads=2)
    assert (wide[:, :5] == 3).all() and (wide[:, 305:] == 3).all()


@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("n_new", [1, 4])
def test_scales(n_new, scale):
    check(n_new, 3, 48, 900, (10, 600), scale=scale)


def test_a_layer_of_a_larger_cache():
    w, cache, lengths = inputs(1, 12, 64, 512, (100, 300))
    for whole in (cache.new_empty(2, 3, 512, 768), cache.new_empty(512, 2, 3, 768).movedim(0, 2)):
        layer = whole[:, 1]
        layer.copy_(cache)
        check_decode(tied_attention_decode, w, layer, lengths, heads=12)


def test_more_elements_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB")
    cache = torch.zeros(700, 4096, 1024, device="cuda", dtype=torch.bfloat16)
    assert cache.numel() > 2**31
    w, last, lengths = inputs(1, 16, 64, 4096, (4000,))
    cache[-1:] = last
    o = tied_attention_decode(w.expand(700, 1, 1024), cache, lengths.expand(700), heads=16)
    assert torch.equal(cache[-1, 4000], w[0, 0])
    alone = tied_attention_decode(w, last, lengths, heads=16)
    torch.testing.assert_close(o[-1:], alone)  # the context is split otherwise


@pytest.mark.parametrize("n_new", [1, 3])
def test_a_captured_step_goes_on_while_lengths_grow(n_new):
    w, cache, lengths = inputs(n_new, 12, 64, 1024, (0, 500))
    cache = cache.nan_to_num()
    tied_attention_decode(w, cache.clone(), lengths, heads=12)  # compiled, and loaded
    start = cache.clone(), lengths.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = tied_attention_decode(w, cache, lengths, heads=12)
        lengths += n_new
    cache.copy_(start[0]), lengths.copy_(start[1])
    again = start[0].clone()
    for step in range(100):
        w.copy_(torch.randn_like(w))
        graph.replay()
        want = tied_attention_decode(w, again, start[1] + step * n_new, heads=12)
        assert torch.equal(o, want) and torch.equal(cache, again) and o.isfinite().all()


def test_no_host_sync():
    w, cache, lengths = inputs(1, 12, 64, 1024, (5, 500))
    tied_attention_decode(w, cache, lengths, heads=12)
    for backend in ("triton", "reference"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            tied_attention_decode(w, cache, lengths, heads=12, backend=backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_float64_goes_to_the_reference():
    w, cache, lengths = inputs(2, 3, 16, 40, (5, 39, -1), torch.float64)
    assert explain("tied_attention_decode", w, cache, lengths, heads=3).chosen == "reference"
    check_decode(tied_attention_decode, w, cache, lengths, heads=3)


@pytest.mark.parametrize("n_new", [1, 3])
def test_opcheck(n_new):
    w, cache, lengths = inputs(n_new, 2, 64, 400, (5, 300))
    op = torch.ops.crate_kernels.tied_attention_decode
    torch.library.opcheck(op, (w, cache, lengths, 2, 0.125, "triton"))


# ---- the language model


def small_gpt(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "context": 96, "dim": 256, "depth": 3, "heads": 4}
    return models.CRATEGPT(**{**sizes, **options}, device="cuda")


@pytest.mark.parametrize("autocast", [False, True])
def test_steps_give_the_logits_of_the_whole(autocast):
    """Prompts of two lengths, then token by token; as close to float64 as the model without."""
    model = small_gpt()
    idx = torch.randint(300, (2, 90), device="cuda")
    exact, _ = copy.deepcopy(model).double()(idx, idx)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        plain, _ = model(idx, idx)
        cache = model.new_cache(2, 90)
        model.prefill(idx[:, :40], cache)
        cache.lengths[1] = 33
        for t in range(50):
            next_tokens = torch.stack((idx[0, 40 + t], idx[1, 33 + t]))[:, None]
            got = model.step(next_tokens, cache)[:, 0]
            for b, position in enumerate((40 + t, 33 + t)):
                outputs = (got[b], plain[b, position], exact[b, position])
                # One ISTA value on the other side of its threshold outweighs rounding.
                ours, theirs = ((y - outputs[2]).abs().median() for y in outputs[:2])
                assert ours <= 3 * theirs + 1e-6 * outputs[2].abs().max(), (b, t)


def test_greedy_generation_is_that_without_a_cache():
    model = small_gpt()
    idx = torch.randint(300, (3, 20), device="cuda")
    got = model.generate(idx, 100, temperature=0)
    assert got.shape == (3, 120) and torch.equal(got[:, :20], idx)
    with torch.no_grad():
        for length in range(20, 120):
            logits = model(got[:, :length][:, -96:])[0][:, 0]
            chosen = logits.gather(1, got[:, length : length + 1])
            # The largest, or as large up to rounding.
            assert (logits.amax(1, keepdim=True) - chosen <= 1e-4 * logits.abs().max()).all()


def test_a_step_of_the_model_in_a_graph(monkeypatch):
    """The same bits as without one, where ISTA goes through W in both: a graph has no cached G."""
    monkeypatch.setattr(gram_cache, "_can_compare", lambda *_: False)
    model = small_gpt()
    idx = torch.randint(300, (4, 30), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        eager, captured = model.new_cache(4), model.new_cache(4)
        for cache in (eager, captured):
            model.prefill(idx, cache)
        token = idx[:, -1:].clone()
        model.step(token, model.new_cache(4))  # compiled, and loaded
        graph = torch.cuda.CUDAGraph()
        before = captured.lengths.clone()
        with torch.cuda.graph(graph):
            logits = model.step(token, captured)
        captured.lengths.copy_(before)
        for _ in range(40):
            token.copy_(torch.randint_like(token, 300))
            graph.replay()
            assert torch.equal(logits, model.step(token, eager))
        assert torch.equal(captured.lengths, eager.lengths)
