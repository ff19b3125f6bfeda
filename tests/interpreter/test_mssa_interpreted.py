"""The tied-attention kernels in Triton's interpreter: every tile edge, forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import (
    HALVES,
    INITIAL,
    assert_as_close_as_plain,
    mssa_inputs,
    published_attention,
    results,
)

from crate_kernels import explain, mssa, tied_attention
from crate_kernels.mssa import triton_kernels

TILES = ("forward_config", "backward_config")


def with_tiles(monkeypatch, own, visit):
    """Small tiles, so that few tokens make many; everything else as chosen."""
    for name in TILES:
        chosen = getattr(triton_kernels, name)

        def small(*args, chosen=chosen, **kwargs):
            return dataclasses.replace(chosen(*args, **kwargs), own=own, visit=visit)

        monkeypatch.setattr(triton_kernels, name, small)


def core(w, *, heads, scale=None, causal=False):
    """tied_attention in Triton without the choice of a backend (which may refuse a dtype here)."""
    scale = (w.shape[-1] // heads) ** -0.5 if scale is None else scale
    return torch.ops.crate_kernels.tied_attention(w, heads, scale, causal, "triton")[0]


def check(batch, n, heads, head_dim, dtype, change=lambda t: t, do=None, **options):
    w = (torch.randn(batch, n, heads * head_dim) * INITIAL).to(dtype)
    do = torch.randn(w.shape).to(dtype) if do is None else do.to(dtype)
    options["heads"] = heads
    plain = results(published_attention, {"w": w}, do, **options)
    exact = results(published_attention, {"w": w}, do, torch.float64, **options)
    leaf, given = change(w).detach().requires_grad_(), change(do)
    before = (leaf.detach().clone(), given.clone())
    y = core(leaf, **options)
    y.backward(given)
    assert y.is_contiguous() and leaf.grad.shape == leaf.shape
    got = {"y": y.detach(), "dw": leaf.grad}
    assert_as_close_as_plain(got, plain, exact, (batch, n, heads, head_dim, dtype, options))
    assert torch.equal(leaf, before[0]) and torch.equal(given, before[1]), "inputs were changed"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("own", "visit"), [(16, 16), (32, 16)])
def test_tile_edges(own, visit, causal, monkeypatch):
    with_tiles(monkeypatch, own, visit)
    for n in (1, 2, 15, 16, 17, 31, 32, 33, 49, 64, 65):
        check(1, n, 2, 16, torch.float32, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_tiles_as_chosen(dtype, causal):
    for n, head_dim in [(1, 64), (5, 48), (37, 16), (65, 64), (50, 80), (33, 130), (130, 32)]:
        check(1, n, 1, head_dim, dtype, causal=causal)


@pytest.mark.parametrize("head_dim", [1, 3, 16, 20, 31, 48, 96, 100, 160, 256])
def test_head_dims(head_dim, monkeypatch):
    with_tiles(monkeypatch, 16, 16)
    check(1, 19, 2, head_dim, torch.float32)
    check(1, 19, 2, head_dim, torch.float16, causal=True)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_scales(scale, causal, monkeypatch):
    with_tiles(monkeypatch, 16, 16)
    check(2, 21, 2, 8, torch.float32, scale=scale, causal=causal)


def rows_apart(t):
    wide = torch.full((t.shape[0], t.shape[1] + 3, t.shape[2] + 5), float("nan"), dtype=t.dtype)
    wide[:, 1:-2, 2:-3] = t
    return wide[:, 1:-2, 2:-3]


def columns_apart(t):
    return t.mT.contiguous().mT


def tokens_first(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("change", [rows_apart, columns_apart, tokens_first])
def test_strides(change, monkeypatch):
    with_tiles(monkeypatch, 16, 16)
    check(2, 21, 2, 8, torch.float32, change)
    check(2, 21, 2, 8, torch.float16, change, causal=True)


def test_rows_too_far_apart_for_32_bits_are_copied():
    for apart, stays in ((2**29, True), (2**30, False)):
        w = torch.empty_strided((1, 2, 16), (1, apart, 1), device="meta")
        assert (triton_kernels._rows_in_place(w, 2) is w) == stays


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 21, 1), (2, 1, 16), (1, 21, 16)])
def test_expanded_gradients(shape):
    check(2, 21, 2, 8, torch.float32, do=torch.randn(shape).expand(2, 21, 16))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_image(bad, causal, monkeypatch):
    with_tiles(monkeypatch, 16, 16)
    w = torch.randn(3, 21, 16)
    w[1, 4, 3] = bad
    got = results(core, {"w": w}, torch.randn_like(w), heads=2, causal=causal)
    want = results(published_attention, {"w": w}, torch.ones_like(w), heads=2, causal=causal)
    assert got["y"][[0, 2]].isfinite().all() and got["dw"][[0, 2]].isfinite().all()
    spoilt = ~want["y"][1].isfinite()
    spoilt[: 4 if causal else 0] = False  # what comes before it in time may stay clean
    assert spoilt.any() and not got["y"][1][spoilt].isfinite().any()
    assert not got["dw"][1].isfinite().all()


def test_overflowed_loss_scale_reaches_the_gradient():
    do = torch.full((1, 21, 16), float("inf"))
    got = results(core, {"w": torch.randn(1, 21, 16)}, do, heads=2)
    assert not got["dw"].isfinite().any()


def test_empty_batch():
    got = results(core, {"w": torch.empty(0, 5, 16)}, torch.empty(0, 5, 16), heads=2)
    assert got["y"].shape == got["dw"].shape == (0, 5, 16)


def test_repeats_are_bitwise_equal():
    w, do = torch.randn(2, 2, 40, 16)
    first, second = (results(core, {"w": w}, do, heads=2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_public_ops_take_triton_here():
    inputs = {k: t.float() for k, t in mssa_inputs(2, 9, 2, 8).items()}
    found = explain("mssa", **inputs, heads=2)
    assert found.chosen == "triton" and found.reasons["triton"] == ()
    dy = torch.randn(2, 9, 16)
    got, named = (results(mssa, inputs, dy, heads=2, backend=b) for b in ("auto", "triton"))
    want = results(mssa, inputs, dy, heads=2, backend="reference")
    for name in want:
        assert torch.equal(got[name], named[name]), name
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_float64_and_wide_heads_are_refused_here_too():
    with pytest.raises(ValueError, match="float64"):
        tied_attention(torch.randn(1, 3, 8).double(), heads=1, backend="triton")
    with pytest.raises(ValueError, match="head_dim 257"):
        tied_attention(torch.randn(1, 3, 257), heads=1, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype):
    """The shapes, dtypes and strides that torch.compile is promised are what the kernels give."""
    w, do = torch.randn(2, 2, 9, 16).to(dtype)
    op = torch.ops.crate_kernels
    o, lse = op.tied_attention(w, 2, 0.5, False, "triton")
    torch.library.opcheck(op.tied_attention, (w.requires_grad_(), 2, 0.5, False, "triton"))
    saved = (do, w.detach(), o, lse, 2, 0.5, True, "triton")
    torch.library.opcheck(op.tied_attention_backward, saved)
