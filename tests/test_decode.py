"""tied_attention_decode on torch's CPU kernels: the cache, its edges, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import HALVES, check_decode, decode_inputs, published_decode
from test_mssa import Elsewhere

from crate_kernels import (
    explain,
    tied_attention,
    tied_attention_decode,
    tied_attention_decode_reference,
)
from crate_kernels.decode import torch_kernels

FAR = 2**31 - 1
# T, heads, head_dim, capacity, lengths
SHAPES = [
    (1, 2, 3, 9, (0, 1, 5, 8, 9, 11, -1, FAR, -FAR)),
    (3, 2, 3, 9, (0, 1, 5, 6, 7, 8, 9, FAR, -2)),
    (9, 1, 4, 9, (0, 1)),
    (2, 1, 4, 1, (0, 1)),
]


def elsewhere(w, cache, lengths, *, heads, scale=None):
    """The reference backend on a device without a fused kernel."""
    scale = (w.shape[-1] // heads) ** -0.5 if scale is None else scale
    with Elsewhere():
        return torch_kernels.decode(w, cache, lengths, heads, scale)


FUNCTIONS = [tied_attention_decode, tied_attention_decode_reference, elsewhere]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_float64_is_causal_attention_continued(function, scale):
    for n_new, heads, head_dim, capacity, lengths in SHAPES:
        inputs = decode_inputs(n_new, heads, head_dim, capacity, lengths)
        check_decode(function, *inputs, heads=heads, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("function", FUNCTIONS[::2])
def test_as_close_as_plain_pytorch(function, dtype):
    for n_new, heads, head_dim in [(1, 3, 64), (4, 2, 48), (1, 1, 20)]:
        w, cache, lengths = decode_inputs(n_new, heads, head_dim, 200, (0, 3, 196, 120))
        check_decode(function, w.to(dtype), cache.to(dtype), lengths, heads=heads)


def test_steps_are_one_causal_pass():
    w = torch.randn(2, 12, 12, dtype=torch.float64)
    cache, lengths = torch.full_like(w, float("nan")), torch.zeros(2, dtype=torch.int32)
    parts = []
    for new in w.split((1, 1, 4, 1, 5), dim=1):
        parts.append(tied_attention_decode(new, cache, lengths, heads=3))
        lengths += new.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), tied_attention(w, heads=3, causal=True))
    assert torch.equal(cache, w)


def test_a_layer_of_a_larger_cache_and_any_strides_of_w():
    w, cache, lengths = decode_inputs(2, 2, 3, 9, (4, 7))
    whole = torch.full((2, 5, 9, 6), float("nan"), dtype=w.dtype)
    for layer in (whole[:, 3], whole.permute(2, 0, 1, 3).contiguous().movedim(0, 2)[:, 3]):
        layer.copy_(cache)
        for function in FUNCTIONS:
            check_decode(function, w.mT.contiguous().mT, layer.clone(), lengths, heads=2)
            check_decode(function, w[:, :1].expand_as(w), layer, lengths, heads=2)
    assert whole[:, [0, 1, 2, 4]].isnan().all()


def test_autocast_takes_w_to_the_dtype_of_the_cache():
    w, cache, lengths = decode_inputs(1, 2, 8, 9, (4, 7))
    cache = cache.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        o = tied_attention_decode(w.float(), cache, lengths, heads=2)
    assert o.dtype == torch.bfloat16
    assert torch.equal(cache[0, 4], w[0, 0].bfloat16()) and cache[0, 5:].isnan().all()


def test_empty_batch():
    empty = torch.empty(0, 1, 8)
    for function in FUNCTIONS:
        o = function(empty, torch.empty(0, 5, 8), torch.empty(0, dtype=torch.int32), heads=2)
        assert o.shape == empty.shape


def test_is_compiled_whole_and_writes_to_the_cache():
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(w, cache, lengths):
        o = tied_attention_decode(2 * w, cache, lengths, heads=2)
        return o + 1, cache.sum(), lengths + w.shape[1]

    w, cache, lengths = decode_inputs(1, 2, 4, 9, (4, 7))
    cache = cache.nan_to_num()
    want_cache = cache.clone()
    want = published_decode(2 * w, want_cache, lengths, heads=2)
    o, total, after = step(w, cache, lengths)
    want_cache[[0, 1], [4, 7]] = 2 * w[:, 0]
    torch.testing.assert_close(o, want + 1)
    torch.testing.assert_close(cache, want_cache)
    torch.testing.assert_close(total, want_cache.sum())
    assert after.tolist() == [5, 8]


def test_autograd_is_told_of_the_write():
    w, cache, lengths = decode_inputs(1, 2, 4, 9, (4, 5))
    x = torch.ones_like(cache, requires_grad=True)
    y = (x * cache.nan_to_num_()).sum()
    tied_attention_decode(w, cache, lengths, heads=2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        tied_attention_decode(w, cache.clone(), lengths, heads=2)


@pytest.mark.parametrize("which", ["w", "cache"])
def test_a_gradient_is_refused(which):
    given = dict(zip(("w", "cache", "lengths"), decode_inputs(1, 2, 4, 9, (4, 5)), strict=True))
    given[which].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradient to be wanted.*torch\.no_grad"):
        tied_attention_decode(**given, heads=2)
    with torch.no_grad():
        o = tied_attention_decode(**given, heads=2)
    assert not o.requires_grad


def given(**changes):
    w, cache, lengths = decode_inputs(1, 2, 4, 9, (4, 5))
    return {"w": w, "cache": cache, "lengths": lengths, "heads": 2, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"w": torch.ones(2, 8).double()}, ValueError, r"w of shape \(B, T, heads\*head_dim\)"),
        ({"w": torch.ones(2, 0, 8).double()}, ValueError, r"T > 0, got \(2, 0, 8\)"),
        ({"w": torch.ones(3, 1, 8).double()}, ValueError, r"cache of shape \(3, capacity > 0, 8\)"),
        ({"cache": torch.ones(2, 0, 8).double()}, ValueError, r"capacity > 0, 8\), got \(2, 0, 8"),
        ({"cache": torch.ones(2, 8, 9).double().mT}, ValueError, "stride 1 along its last"),
        ({"cache": torch.ones(2, 9, 8)}, TypeError, "w of the dtype of cache, torch.float32"),
        ({"lengths": [4, 5]}, TypeError, "lengths to be a torch.Tensor, got list"),
        ({"lengths": torch.tensor([4, 5])}, TypeError, "lengths of dtype int32, got torch.int64"),
        ({"lengths": torch.ones(3).int()}, ValueError, r"lengths of shape \(2,\), got \(3,\)"),
        ({"lengths": torch.ones(2, device="meta").int()}, ValueError, "on the device of cache"),
        ({"heads": 3}, ValueError, "heads to divide the projected width 8, got 3"),
        ({"scale": 0.0}, ValueError, "scale to be finite and > 0"),
        ({"backend": "cuda"}, ValueError, "no CUDA kernels are built for it"),
        ({"backend": "fast"}, ValueError, "expected backend to be one of"),
    ],
)
def test_what_is_refused(changes, error, message):
    with pytest.raises(error, match=f"tied_attention_decode: .*{message}"):
        tied_attention_decode(**given(**changes))


def test_rows_further_apart_than_32_bits_reach_are_refused():
    far = torch.empty_strided((2, 9, 8), (1 << 28, 1 << 24, 1), device="meta")
    w, lengths = torch.empty(2, 1, 8, device="meta"), torch.empty(2, device="meta").int()
    with pytest.raises(ValueError, match=r"less than 2\^24 elements apart, got 16777216"):
        tied_attention_decode(w, far, lengths, heads=2)


def test_explain():
    found = explain("tied_attention_decode", **given())
    assert found.chosen == "reference" and found.reasons["reference"] == ()
    assert found.reasons["cuda"] and "float64" in str(found.reasons["triton"])


def test_inputs_other_than_the_cache_are_left_alone():
    w, cache, lengths = decode_inputs(3, 2, 4, 9, (4, 5))
    w0, lengths0 = w.clone(), lengths.clone()
    for function in FUNCTIONS:
        function(w, cache, lengths, heads=2)
        assert torch.equal(w, w0) and torch.equal(lengths, lengths0)
