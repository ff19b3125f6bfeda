"""The tied-attention kernels on a GPU: every configuration against float64, and repeatable."""

from __future__ import annotations

import itertools
import math

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

from crate_kernels import backends, explain, mssa, tied_attention
from crate_kernels.mssa.op import _kernels

triton_kernels = pytest.importorskip("crate_kernels.mssa.triton_kernels")

REPEATS = 100
# N for the CUDA kernels: whole and broken tiles, and every way in which they hold a sequence.
TOKENS = (1, 17, 50, 64, 65, 128, 137, 197, 208, 256, 257, 400, 785, 1025, 4096)


def tokens(batch, n, heads, head_dim, dtype):
    """w and the gradient of o."""
    w = INITIAL * torch.randn(batch, n, heads * head_dim, device="cuda")
    return w.to(dtype), torch.randn_like(w).to(dtype)


def skip_unfit(backend, dtype=torch.bfloat16, head_dim=64):
    against = explain("tied_attention", tokens(1, 1, 1, head_dim, dtype)[0], heads=1).reasons
    if against[backend]:
        pytest.skip(f"{backend}: {'; '.join(against[backend])}")


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    skip_unfit(request.param)
    return request.param


def check(w, do, backend, **options):
    """As close to float64 as the criterion asks."""
    options = {"heads": 3, **options}
    got = results(tied_attention, {"w": w}, do, **options, backend=backend)
    plain = results(published_attention, {"w": w}, do, **options)
    exact = results(published_attention, {"w": w}, do, torch.float64, **options)
    assert_as_close_as_plain(got, plain, exact, (backend, tuple(w.shape), w.dtype, options))


def check_repeats(w, do, backend, causal):
    """REPEATS times the same bits."""
    kernels, options = _kernels(backend), (3, (w.shape[2] // 3) ** -0.5, causal)
    o, lse = kernels.forward(w, *options)
    dw = kernels.backward(do, w, o, lse, *options)
    for _ in range(REPEATS):
        again, lse_again = kernels.forward(w, *options)
        assert torch.equal(again, o) and torch.equal(lse_again, lse)
        assert torch.equal(kernels.backward(do, w, o, lse, *options), dw)


def triton_configurations():
    """(dtype, head_dim, N, causal), one for each way in which the Triton kernels are built."""
    dtypes = (*HALVES, torch.float32)
    for case in itertools.product(dtypes, (64, 48, 128, 80, 256, 160), (197, 400, 785), (0, 1)):
        dtype, head_dim, n, causal = *case[:3], bool(case[3])
        chosen = (
            triton_kernels.forward_config(dtype, head_dim, n),
            triton_kernels.backward_config(dtype, head_dim, n, causal),
        )
        padded = triton_kernels._block_d(head_dim) > head_dim
        yield (dtype, causal, padded, chosen), (dtype, head_dim, n, causal)


@pytest.mark.parametrize("case", distinct(triton_configurations()), ids=str)
def test_triton_configuration(case):
    dtype, head_dim, n, causal = case
    w, do = tokens(4, n, 3, head_dim, dtype)
    check(w, do, "triton", causal=causal)
    check_repeats(w, do, "triton", causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", backends.CUDA_HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n", TOKENS)
def test_cuda_configuration(n, dtype, head_dim, causal):
    skip_unfit("cuda", dtype, head_dim)
    w, do = tokens(4 if n < 4096 else 1, n, 3, head_dim, dtype)
    check(w, do, "cuda", causal=causal)
    check_repeats(w, do, "cuda", causal)


@pytest.mark.parametrize("causal", [False, True])
def test_any_number_of_tokens(backend, causal):
    for n in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 511, 513, 1024, 2049):
        check(*tokens(1, n, 3, 64, torch.bfloat16), backend, causal=causal)


@pytest.mark.parametrize("n", [4096, 8192, 12289])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(backend, n, causal):
    check(*tokens(1, n, 1, 64, torch.bfloat16), backend, heads=1, causal=causal)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 64), (300, 3), (70_000, 1)])
def test_many_images_and_heads(backend, batch, heads):
    """More than the multiprocessors, and than 16 bits, count."""
    w, do = tokens(batch, 17, heads, 64, torch.bfloat16)
    check(w, do, backend, heads=heads)


@pytest.mark.parametrize("head_dim", [1, 3, 16, 20, 32, 88, 96, 100, 104, 112, 127, 200])
def test_any_head_dim(head_dim):
    check(*tokens(2, 67, 3, head_dim, torch.bfloat16), "auto")
    check(*tokens(2, 67, 3, head_dim, torch.float16), "auto", causal=True)


@pytest.mark.parametrize("scale", [1e-3, 0.125, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_scales(backend, scale, causal):
    """Up to where one token takes nearly all of every row's softmax."""
    check(*tokens(2, 150, 3, 48, torch.bfloat16), backend, scale=scale, causal=causal)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n", [197, 300])
@pytest.mark.parametrize("causal", [False, True])
def test_tokens_far_larger_than_the_rest(dtype, n, causal):
    """A row's own score is then no reference for its softmax: tiles have to be done again."""
    skip_unfit("cuda")
    w, do = tokens(2, n, 3, 64, dtype)
    w[:, ::7] *= 6
    for scale in (None, 1.0):
        check(w, do, "cuda", scale=scale, causal=causal)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", backends.CUDA_HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "n"), [(2, 50), (2, 197), (100, 197), (2, 256), (2, 333), (2, 1100)]
)
def test_rows_done_again(batch, n, causal, head_dim, dtype):
    """Forward alone, where heads are few and many: tokens beside one of 24 times their length."""
    skip_unfit("cuda", dtype, head_dim)
    w, _ = tokens(batch, n, 3, head_dim, dtype)
    beside = w[:, 1::7]
    w[:, 0 : n - 1 : 7] = 24 * beside

    def with_lse(w):
        heads = w.unflatten(2, (3, head_dim)).transpose(1, 2)
        scores = heads @ heads.mT * head_dim**-0.5
        if causal:
            scores = scores.masked_fill(
                torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf
            )
        return {"y": published_attention(w, heads=3, causal=causal), "lse": scores.logsumexp(-1)}

    exact = with_lse(w.double())
    own = w.double().unflatten(2, (3, head_dim)).square().sum(-1) * head_dim**-0.5
    assert (exact["lse"].mT - own).max() > 60 * math.log(
        2
    )  # bfloat16's sums are trusted up to there
    options = (3, head_dim**-0.5, causal)
    o, lse = _kernels("cuda").forward(w, *options)
    plain = {"y": published_attention(w, heads=3, causal=causal), "lse": with_lse(w.float())["lse"]}
    assert_as_close_as_plain({"y": o, "lse": lse}, plain, exact, (w.shape, dtype, causal))
    for _ in range(REPEATS):
        again, lse_again = _kernels("cuda").forward(w, *options)
        assert torch.equal(again, o) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n", [50, 197, 300])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_whose_rounding_is_whole_bits(dtype, n, causal):
    """Forward alone: scale * |w|^2 is about 2^38, and each row picks one token."""
    skip_unfit("cuda")
    w, _ = tokens(2, n, 3, 64, dtype)
    w *= 30
    w[:, ::7] *= 2
    options = {"heads": 3, "scale": 1e7, "causal": causal}
    exact = {"y": published_attention(w.double(), **options)}
    plain = {"y": exact["y"].to(dtype)}
    got = {"y": tied_attention(w, **options, backend="cuda")}
    assert_as_close_as_plain(got, plain, exact, (w.dtype, n, options))


def test_many_tokens_alike_are_done_once():
    """In float16 their sums pass 2^15, which alone is no reason to do rows again."""
    skip_unfit("cuda")
    kernels = _kernels("cuda")

    def milliseconds(n):
        """The shortest of five."""
        w = tokens(1, 1, 1, 64, torch.float16)[0].expand(1, n, 64).contiguous()
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            o, lse = kernels.forward(w, 1, 0.125, False)
            end.record()
            torch.testing.assert_close(o, w, rtol=2e-3, atol=1e-3)
            assert lse.isfinite().all()
            times.append(start.elapsed_time(end))
        return min(times)

    assert milliseconds(33_000) < 2 * milliseconds(32_000)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_as_torch_is_told(precision):
    torch.set_float32_matmul_precision(precision)
    check(*tokens(2, 150, 3, 64, torch.float32), "triton")


@pytest.mark.parametrize("causal", [False, True])
def test_float32_does_not_lose_bits_with_length(causal):
    check(*tokens(1, 4096, 1, 64, torch.float32), "triton", heads=1, causal=causal)


def in_wider_rows(by, offset):
    """Between rows that are NaN, ``by`` elements longer than its own."""

    def change(t):
        batch, n, width = t.shape
        wide = torch.full((batch, n + 6, width + by), float("nan"), device="cuda", dtype=t.dtype)
        inside = wide[:, 3:-3, offset : offset + width]
        return inside.copy_(t)

    return change


STRIDES = {
    "rows apart": in_wider_rows(16, 8),
    "rows apart at an odd offset": in_wider_rows(5, 3),
    "transposed": lambda t: t.mT.contiguous().mT,
    "one row for all": lambda t: t[:1, :1].expand_as(t),
    "one image for all": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("of_do", STRIDES)
@pytest.mark.parametrize("of_w", STRIDES)
@pytest.mark.parametrize("n", [67, 333])
def test_any_strides(backend, n, of_w, of_do):
    w, do = tokens(2, n, 3, 64, torch.bfloat16)
    w, do = STRIDES[of_w](w).detach().requires_grad_(), STRIDES[of_do](do)
    o = tied_attention(w, heads=3, backend=backend)
    (dw,) = torch.autograd.grad(o, w, do)
    plain = {"w": w.detach().contiguous()}
    want = results(tied_attention, plain, do.contiguous(), heads=3, backend=backend)
    assert torch.equal(o, want["y"]) and torch.equal(dw, want["dw"])


def test_more_elements_than_32_bits_count(backend):
    kernels = _kernels(backend)
    batch, n, width = 1400, 2048, 768
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB")
    w = torch.zeros(batch, n, width, device="cuda", dtype=torch.bfloat16)
    assert w.numel() > 2**31
    w[-1], do = tokens(1, n, 12, 64, torch.bfloat16)
    o, lse = kernels.forward(w, 12, 0.125, False)
    last = (do, w[-1:], o[-1:], lse[-1:])
    dw = kernels.backward(do.expand_as(w), w, o, lse, 12, 0.125, False)
    alone, _ = kernels.forward(w[-1:], 12, 0.125, False)
    assert torch.equal(alone, o[-1:])
    assert torch.equal(kernels.backward(*last, 12, 0.125, False), dw[-1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [197, 333])
def test_nan_and_inf_stay_in_their_image(backend, n, bad):
    w, do = tokens(3, n, 3, 64, torch.float16)
    w[1, 100, 3] = bad
    got = results(tied_attention, {"w": w}, do, heads=3, backend=backend)
    want = results(published_attention, {"w": w}, do, heads=3)
    for t in got.values():
        assert t[[0, 2]].isfinite().all() and t[1, :, 64:].isfinite().all()
    spoilt = ~want["y"][1].isfinite()
    assert spoilt.any() and not got["y"][1][spoilt].isfinite().any()
    assert not got["dw"][1, :, :64].isfinite().all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_the_whole_step(backend, dtype):
    """mssa with its projections."""
    skip_unfit(backend, dtype)
    inputs = {k: t.to("cuda", dtype) for k, t in mssa_inputs(3, 197, 6, 64).items()}
    dy = torch.randn_like(inputs["x"])
    got = results(mssa, inputs, dy, heads=6, backend=backend)
    plain = results(published_mssa, inputs, dy, heads=6)
    exact = results(published_mssa, inputs, dy, torch.float64, heads=6)
    assert_as_close_as_plain(got, plain, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(backend, dtype):
    inputs = {k: t.float().cuda() for k, t in mssa_inputs(3, 197, 6, 64).items()}
    dy = torch.randn_like(inputs["x"]).to(dtype)

    def autocast(function):
        def call(**kwargs):
            with torch.autocast("cuda", dtype):
                return function(**kwargs)

        return call

    got = results(autocast(mssa), inputs, dy, heads=6, backend=backend)
    plain = results(autocast(published_mssa), inputs, dy, heads=6)
    exact = results(published_mssa, inputs, dy, torch.float64, heads=6)
    assert_as_close_as_plain(got, plain, exact, unit=torch.finfo(dtype).eps)


def test_empty_batch(backend):
    w = torch.empty(0, 197, 192, device="cuda", dtype=torch.bfloat16)
    assert results(tied_attention, {"w": w}, w, heads=3, backend=backend)["dw"].shape == w.shape


@pytest.mark.parametrize("n", [50, 197, 333])
def test_another_stream_and_a_captured_graph(backend, n):
    w, do = tokens(2, n, 3, 64, torch.bfloat16)
    kernels, options = _kernels(backend), (3, 0.125, False)

    def step():
        o, lse = kernels.forward(w, *options)
        return o, kernels.backward(do, w, o, lse, *options)

    step()  # compiled, and loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for larger in (1, 60):  # in the end some rows have to be done again
        w.copy_(tokens(2, n, 3, 64, torch.bfloat16)[0])
        w[:, ::7] *= larger
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b) and a.isfinite().all()


def test_auto_takes_cuda_where_it_fits():
    """And the two backends differ by rounding alone."""
    skip_unfit("cuda")
    w, do = tokens(2, 197, 3, 64, torch.bfloat16)
    assert explain("tied_attention", w, heads=3).chosen == "cuda"
    assert explain("tied_attention", w.float(), heads=3).chosen == "triton"
    assert explain("tied_attention", w, heads=6).chosen == "triton"  # head_dim 32
    check(w, do, "auto")
    with pytest.raises(ValueError, match=r"'cuda'.*float32.*head_dim 32"):
        tied_attention(w.float(), heads=6, backend="cuda")


def test_float64_and_wide_heads_go_to_the_reference():
    w, do = torch.randn(2, 2, 19, 12, device="cuda", dtype=torch.float64)
    want = results(published_attention, {"w": w}, do, heads=1)
    assert_equal_results(results(tied_attention, {"w": w}, do, heads=1), want, "float64")
    w, do = tokens(2, 19, 1, 300, torch.float32)
    got = results(tied_attention, {"w": w}, do, heads=1)
    plain = results(published_attention, {"w": w}, do, heads=1)
    exact = results(published_attention, {"w": w}, do, torch.float64, heads=1)
    assert_as_close_as_plain(got, plain, exact)


def test_opcheck(backend):
    w, do = tokens(2, 9, 2, 64, torch.bfloat16)
    op = torch.ops.crate_kernels
    o, lse = op.tied_attention(w, 2, 0.5, False, backend)
    torch.library.opcheck(op.tied_attention, (w.clone().requires_grad_(), 2, 0.5, True, backend))
    saved = (do, w, o, lse, 2, 0.5, False, backend)
    torch.library.opcheck(op.tied_attention_backward, saved)
