"""Masked tied attention in Triton's interpreter: sequence ends and window edges in every tile."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    INITIAL,
    assert_as_close_as_plain,
    attention_by_sequence,
    published_attention,
    results,
)
from test_mssa_interpreted import with_tiles

from crate_kernels import explain, tied_attention
from crate_kernels.mssa import triton_kernels
from crate_kernels.mssa.dropout import kept
from crate_kernels.mssa.masks import Mask

LENGTHS = (17, 0, 1, 34)


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def inputs(layout, heads, head_dim, lengths=LENGTHS):
    """w and the options that say how its sequences lie."""
    n, width = max(lengths), heads * head_dim
    if layout == "packed":
        options = {"cu_seqlens": cumulative(lengths), "max_seqlen": n}
        return INITIAL * torch.randn(sum(lengths), width), options
    options = {"lengths": torch.tensor(lengths)} if layout == "padded" else {}
    return INITIAL * torch.randn(len(lengths), n, width), options


def check(w, do=None, dtype=torch.float32, change=lambda t: t, **options):
    options["heads"] = options.get("heads", 2)
    w = w.to(dtype)
    do = torch.randn(w.shape).to(dtype) if do is None else do
    plain = results(attention_by_sequence, {"w": w}, do, **options)
    exact = results(attention_by_sequence, {"w": w}, do, torch.float64, **options)
    leaf = change(w).detach().requires_grad_()
    y = tied_attention(leaf, **options, backend="triton")
    assert y.is_contiguous()
    y.backward(change(do))
    got = {"y": y.detach(), "dw": leaf.grad}
    assert_as_close_as_plain(got, plain, exact, (tuple(w.shape), options))
    return got


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("causal", [False, True])
def test_sequence_ends(layout, causal, monkeypatch):
    with_tiles(monkeypatch, 32, 16)
    w, options = inputs(layout, 2, 8)
    check(w, causal=causal, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_window_edges(causal, monkeypatch):
    with_tiles(monkeypatch, 32, 16)
    w, _ = inputs("equal", 1, 8, (70,))
    for window in (0, 1, 15, 16, 17, 33, 2**40):
        check(w, heads=1, causal=causal, window=window)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("causal", [False, True])
def test_windows_in_sequences(layout, causal, monkeypatch):
    with_tiles(monkeypatch, 32, 16)
    w, options = inputs(layout, 1, 8, (50, 31))
    for window in (5, 18):
        check(w, heads=1, causal=causal, window=window, **options)


def test_tiles_outside_the_window_are_not_visited(monkeypatch):
    """Rows that are NaN reach no row out of their sight, nor its gradient."""
    with_tiles(monkeypatch, 16, 16)
    w = torch.randn(1, 160, 8)
    w[:, 80] = float("nan")
    for causal in (False, True):
        options = {"heads": 1, "window": 4, "causal": causal}
        got = results(tied_attention, {"w": w}, torch.ones_like(w), **options, backend="triton")
        clean = {name: t.isfinite().all(-1).view(10, 16).all(1) for name, t in got.items()}
        assert clean["y"][[0, 1, 2, 3, 7, 8, 9]].all() and not clean["y"][5]
        assert clean["dw"][[0, 1, 2, 8, 9]].all()  # of what reaches tiles 4 to 6


@pytest.mark.parametrize(("head_dim", "dtype"), [(48, torch.float32), (64, torch.float16)])
@pytest.mark.parametrize(("layout", "causal"), [("padded", True), ("packed", False)])
def test_tiles_as_chosen(layout, causal, head_dim, dtype):
    w, options = inputs(layout, 1, head_dim, (70, 3))
    check(w, dtype=dtype, heads=1, causal=causal, window=20, **options)


def rows_apart(t):
    wide = torch.full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1] + 5), float("nan"))
    wide[..., 1:-2, 2:-3] = t
    return wide[..., 1:-2, 2:-3]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_strides(layout):
    w, options = inputs(layout, 2, 8, (21, 0, 17))
    for change in (rows_apart, lambda t: t.mT.contiguous().mT):
        check(w, change=change, **options)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_expanded_gradients(layout):
    w, options = inputs(layout, 2, 8, (21, 0, 17))
    for shape in ([1] * w.dim(), [*[1] * (w.dim() - 1), 16]):
        check(w, do=torch.randn(shape).expand(w.shape), **options)


def test_nothing_past_a_length_is_read(monkeypatch):
    with_tiles(monkeypatch, 32, 16)
    w, options = inputs("padded", 2, 8)
    do = torch.randn_like(w)
    clean = check(w, do, **options)
    past = torch.arange(w.shape[1]) >= options["lengths"][:, None]
    w[past], do[past] = float("nan"), float("inf")
    got = results(tied_attention, {"w": w}, do, heads=2, **options, backend="triton")
    for name in clean:
        assert torch.equal(got[name], clean[name]), name
        assert not got[name][past].any(), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_sequence(bad):
    w, options = inputs("packed", 2, 8, (20, 21, 7))
    w[25, 3] = bad
    got = results(tied_attention, {"w": w}, torch.ones_like(w), heads=2, **options)
    for t in got.values():
        assert t[:20].isfinite().all() and t[41:].isfinite().all()
        assert not t[20:41, :8].isfinite().all()


def test_padded_and_packed_are_the_same_bit_by_bit(monkeypatch):
    with_tiles(monkeypatch, 32, 16)
    w, options = inputs("padded", 2, 8)
    past = torch.arange(w.shape[1]) >= options["lengths"][:, None]
    do = torch.randn_like(w)
    padded = results(tied_attention, {"w": w}, do, heads=2, window=9, **options)
    options = {"cu_seqlens": cumulative(LENGTHS, torch.int64), "max_seqlen": 100}
    packed = results(tied_attention, {"w": w[~past]}, do[~past], heads=2, window=9, **options)
    assert all(torch.equal(padded[name][~past], packed[name]) for name in packed)


def test_no_rows():
    for w, options in (
        (torch.randn(0, 5, 16), {"lengths": torch.zeros(0, dtype=torch.int32)}),
        (torch.randn(2, 5, 16), {"lengths": torch.zeros(2, dtype=torch.int32)}),
        (torch.randn(0, 16), {"cu_seqlens": torch.zeros(3, dtype=torch.int32), "max_seqlen": 9}),
        (torch.randn(0, 16), {"cu_seqlens": torch.zeros(1, dtype=torch.int32), "max_seqlen": 0}),
    ):
        got = results(tied_attention, {"w": w}, w, heads=2, **options)
        assert all(torch.equal(t, torch.zeros_like(w)) for t in got.values())


def test_values_out_of_range_do_no_harm():
    """Kernels go no further than N, or max_seqlen, rows."""
    w = torch.randn(2, 5, 16)
    o, lse = triton_kernels.forward(w, 2, 0.3, False, Mask(torch.tensor([9, -3])))
    alone, lse_alone = triton_kernels.forward(w[:1], 2, 0.3, False)
    assert torch.equal(o[:1], alone) and torch.equal(lse[:1], lse_alone)
    assert not o[1].any() and (lse[1] == float("inf")).all()


def test_public_op_takes_triton_here():
    w, options = inputs("packed", 2, 8, (20, 21, 7))
    found = explain("tied_attention", w, heads=2, window=3, **options)
    assert found.chosen == "triton"
    assert [reason.split(":")[0] for reason in found.reasons["cuda"][-2:]] == [
        "cu_seqlens",
        "window",
    ]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_opcheck(layout):
    """The shapes, dtypes and strides that torch.compile is promised are what the kernels give."""
    w, options = inputs(layout, 2, 8, (9, 4))
    op = torch.ops.crate_kernels
    sequences = options.get("lengths", options.get("cu_seqlens"))
    rest = (torch.tensor([3]), 2, 0.5, True, 9, 3, 0.3, "triton")
    o, lse = op.tied_attention_masked(w, sequences, *rest)
    torch.library.opcheck(op.tied_attention_masked, (w.requires_grad_(), sequences, *rest))
    saved = (torch.randn_like(o), w.detach(), o, lse, sequences, *rest)
    torch.library.opcheck(op.tied_attention_masked_backward, saved)


# ---- dropout


def test_kept_weights_are_those_of_the_reference(monkeypatch):
    """o of w = one-hot rows is the dropped P itself, in every tile and head."""
    with_tiles(monkeypatch, 32, 16)
    n, heads = 33, 2
    w = torch.eye(n).repeat(1, heads).expand(2, n, heads * n)
    for seed in (0, -1, 2**63 - 1, -(2**63) + 5):
        options = {"heads": heads, "dropout": 0.3, "seed": seed}
        o = tied_attention(w, **options, backend="triton")
        want = tied_attention(w, **options, backend="reference")
        assert torch.equal(o == 0, want == 0) and 0.2 < (o == 0).float().mean() < 0.4
        torch.testing.assert_close(o, want)


def dropped_by_sequence(w, *, heads, seed, dropout, lengths=None, cu_seqlens=None, **options):
    """Plain PyTorch given the weights to keep."""
    if cu_seqlens is not None:
        sequences = [part[None] for part in w.split(cu_seqlens.diff().tolist())]
    else:
        counts = [w.shape[1]] * len(w) if lengths is None else lengths.tolist()
        sequences = [item[None, :count] for item, count in zip(w, counts, strict=True)]
    done = []
    for at, part in enumerate(sequences):
        numbers = torch.arange(at * heads, (at + 1) * heads)
        keep = kept(part.shape[1], numbers, dropout, torch.tensor([seed])) / (1 - dropout)
        options.pop("max_seqlen", None)
        done.append(published_attention(part, heads=heads, keep=keep.to(w.dtype), **options)[0])
    if cu_seqlens is not None:
        return torch.cat(done)
    return torch.stack([F.pad(o, (0, 0, 0, w.shape[1] - len(o))) for o in done])


@pytest.mark.parametrize(
    ("layout", "causal", "window"),
    [("equal", True, None), ("padded", False, None), ("packed", True, 9)],
)
def test_dropout(layout, causal, window, monkeypatch):
    with_tiles(monkeypatch, 32, 16)
    w, given = inputs(layout, 2, 8, (40,) if layout == "equal" else (40, 0, 17))
    options = {"heads": 2, "causal": causal, "window": window, "dropout": 0.4, "seed": 7, **given}
    do = torch.randn_like(w)
    got = results(tied_attention, {"w": w}, do, **options, backend="triton")
    plain = results(dropped_by_sequence, {"w": w}, do, **options)
    exact = results(dropped_by_sequence, {"w": w}, do, torch.float64, **options)
    assert_as_close_as_plain(got, plain, exact, options)
    again = results(tied_attention, {"w": w}, do, **options, backend="triton")
    assert all(torch.equal(got[name], again[name]) for name in got)
    other = results(tied_attention, {"w": w}, do, **{**options, "seed": 8}, backend="triton")
    assert not torch.equal(got["y"], other["y"])
