"""The tied-attention kernels on a GPU: every configuration against float64, and repeatable."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    HALVES,
    INITIAL,
    assert_as_close_as_plain,
    assert_equal_results,
    distinct,
    mssa_inputs,
    published_attention,
    published_mssa,
    results,
)

from crate_kernels import mssa, tied_attention

triton_kernels = pytest.importorskip("crate_kernels.mssa.triton_kernels")

REPEATS = 100


def configurations():
    """(dtype, head_dim, N, causal), one for each way in which the kernels are built."""
    dtypes = (*HALVES, torch.float32)
    for case in itertools.product(dtypes, (64, 48, 128, 80, 256, 160), (197, 400, 785), (0, 1)):
        dtype, head_dim, n, causal = *case[:3], bool(case[3])
        chosen = (
            triton_kernels.forward_config(dtype, head_dim, n),
            triton_kernels.backward_config(dtype, head_dim, n, causal),
        )
        padded = triton_kernels._block_d(head_dim) > head_dim
        yield (dtype, causal, padded, chosen), (dtype, head_dim, n, causal)


def tokens(batch, n, heads, head_dim, dtype):
    """w and the gradient of o."""
    w = INITIAL * torch.randn(batch, n, heads * head_dim, device="cuda")
    return w.to(dtype), torch.randn_like(w).to(dtype)


def check(w, do, **options):
    options = {"heads": 3, **options}
    got = results(tied_attention, {"w": w}, do, **options, backend="triton")
    plain = results(published_attention, {"w": w}, do, **options)
    exact = results(published_attention, {"w": w}, do, torch.float64, **options)
    assert_as_close_as_plain(got, plain, exact, (tuple(w.shape), w.dtype, options))


@pytest.mark.parametrize("case", distinct(configurations()), ids=str)
def test_configuration(case):
    """As close to float64 as the criterion asks, and REPEATS times the same bits."""
    dtype, head_dim, n, causal = case
    w, do = tokens(4, n, 3, head_dim, dtype)
    check(w, do, causal=causal)
    options = (3, head_dim**-0.5, causal)
    o, lse = triton_kernels.forward(w, *options)
    dw = triton_kernels.backward(do, w, o, lse, *options)
    for _ in range(REPEATS):
        again, lse_again = triton_kernels.forward(w, *options)
        assert torch.equal(again, o) and torch.equal(lse_again, lse)
        assert torch.equal(triton_kernels.backward(do, w, o, lse, *options), dw)


@pytest.mark.parametrize("causal", [False, True])
def test_any_number_of_tokens(causal):
    for n in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 511, 513, 1024, 2049):
        check(*tokens(1, n, 3, 64, torch.bfloat16), causal=causal)


@pytest.mark.parametrize("n", [4096, 8192, 12289])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(n, causal):
    check(*tokens(1, n, 1, 64, torch.bfloat16), heads=1, causal=causal)


@pytest.mark.parametrize("head_dim", [1, 3, 16, 20, 32, 88, 96, 100, 104, 112, 127, 200])
def test_any_head_dim(head_dim):
    check(*tokens(2, 67, 3, head_dim, torch.bfloat16))
    check(*tokens(2, 67, 3, head_dim, torch.float16), causal=True)


@pytest.mark.parametrize("scale", [1e-3, 0.125, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_scales(scale, causal):
    """Up to where one token takes nearly all of every row's softmax."""
    check(*tokens(2, 150, 3, 32, torch.bfloat16), scale=scale, causal=causal)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_as_torch_is_told(precision):
    torch.set_float32_matmul_precision(precision)
    check(*tokens(2, 150, 3, 64, torch.float32))


def test_rows_apart_and_expanded_gradients():
    """Read in place: a slice of wider rows, at an odd offset, and a gradient of stride 0."""
    wide = torch.full((2, 73, 3 * 64 + 5), float("nan"), device="cuda", dtype=torch.bfloat16)
    wide[:, 3:-3, 3:-2] = tokens(2, 67, 3, 64, torch.bfloat16)[0]
    w = wide[:, 3:-3, 3:-2].requires_grad_()
    do = torch.randn(1, 1, 3 * 64, device="cuda").to(w.dtype).expand(2, 67, 3 * 64)
    o = tied_attention(w, heads=3, backend="triton")
    (dw,) = torch.autograd.grad(o, w, do)
    want = results(tied_attention, {"w": w.detach().contiguous()}, do.contiguous(), heads=3)
    assert torch.equal(o, want["y"]) and torch.equal(dw, want["dw"])


def test_more_elements_than_32_bits_count():
    batch, n, width = 1400, 2048, 768
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB")
    w = torch.zeros(batch, n, width, device="cuda", dtype=torch.bfloat16)
    assert w.numel() > 2**31
    w[-1], do = tokens(1, n, 12, 64, torch.bfloat16)
    o, lse = triton_kernels.forward(w, 12, 0.125, False)
    last = (do, w[-1:], o[-1:], lse[-1:])
    dw = triton_kernels.backward(do.expand_as(w), w, o, lse, 12, 0.125, False)
    alone, _ = triton_kernels.forward(w[-1:], 12, 0.125, False)
    assert torch.equal(alone, o[-1:])
    assert torch.equal(triton_kernels.backward(*last, 12, 0.125, False), dw[-1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_image(bad):
    w, do = tokens(3, 197, 3, 64, torch.float16)
    w[1, 100, 3] = bad
    got, want = (results(f, {"w": w}, do, heads=3) for f in (tied_attention, published_attention))
    for t in got.values():
        assert t[[0, 2]].isfinite().all() and t[1, :, 64:].isfinite().all()
    spoilt = ~want["y"][1].isfinite()
    assert spoilt.any() and not got["y"][1][spoilt].isfinite().any()
    assert not got["dw"][1, :, :64].isfinite().all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_the_whole_step(dtype):
    """mssa with its projections, in one dtype and under autocast."""
    inputs = {k: t.to("cuda", dtype) for k, t in mssa_inputs(3, 197, 6, 64).items()}
    dy = torch.randn_like(inputs["x"])
    got = results(mssa, inputs, dy, heads=6, backend="triton")
    plain = results(published_mssa, inputs, dy, heads=6)
    exact = results(published_mssa, inputs, dy, torch.float64, heads=6)
    assert_as_close_as_plain(got, plain, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype):
    inputs = {k: t.float().cuda() for k, t in mssa_inputs(3, 197, 6, 64).items()}
    dy = torch.randn_like(inputs["x"]).to(dtype)

    def autocast(function):
        def call(**kwargs):
            with torch.autocast("cuda", dtype):
                return function(**kwargs)

        return call

    got = results(autocast(mssa), inputs, dy, heads=6)
    plain = results(autocast(published_mssa), inputs, dy, heads=6)
    exact = results(published_mssa, inputs, dy, torch.float64, heads=6)
    assert_as_close_as_plain(got, plain, exact, unit=torch.finfo(dtype).eps)


def test_empty_batch():
    w = torch.empty(0, 197, 192, device="cuda", dtype=torch.bfloat16)
    assert results(tied_attention, {"w": w}, w, heads=3)["dw"].shape == w.shape


def test_float64_and_wide_heads_go_to_the_reference():
    w, do = torch.randn(2, 2, 19, 12, device="cuda", dtype=torch.float64)
    want = results(published_attention, {"w": w}, do, heads=1)
    assert_equal_results(results(tied_attention, {"w": w}, do, heads=1), want, "float64")
    w, do = tokens(2, 19, 1, 300, torch.float32)
    got = results(tied_attention, {"w": w}, do, heads=1)
    plain = results(published_attention, {"w": w}, do, heads=1)
    exact = results(published_attention, {"w": w}, do, torch.float64, heads=1)
    assert_as_close_as_plain(got, plain, exact)


def test_opcheck():
    w, do = tokens(2, 9, 2, 16, torch.bfloat16)
    op = torch.ops.crate_kernels
    o, lse = op.tied_attention(w, 2, 0.5, False, "triton")
    torch.library.opcheck(op.tied_attention, (w.clone().requires_grad_(), 2, 0.5, True, "triton"))
    saved = (do, w, o, lse, 2, 0.5, False, "triton")
    torch.library.opcheck(op.tied_attention_backward, saved)
