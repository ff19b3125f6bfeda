"""Lengths, packed sequences, windows and dropout of tied attention, and tied_rotary, on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    HALVES,
    INITIAL,
    angles,
    assert_as_close_as_plain,
    attention_by_sequence,
    mssa_by_sequence,
    mssa_inputs,
    published_attention,
    published_rotary,
    results,
)

from crate_kernels import explain, mssa, tied_attention, tied_rotary
from crate_kernels.mssa.dropout import kept
from crate_kernels.mssa.masks import Mask
from crate_kernels.nn import MSSA

triton_kernels = pytest.importorskip("crate_kernels.mssa.triton_kernels")

REPEATS = 100
DTYPES = (*HALVES, torch.float32)
LENGTHS = (197, 0, 37, 1, 256, 64, 130)
LONG = (785, 0, 1024, 300)


def inputs(layout, lengths, heads, head_dim, dtype=torch.bfloat16, room=0):
    """w, the gradient of o, and the options that say how the sequences lie."""
    n, width = max(lengths), heads * head_dim
    shape, options = (len(lengths), n, width), {}
    if layout == "packed":
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
        shape, options = (sum(lengths), width), {"cu_seqlens": ends, "max_seqlen": n + room}
    elif layout == "padded":
        options = {"lengths": torch.tensor(lengths, device="cuda")}
    w = INITIAL * torch.randn(shape, device="cuda")
    return w.to(dtype), torch.randn(shape, device="cuda").to(dtype), options


def check(w, do, **options):
    """As close to float64 as the criterion asks."""
    options = {"heads": 3, **options}
    got = results(tied_attention, {"w": w}, do, **options, backend="triton")
    plain = results(attention_by_sequence, {"w": w}, do, **options)
    exact = results(attention_by_sequence, {"w": w}, do, torch.float64, **options)
    assert_as_close_as_plain(got, plain, exact, (tuple(w.shape), w.dtype, options))


def check_repeats(w, do, mask, causal=False, heads=3):
    """REPEATS times the same bits."""
    options = (heads, (w.shape[-1] // heads) ** -0.5, causal, mask)
    o, lse = triton_kernels.forward(w, *options)
    dw = triton_kernels.backward(do, w, o, lse, *options)
    for _ in range(REPEATS):
        again, lse_again = triton_kernels.forward(w, *options)
        assert torch.equal(again, o) and torch.equal(lse_again, lse)
        assert torch.equal(triton_kernels.backward(do, w, o, lse, *options), dw)


def mask_of(options):
    sequences = options.get("lengths", options.get("cu_seqlens"))
    return Mask(sequences, options.get("max_seqlen", 0), options.get("window"))


@pytest.mark.parametrize("lengths", [LENGTHS, LONG])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("layout", ["equal", "padded", "packed"])
@pytest.mark.parametrize("head_dim", [64, 48, 128, 160])
@pytest.mark.parametrize("dtype", DTYPES)
def test_configuration(dtype, head_dim, layout, window, causal, lengths):
    if layout == "equal" and window is None:
        pytest.skip("not masked")
    w, do, options = inputs(layout, lengths, 3, head_dim, dtype, room=50)
    check(w, do, causal=causal, window=window, **options)
    check_repeats(w, do, mask_of({**options, "window": window}), causal)


@pytest.mark.parametrize("window", [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 500, 4095, 2**40])
@pytest.mark.parametrize("causal", [False, True])
def test_windows(window, causal):
    for n in (300, 1025):
        w, do, _ = inputs("equal", (n,), 3, 64)
        check(w, do, causal=causal, window=window)


@pytest.mark.parametrize("causal", [False, True])
def test_any_length(causal):
    w, do, options = inputs("padded", tuple(range(0, 300, 3)), 1, 64)
    check(w, do, heads=1, causal=causal, **options)
    w, do, options = inputs("packed", tuple(range(0, 300, 3)), 1, 64)
    check(w, do, heads=1, causal=causal, **options)


def test_crops_of_dino():
    w, do, options = inputs("packed", (197, 197, *[37] * 8) * 16, 6, 64)
    check(w, do, heads=6, **options)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_many_sequences(layout):
    """More than 16 bits count."""
    lengths = tuple(torch.randint(0, 18, (70_000,)).tolist())
    w, do, options = inputs(layout, lengths, 1, 64)
    got = results(tied_attention, {"w": w}, do, heads=1, **options, backend="triton")
    options |= {"heads": 1, "backend": "reference"}
    plain = results(tied_attention, {"w": w}, do, **options)
    exact = results(tied_attention, {"w": w}, do, torch.float64, **options)
    assert_as_close_as_plain(got, plain, exact, layout)


def test_nothing_past_a_length_is_read():
    w, do, options = inputs("padded", LENGTHS, 3, 64)
    past = torch.arange(max(LENGTHS), device="cuda") >= options["lengths"][:, None]
    clean = results(tied_attention, {"w": w}, do, heads=3, **options)
    w[past], do[past] = float("nan"), float("inf")
    got = results(tied_attention, {"w": w}, do, heads=3, **options)
    for name in clean:
        assert torch.equal(got[name], clean[name]) and not got[name][past].any()


def test_nan_stays_in_its_sequence():
    w, do, options = inputs("packed", LENGTHS, 3, 64)
    w[200, 3] = float("nan")  # of the third
    got = results(tied_attention, {"w": w}, do, heads=3, **options)
    for t in got.values():
        assert t[:197].isfinite().all() and t[234:].isfinite().all()
        assert not t[197:234, :64].isfinite().any()


def test_strides_and_expanded_gradients():
    for layout in ("padded", "packed"):
        w, do, options = inputs(layout, LENGTHS, 3, 64)
        options["heads"] = 3
        want = results(tied_attention, {"w": w}, do, **options)
        wide = F.pad(w, (8, 16), value=float("nan"))[..., 8:-16]
        leaf = wide.detach().requires_grad_()
        o = tied_attention(leaf, **options)
        (dw,) = torch.autograd.grad(o, leaf, F.pad(do, (5, 3))[..., 5:-3])
        assert torch.equal(o, want["y"]) and torch.equal(dw, want["dw"])
        one = torch.randn(1, device="cuda").to(w.dtype).expand(w.shape)
        a, b = (results(tied_attention, {"w": w}, t, **options) for t in (one, one.contiguous()))
        assert torch.equal(a["dw"], b["dw"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_step(dtype):
    """mssa with its projections: rows past the lengths are zero, in the output and in dx."""
    given = {k: t.to("cuda", dtype) for k, t in mssa_inputs(5, 197, 6, 64).items()}
    options = {"heads": 6, "lengths": torch.tensor([197, 0, 3, 64, 150], device="cuda")}
    dy = torch.randn_like(given["x"])
    got = results(mssa, given, dy, **options)
    plain = results(mssa_by_sequence, given, dy, **options)
    exact = results(mssa_by_sequence, given, dy, torch.float64, **options)
    assert_as_close_as_plain(got, plain, exact)


def test_auto_takes_triton():
    w, _, options = inputs("padded", LENGTHS, 3, 64)
    for more in (options, {"window": 3}, {"dropout": 0.1}):
        assert explain("tied_attention", w, heads=3, **more).chosen == "triton"


# ---- without a look from the host


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_host_does_not_wait(layout, backend):
    w, do, options = inputs(layout, LENGTHS, 3, 64)
    w.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in (None, 3):
            more = {"window": 9, "dropout": 0.1, "seed": seed, "backend": backend}
            tied_attention(w, heads=3, **options, **more).backward(do)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_captured_graph_follows_lengths_and_seeds(layout):
    w, do, options = inputs(layout, (130, 70, 100), 3, 64)
    seed = torch.tensor([1], device="cuda")
    mask = Mask(*(mask_of(options).sequences, options.get("max_seqlen", 0)), 50, 0.2, seed)

    def step():
        o, lse = triton_kernels.forward(w, 3, 0.125, False, mask)
        return o, triton_kernels.backward(do, w, o, lse, 3, 0.125, False, mask)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ((130, 70, 100), (100, 130, 70), (0, 130, 130) if layout == "padded" else ()):
        new = torch.tensor(lengths or (60, 120, 120), device="cuda")
        if layout == "packed":
            new = F.pad(new.cumsum(0), (1, 0))
        mask.sequences.copy_(new)
        seed.add_(1)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compiled(layout):
    given = {k: t.to("cuda", torch.bfloat16) for k, t in mssa_inputs(3, 50, 2, 64).items()}
    _, _, options = inputs(layout, (50, 0, 33), 2, 64)
    if layout == "packed":
        given["x"] = given["x"].flatten(0, 1)[:83].clone()
    options = {"heads": 2, "window": 20, **options}
    dy = torch.randn_like(given["x"])
    got = results(torch.compile(mssa, fullgraph=True), given, dy, **options)
    plain = results(mssa, given, dy, **options)
    exact = results(mssa, given, dy, torch.float64, **options)
    assert_as_close_as_plain(got, plain, exact, layout)


# ---- dropout


@pytest.mark.parametrize("dropout", [0.1, 0.5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 160])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype, head_dim, causal, dropout):
    for n in (37, 197, 400):
        w, do, _ = inputs("equal", (n,) * 2, 3, head_dim, dtype)
        seed = torch.tensor([2**40 + n], device="cuda")
        keep = kept(n, torch.arange(6, device="cuda").view(2, 3), dropout, seed)
        got = results(
            lambda w, s=seed: tied_attention(
                w, heads=3, causal=causal, dropout=dropout, seed=s, backend="triton"
            ),
            {"w": w},
            do,
        )

        def given(w, keep=keep):
            return published_attention(
                w, heads=3, causal=causal, keep=keep.to(w.dtype) / (1 - dropout)
            )

        plain = results(given, {"w": w}, do)
        exact = results(given, {"w": w}, do, torch.float64)
        assert_as_close_as_plain(got, plain, exact, (dtype, head_dim, n))
        check_repeats(w, do, Mask(dropout=dropout, seed=seed), causal)


def test_kept_weights_are_those_of_the_reference():
    n = 200
    w = torch.eye(n, device="cuda").repeat(1, 2).expand(2, n, 2 * n)[..., : 2 * n]
    for seed in (0, -1, 2**63 - 1):
        o = tied_attention(w, heads=2, dropout=0.3, seed=seed, backend="triton")
        keep = kept(n, torch.arange(4, device="cuda").view(2, 2), 0.3, torch.tensor(seed).cuda())
        assert torch.equal(o.unflatten(-1, (2, n)).transpose(1, 2) != 0, keep)


def test_a_layer_drops_in_the_kernel_while_training():
    layer = MSSA(192, heads=3, dropout=0.2).cuda().train()
    x = torch.randn(2, 197, 192, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        torch.manual_seed(0)
        y = layer(x)
        torch.manual_seed(0)
        out = layer.to_out[0]
        weights = (layer.qkv.weight, out.weight, out.bias)
        want = F.dropout(mssa(x, *weights, heads=3, dropout=0.2, backend="triton"), 0.2)
    assert torch.equal(y, want)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


# ---- tied_rotary


@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("head_dim", [64, 128, 80, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(dtype, head_dim, norm_eps):
    for shape in ((4, 333, 3 * head_dim), (700, 3 * head_dim)):
        tokens, dy = torch.randn(2, *shape, device="cuda").to(dtype)
        cos, sin = (t.to("cuda", torch.bfloat16) for t in angles(shape[-2], head_dim))

        def run(function, cos=cos, sin=sin, **more):
            return lambda w: function(w, cos, sin, heads=3, norm_eps=norm_eps, **more)

        got = results(run(tied_rotary, backend="triton"), {"w": tokens}, dy)
        plain = results(run(published_rotary), {"w": tokens}, dy)
        exact = results(run(published_rotary), {"w": tokens}, dy, torch.float64)
        assert_as_close_as_plain(got, plain, exact, shape)
        for _ in range(REPEATS):
            again = results(run(tied_rotary, backend="triton"), {"w": tokens}, dy)
            assert all(torch.equal(again[name], got[name]) for name in got)


def test_rotary_of_strided_tokens():
    w, dy = torch.randn(2, 3, 50, 192, device="cuda", dtype=torch.bfloat16)
    cos, sin = (t.cuda().float() for t in angles(50, 64))
    options = {"heads": 3, "norm_eps": 1e-6}
    want = results(lambda w: tied_rotary(w, cos, sin, **options), {"w": w}, dy)
    leaf = F.pad(w, (3, 5))[..., 3:-5].detach().requires_grad_()
    y = tied_rotary(leaf, cos, sin, **options)
    (dw,) = torch.autograd.grad(y, leaf, dy.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(y, want["y"]) and torch.equal(dw, want["dw"])


@pytest.mark.parametrize("layout", ["equal", "padded", "packed"])
def test_opcheck(layout):
    w, do, options = inputs(layout, (9, 4), 2, 64)
    mask = mask_of(options)
    rest = (torch.tensor([3], device="cuda"), 2, 0.5, True, mask.longest, 3, 0.2, "triton")
    op = torch.ops.crate_kernels
    o, lse = op.tied_attention_masked(w, mask.sequences, *rest)
    leaf = w.clone().requires_grad_()
    torch.library.opcheck(op.tied_attention_masked, (leaf, mask.sequences, *rest))
    saved = (do, w, o, lse, mask.sequences, *rest)
    torch.library.opcheck(op.tied_attention_masked_backward, saved)
