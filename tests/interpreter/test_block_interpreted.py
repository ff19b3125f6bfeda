"""The passes over rows in Triton's interpreter, against torch's kernels, and whole layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from decoders import layers_of_ours, published_layers
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    block_inputs,
    off_the_blocks_kink,
    published_block,
    results,
)

from crate_kernels import crate_block
from crate_kernels.block import torch_kernels, triton_kernels
from crate_kernels.cuda_extension import moments_shape

SIZES = [(7, 24), (33, 100), (1, 8), (130, 16)]


def close(got, want, dtype):
    """Sums of float32, and one rounding of each output."""
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            unit = torch.finfo(a.dtype).eps
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2 * unit, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_passes(dtype, programs, monkeypatch):
    monkeypatch.setattr(triton_kernels, "multiprocessors", lambda t: programs)
    for rows, d in SIZES:
        x, p, dh, skip = (torch.randn(rows, d).to(dtype) for _ in range(4))
        gamma, beta, bias = (torch.randn(d) for _ in range(3))
        for given in ((x, None, None), (x, p, None), (x, p, bias), (x.float(), None, None)):
            both = [
                kernels.normalise(*given, gamma, beta, 1e-5, dtype)
                for kernels in (triton_kernels, torch_kernels)
            ]
            close(*both, dtype)
        z, _, stats = both[0]
        z = torch.where(torch.rand_like(z.float()) < 0.3, 0, z)
        for residual, *wants in itertools.product((None, skip), *[(False, True)] * 3):
            both = [
                kernels.normalise_backward(dh, z, stats, gamma, beta, residual, *wants)
                for kernels in (triton_kernels, torch_kernels)
            ]
            sums = [[None if s is None else s / rows for s in r[2:]] for r in both]
            close(both[0][:2], both[1][:2], dtype)
            close(*sums, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_folded_projection(dtype):
    """rstd (x (U diag(gamma))^T - mean s) + U beta is LN(x) U^T."""
    for rows, d in SIZES:
        x, u = torch.randn(rows, d).to(dtype), torch.randn(5, d)
        gamma, beta = torch.randn(d), torch.randn(d)
        xc, stats = triton_kernels.statistics(x.float(), 1e-5, dtype)
        folded, sums, shift = triton_kernels.fold(u, gamma, beta, dtype)
        assert torch.equal(xc, x) and folded.dtype == dtype
        close([folded], [(u * gamma).to(dtype)], dtype)
        mean, rstd = stats.split(1, 1)
        got = rstd * (x.float() @ folded.float().mT - mean * sums) + shift
        plain = torch.nn.functional.layer_norm(x, (d,), gamma.to(dtype), beta.to(dtype))
        exact = torch.nn.functional.layer_norm(x.double(), (d,), gamma.double(), beta.double())
        plain, exact = {"w": plain @ u.to(dtype).mT}, {"w": exact @ u.double().mT}
        assert_as_close_as_plain({"w": got.to(dtype)}, plain, exact, (rows, d))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_folded_dictionary(dtype):
    """rstd e (z B - mean s) + f is LN(z) (I + G); the diagonal of B e is exact."""
    for (rows, d), size in itertools.product([*SIZES, (3, 300)], (1, 1e-4)):
        z, gram = torch.randn(rows, d).to(dtype), (0.1 * torch.randn(d, d)).to(dtype)
        gamma, beta = size * torch.randn(d), size * torch.randn(d)
        gamma[d // 2] = 0
        _, stats = triton_kernels.statistics(z.float(), 1e-5, dtype)
        folded, scales, sums, shift = triton_kernels.fold_gram(gram, gamma, beta)
        assert folded.dtype == dtype
        close([folded.diagonal() * scales], [gamma * (1 + gram.diagonal().float())], torch.float32)
        mean, rstd = stats.split(1, 1)
        got = rstd * scales * (z.float() @ folded.float().mT - mean * sums) + shift
        u = torch.nn.functional.layer_norm(z, (d,), gamma.to(dtype), beta.to(dtype))
        exact = torch.nn.functional.layer_norm(z.double(), (d,), gamma.double(), beta.double())
        exact = {"y": exact + exact @ gram.double()}
        assert_as_close_as_plain({"y": got.to(dtype)}, {"y": u + u @ gram}, exact, (rows, d))


def moments_of(x):
    """Of each span of a row: the sums of its elements and of their squares."""
    spans, rows, _ = moments_shape(*x.shape)
    parts = [p.sum(1) for t in (x, x.square()) for p in t.chunk(spans, 1)]
    return torch.stack(parts).view(2, spans, rows).movedim(0, 2).contiguous()


@pytest.mark.parametrize("dtype", HALVES)
def test_statistics_from_moments(dtype):
    """As good as those of the rows in ``dtype``, also where the mean is large beside what is
    around it, and spans differ in theirs."""
    for rows, d, mean in [(7, 64, 0), (300, 192, 100), (128, 448, 3), (5, 1024, 30)]:
        x = torch.randn(rows, d) + mean * torch.rand(rows, 1) + (torch.arange(d) // 64) % 3
        got = triton_kernels.statistics_of_moments(moments_of(x), d, 1e-5)
        _, plain = triton_kernels.statistics(x.to(dtype), 1e-5, dtype)
        exact = torch_kernels.normalise(
            x.double(), None, None, torch.ones(d), torch.zeros(d), 1e-5, torch.float64
        )[2]
        for i, name in enumerate(("mean", "rstd")):
            results = ({name: t[:, i]} for t in (got, plain, exact))
            assert_as_close_as_plain(*results, (rows, d))


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_rounded_weights(dtype, with_out):
    for d, inner in [(24, 40), (5, 7), (100, 33)]:
        w_qkv, weight = torch.randn(inner, d), torch.randn(d, d).T
        w_out = torch.randn(d, inner).bfloat16() if with_out else None
        both = [k.rounded(w_qkv, w_out, weight, dtype) for k in (triton_kernels, torch_kernels)]
        # The interpreter cuts bits off where it makes bfloat16.
        exactly = dtype == torch.float16
        torch.testing.assert_close(*both, rtol=0 if exactly else torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layer(dtype, memory):
    for b, n, h, hd, causal in [(2, 9, 2, 16, False), (1, 5, 1, 24, True)]:
        inputs = {k: t.to(dtype) for k, t in block_inputs(b, n, h, hd).items()}
        options = {"heads": h, "causal": causal}
        dy = off_the_blocks_kink(torch.randn_like(inputs["x"]), inputs, **options)
        got = results(crate_block, inputs, dy, memory=memory, backend="triton", **options)
        plain = results(published_block, inputs, dy, **options)
        exact = results(published_block, inputs, dy, torch.float64, **options)
        assert_as_close_as_plain(got, plain, exact, (b, n, h, hd, causal))


@pytest.mark.parametrize("memory", ["default", "low"])
def test_layer_of_a_decoder(memory):
    for b, n, h, hd in [(2, 9, 2, 16), (1, 5, 1, 24)]:
        inputs = {k: t.half() for k, t in block_inputs(b, n, h, hd).items()}
        dy, options = torch.randn_like(inputs["x"]), {"heads": h, "depth": 2}
        got = results(layers_of_ours, inputs, dy, memory=memory, backend="triton", **options)
        plain = results(published_layers, inputs, dy, **options)
        exact = results(published_layers, inputs, dy, torch.float64, **options)
        assert_as_close_as_plain(got, plain, exact, (b, n, h, hd))


def test_nan_stays_in_its_image():
    inputs = {k: t.float() for k, t in block_inputs(3, 5, 1, 16).items()}
    inputs["x"][1] = float("nan")
    got = results(crate_block, inputs, torch.ones(3, 5, 16), heads=1, backend="triton")
    for name in ("y", "dx"):
        assert got[name][[0, 2]].isfinite().all(), name
    assert got["y"][1].isnan().all() and got["dweight"].isnan().all()
