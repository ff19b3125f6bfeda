"""The decoding kernels in Triton's interpreter: every edge of visits, parts and the capacity."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import HALVES, INITIAL, check_decode, decode_inputs, published_decode

from crate_kernels import explain, tied_attention_decode
from crate_kernels.decode import triton_kernels


def with_parts(monkeypatch, splits, visit=16):
    """Short visits and a number of parts, so that few tokens make many; the rest as chosen."""
    chosen = triton_kernels.decode_config

    def short(*args):
        return dataclasses.replace(chosen(*args), visit=visit)

    monkeypatch.setattr(triton_kernels, "decode_config", short)
    monkeypatch.setattr(triton_kernels, "splits_for", lambda *args: splits)


def decode(w, cache, lengths, *, heads, scale=None):
    """tied_attention_decode in Triton without the choice of a backend (it may refuse a dtype)."""
    scale = (w.shape[-1] // heads) ** -0.5 if scale is None else scale
    op = torch.ops.crate_kernels.tied_attention_decode
    return op(w, cache, lengths, heads, scale, "triton")


def check(n_new, heads, head_dim, capacity, lengths, dtype=torch.float32, **options):
    w, cache, lengths = decode_inputs(n_new, heads, head_dim, capacity, lengths)
    return check_decode(decode, w.to(dtype), cache.to(dtype), lengths, heads=heads, **options)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("n_new", [1, 18])
def test_edges_of_visits_and_parts(n_new, splits, monkeypatch):
    with_parts(monkeypatch, splits)
    check(n_new, 1, 16, 80, (0, 1, 15, 16, 17, 31, 33, 47, 62))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("n_new", [1, 4])
def test_what_does_not_fit_is_not_written_and_is_nan(n_new, splits, monkeypatch):
    """Among them lengths at which length + t overflows 32 bits."""
    with_parts(monkeypatch, splits)
    far = 2**31 - 1
    check(n_new, 1, 16, 20, (16, 17, 19, 20, 21, 500, far, far - 2, -1, -far - 1))


def test_a_cache_of_one_row(monkeypatch):
    with_parts(monkeypatch, 1)
    check(1, 2, 16, 1, (0, 1))
    check(2, 2, 16, 1, (0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("n_new", [1, 5, 70])
def test_tiles_as_chosen(n_new, dtype):
    for head_dim, length in [(64, 130), (80, 40), (20, 7)]:
        check(n_new, 1, head_dim, 210, (length,), dtype)


@pytest.mark.parametrize("head_dim", [1, 3, 31, 160, 256])
def test_head_dims(head_dim, monkeypatch):
    with_parts(monkeypatch, 2)
    check(1, 2, head_dim, 40, (19, 35))
    check(2, 2, head_dim, 40, (19, 35), torch.float16)


@pytest.mark.parametrize("scale", [0.01, 8.0])
def test_scales(scale, monkeypatch):
    with_parts(monkeypatch, 2)
    check(1, 2, 8, 60, (21, 55), scale=scale)
    check(3, 2, 8, 60, (21, 55), scale=scale)


def wider(t):
    """The same in the middle of wider rows, which are NaN."""
    wide = torch.full((t.shape[0], t.shape[1] + 3, t.shape[2] + 5), float("nan"), dtype=t.dtype)
    wide[:, 1:-2, 2:-3] = t
    return wide[:, 1:-2, 2:-3]


def tokens_first(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("change", [wider, tokens_first])
@pytest.mark.parametrize("n_new", [1, 3])
def test_strides(n_new, change, monkeypatch):
    with_parts(monkeypatch, 2)
    w, cache, lengths = decode_inputs(n_new, 2, 8, 40, (20, 33))
    w, cache, lengths = change(w.float()), change(cache.float()), lengths.repeat_interleave(2)[::2]
    check_decode(decode, w, cache, lengths, heads=2)
    if cache._base is not None and change is wider:
        assert cache._base[:, 0].isnan().all() and cache._base[:, :, -3:].isnan().all()
    check_decode(decode, w.mT.contiguous().mT, change(cache.clone()), lengths, heads=2)


@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_item_and_head(bad, n_new, monkeypatch):
    with_parts(monkeypatch, 3)
    w, cache, lengths = decode_inputs(n_new, 2, 8, 60, (50, 50, 50))
    w, cache = w.float(), cache.float()
    cache[1, 4, 3] = bad
    w[2, 0, 9] = bad
    spoilt = ~published_decode(w, cache, lengths, heads=2).isfinite()
    o = decode(w, cache, lengths, heads=2)
    assert spoilt[1, :, 3].all() and spoilt[2, :, 9].all() and not o[spoilt].isfinite().any()
    assert o[0].isfinite().all() and o[1, :, 8:].isfinite().all() and o[2, :, :8].isfinite().all()


@pytest.mark.parametrize("n_new", [1, 3])
def test_more_parts_than_are_combined_at_once(n_new, monkeypatch):
    """Eight at a time; where little or nothing is cached all but the last are empty, or most."""
    with_parts(monkeypatch, 20)
    check(n_new, 1, 256, 330, (0, 17, 325), scale=0.5)


def test_a_score_far_above_the_rest(monkeypatch):
    """In the last row of a part, after sums that it makes vanish."""
    with_parts(monkeypatch, 2)
    w, cache, lengths = decode_inputs(1, 1, 8, 40, (32,))
    cache[0, 15] = 40 * w[0, 0]
    check_decode(decode, w.float(), cache.float(), lengths, heads=1, scale=4.0)


def test_many_small_steps_are_one_causal_pass(monkeypatch):
    with_parts(monkeypatch, 3)
    w = torch.randn(2, 23, 16) * INITIAL
    cache, lengths = torch.full((2, 23, 16), float("nan")), torch.zeros(2, dtype=torch.int32)
    parts = []
    for n_new in (1, 5, 1, 1, 15):
        start = int(lengths[0])
        new = w[:, start : start + n_new]
        parts.append(check_decode(decode, new, cache, lengths, heads=2))
        lengths += n_new
    assert torch.equal(cache, w) and torch.cat(parts, 1).shape == w.shape


def test_empty_batch():
    empty = torch.empty(0, 1, 16)
    o = decode(empty, torch.empty(0, 5, 16), torch.empty(0, dtype=torch.int32), heads=2)
    assert o.shape == empty.shape


def test_repeats_are_bitwise_equal(monkeypatch):
    with_parts(monkeypatch, 4)
    for n_new in (1, 3):
        w, cache, lengths = decode_inputs(n_new, 2, 16, 90, (80, 33))
        first, second = (decode(w.float(), cache.float(), lengths, heads=2) for _ in range(2))
        assert torch.equal(first, second)


def test_public_op_takes_triton_here_and_refuses_what_it_cannot():
    w, cache, lengths = decode_inputs(1, 2, 8, 20, (5, 9))
    found = explain("tied_attention_decode", w.float(), cache.float(), lengths, heads=2)
    assert found.chosen == "triton" and not found.reasons["triton"]
    assert any("no CUDA kernels" in reason for reason in found.reasons["cuda"])
    check_decode(tied_attention_decode, w.float(), cache.float(), lengths, heads=2)
    with pytest.raises(ValueError, match="float64"):
        tied_attention_decode(w, cache, lengths, heads=2, backend="triton")


@pytest.mark.parametrize("n_new", [1, 3])
def test_opcheck(n_new):
    w, cache, lengths = decode_inputs(n_new, 2, 16, 20, (5, 9))
    op = torch.ops.crate_kernels.tied_attention_decode
    torch.library.opcheck(op, (w.float(), cache.float(), lengths, 2, 0.25, "triton"))


@pytest.mark.parametrize(
    ("programs", "capacity", "visit", "splits"),
    [
        (768, 4096, 8, 8),
        (192, 4096, 8, 32),
        (12, 4096, 8, 128),  # shorter parts, so that no multiprocessor goes without
        (12, 32, 8, 1),
        (12, 33, 8, 2),
        (10**6, 10**6, 8, 1),
        (1, 10**8, 8, 6336),
        (12, 4096, 16, 64),
        (12, 4096, 64, 32),  # four visits are more than the least there is otherwise
        (12, 129, 64, 2),
    ],
)
def test_parts_fill_132_multiprocessors_and_are_no_shorter_than_needed(
    programs, capacity, visit, splits
):
    assert triton_kernels.splits_for(programs, capacity, visit, 132) == splits
