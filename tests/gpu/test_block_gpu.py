"""A whole layer on a GPU: every configuration of its passes, both memory modes, repeatable."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    HALVES,
    OF_A_CHAIN,
    assert_as_close_as_plain,
    block_inputs,
    distinct,
    off_the_blocks_kink,
    published_block,
    results,
)

from crate_kernels import crate_block, explain
from crate_kernels.block import torch_kernels
from crate_kernels.block.of_few import LayerOfFew
from crate_kernels.block.op import PARAMETERS, chained_block

triton_kernels = pytest.importorskip("crate_kernels.block.triton_kernels")

REPEATS = 50
# batch, tokens, heads, head_dim, width
SHAPES = [
    *((16, 197, 6, 64, 384), (9, 197, 12, 48, 576), (16, 197, 12, 64, 768), (5, 257, 16, 64, 1024)),
    *((2, 33, 3, 80, 240), (1, 1, 2, 16, 32), (3, 130, 2, 20, 44)),
    *((24, 197, 12, 64, 768), (30, 197, 12, 48, 576)),  # enough rows for a projection without h
]
BACKENDS = ["cuda", "triton"]


def skip_unfit(backend, inputs, heads):
    against = explain("crate_block", **{"w_out": None, "b_out": None, **inputs}, heads=heads)
    if against.reasons[backend]:
        pytest.skip(f"{backend}: {'; '.join(against.reasons[backend])}")


def inputs_on_gpu(shape, dtype, out=True):
    return {k: t.to("cuda", dtype) for k, t in block_inputs(*shape, out=out).items()}


def run(**inputs):
    return crate_block(**{"w_out": None, "b_out": None, **inputs})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_close_as_plain_and_repeatable(shape, dtype, backend):
    heads = shape[2]
    inputs = inputs_on_gpu(shape, dtype)
    skip_unfit(backend, inputs, heads)
    dy = off_the_blocks_kink(torch.randn_like(inputs["x"]), inputs, heads=heads)
    plain = results(published_block, inputs, dy, heads=heads)
    exact = results(published_block, inputs, dy, torch.float64, heads=heads)
    for memory in ("default", "low"):
        options = {"heads": heads, "memory": memory, "backend": backend}
        got = results(run, inputs, dy, **options)
        assert_as_close_as_plain(got, plain, exact, (shape, memory))
        for _ in range(REPEATS // 2):
            again = results(run, inputs, dy, **options)
            assert all(torch.equal(again[name], got[name]) for name in got)
    with torch.no_grad():
        y = run(**inputs, heads=heads, backend=backend)
    assert_as_close_as_plain({"y": y}, {"y": plain["y"]}, {"y": exact["y"]}, shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    inputs = inputs_on_gpu((0, 197, 12, 64, 768), torch.bfloat16)
    skip_unfit(backend, inputs, 12)
    got = results(run, inputs, torch.empty_like(inputs["x"]), heads=12, backend=backend)
    assert got["y"].shape == (0, 197, 768)
    assert all(not t.any() for name, t in got.items() if name != "y")
    with torch.no_grad():
        assert run(**inputs, heads=12, backend=backend).shape == (0, 197, 768)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("memory", ["default", "low"])
def test_without_output_projection_under_autocast(memory, causal):
    """As under autocast: parameters and x in float32, what is between the GEMMs in bfloat16."""
    inputs = inputs_on_gpu((8, 197, 6, 64, 384), torch.float32, out=False)
    options = {"heads": 6, "causal": causal}
    narrow = {k: t.bfloat16() for k, t in inputs.items()}
    dy = off_the_blocks_kink(torch.randn_like(inputs["x"]).bfloat16(), narrow, **options)
    exact = results(published_block, inputs, dy, torch.float64, **options)
    plain = results(published_block, narrow, dy, **options)
    with torch.autocast("cuda", torch.bfloat16):
        got = results(run, inputs, dy, memory=memory, **options)
    assert got["y"].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for name, t in got.items() if name != "y")
    got = {name: t.bfloat16() for name, t in got.items()}
    assert_as_close_as_plain(got, plain, exact, (memory, causal))


def configurations():
    for d, adds in itertools.product(range(8, 1600, 8), (False, True)):
        key = (triton_kernels.forward_config(d, adds), triton_kernels.backward_config(d), adds)
        yield (key, triton_kernels.triton.next_power_of_2(d)), (d, adds)


@pytest.mark.parametrize(("d", "adds"), distinct(configurations()))
def test_every_configuration_of_the_passes(d, adds):
    from crate_kernels.block import torch_kernels

    rows = 3001
    x, p, dh = (torch.randn(rows, d, device="cuda").bfloat16() for _ in range(3))
    gamma, beta, bias = (torch.randn(d, device="cuda") for _ in range(3))
    given = (x, p, bias) if adds else (x, None, None)
    z, h, stats = triton_kernels.normalise(*given, gamma, beta, 1e-5, torch.bfloat16)
    wide = [None if t is None else t.double() for t in given]
    exact = torch_kernels.normalise(*wide, gamma.double(), beta.double(), 1e-5, torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(z.double(), exact[0], rtol=eps, atol=0)
    torch.testing.assert_close(h.double(), exact[1], rtol=eps, atol=eps * 1e-2)
    skip = p if adds else None
    got = triton_kernels.normalise_backward(dh, z, stats, gamma, beta, skip, True, True)
    exact = torch_kernels.normalise_backward(
        *(t.double() for t in (dh, z, stats, gamma, beta)), wide[1] if adds else None, True, True
    )
    for a, b in zip(got, exact, strict=True):
        # One rounding of an element; a sum of float32 is good to far less than bfloat16's unit.
        scale = b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=eps, atol=eps * 1e-2 * scale)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 37, 3001, 30011])
@pytest.mark.parametrize("d", [8, 40, 256, 264, 384, 576, 768, 1000, 1024])
def test_gradient_of_a_norm(d, rows, dtype, monkeypatch):
    """With and without a residual, h, the third sum, a mask."""
    from crate_kernels.block import torch_kernels

    kernels = pytest.importorskip("crate_kernels.block.cuda_kernels")
    monkeypatch.setattr(kernels, "is_faster", lambda d, adds: True)
    z, dh, skip = (torch.randn(rows, d, device="cuda").to(dtype) for _ in range(3))
    z = torch.where(torch.rand(rows, d, device="cuda") < 0.3, 0, z)
    gamma, beta = (torch.randn(d, device="cuda") for _ in range(2))
    _, stats = triton_kernels.statistics(z, 1e-5, dtype)
    given, eps = (dh, z, stats, gamma, beta), torch.finfo(dtype).eps
    for adds, wants_h, wants_sum, masks in itertools.product((False, True), repeat=4):
        options = (skip if adds else None, wants_h, wants_sum, masks)
        got = kernels.normalise_backward(*given, *options)
        again = kernels.normalise_backward(*given, *options)
        exact = torch_kernels.normalise_backward(
            *(t.double() for t in given), skip.double() if adds else None, *options[1:]
        )
        for a, b, c in zip(got, again, exact, strict=True):
            assert (a is None and b is None and c is None) or torch.equal(a, b)
            if a is not None:
                # One rounding of an element, or a sum of float32 over the rows.
                scale = c.abs().max().item()
                torch.testing.assert_close(a.double(), c, rtol=eps, atol=eps * 1e-2 * scale)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(3, 197, 6, 384), (1, 65, 1, 8), (40, 200, 12, 768)], ids=str)
def test_gradient_and_row_sums_of_one_gemm(shape, dtype):
    """dO = dy V, rowsum(dO * O) of each head, and the sum of dy over its rows."""
    kernels = pytest.importorskip("crate_kernels.mssa.cuda_kernels")
    batch, n, heads, d = shape
    dy = torch.randn(batch, n, d, device="cuda").to(dtype)
    w_out = (d**-0.5 * torch.randn(d, heads * 64, device="cuda")).to(dtype)
    o = torch.randn(batch, n, heads * 64, device="cuda").to(dtype)

    def everything(dy, w_out, o):
        do = dy @ w_out
        sums = (do.to(torch.promote_types(do.dtype, torch.float32)) * o).unflatten(2, (heads, 64))
        wide = torch.promote_types(dy.dtype, torch.float32)
        db = dy.flatten(0, 1).sum(0, dtype=wide)
        return {"do": do, "delta": sums.sum(-1).permute(2, 0, 1), "db": db}

    do, delta, db = kernels.output_gradient(dy, w_out, o, heads, wants_sum=True)
    for again in (kernels.output_gradient(dy, w_out, o, heads, wants_sum=True) for _ in range(5)):
        assert all(torch.equal(a, b) for a, b in zip(again, (do, delta, db), strict=True))
    without, *_, none = kernels.output_gradient(dy, w_out, o, heads)
    assert torch.equal(without, do) and none is None
    got = {"do": do, "delta": delta, "db": db}
    exact = everything(dy.double(), w_out.double(), o.double())
    assert_as_close_as_plain(got, everything(dy, w_out, o), exact, shape)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("x_dtype", ["same", torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(591, 384, 384), (1, 8, 48), (8000, 576, 768)], ids=str)
def test_projection_without_the_normed_rows(shape, x_dtype, dtype):
    """w = LN(x) U^T from x and its statistics, also of rows far from zero."""
    kernels = pytest.importorskip("crate_kernels.mssa.cuda_kernels")
    rows, d, inner = shape
    x = (torch.randn(rows, d, device="cuda") + 4 * torch.randn(rows, 1, device="cuda")).to(dtype)
    gamma, beta = (torch.randn(d, device="cuda") for _ in range(2))
    u = d**-0.5 * torch.randn(inner, d, device="cuda")

    def plain(x, u, gamma, beta):
        return torch.nn.functional.layer_norm(x, (d,), gamma, beta) @ u.mT

    given = x if x_dtype == "same" else x.float()
    xc, stats = triton_kernels.statistics(given, 1e-5, dtype)
    assert torch.equal(xc, x)
    folded = triton_kernels.fold(u, gamma, beta, dtype)
    got = {"w": kernels.normed_projection(xc, stats, folded)}
    exact = {"w": plain(*(t.double() for t in (x, u, gamma, beta)))}
    assert_as_close_as_plain(got, {"w": plain(x, *(t.to(dtype) for t in (u, gamma, beta)))}, exact)


def statistics_of(t):
    """Mean and rstd of rows, in the dtype of t."""
    return {"mean": t.mean(1), "rstd": (t.var(1, correction=0) + 1e-5).rsqrt()}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(591, 384, 384), (1, 64, 48), (8000, 768, 576)], ids=str)
def test_projection_with_residual_and_moments(shape, dtype, with_bias):
    """z = x + o V^T + b and the statistics of its rows."""
    kernels = pytest.importorskip("crate_kernels.mssa.cuda_kernels")
    rows, d, inner = shape
    o = torch.randn(rows, inner, device="cuda").to(dtype)
    x = (torch.randn(rows, d, device="cuda") + torch.randn(rows, 1, device="cuda")).to(dtype)
    w_out = (inner**-0.5 * torch.randn(d, inner, device="cuda")).to(dtype)
    b_out = torch.randn(d, device="cuda").to(dtype) if with_bias else None

    def plain(o, x, w_out, b_out):
        return x + torch.nn.functional.linear(o, w_out, b_out)

    z, moments = kernels.residual_projection(o, x, w_out, b_out)
    for _ in range(REPEATS):
        again = kernels.residual_projection(o, x, w_out, b_out)
        assert torch.equal(again[0], z) and torch.equal(again[1], moments)
    exact = plain(*(None if t is None else t.double() for t in (o, x, w_out, b_out)))
    in_dtype = plain(o, x, w_out, b_out)
    stats = triton_kernels.statistics_of_moments(moments, d, 1e-5)
    got = {"z": z, **dict(zip(("mean", "rstd"), stats.unbind(1), strict=True))}
    plain_stats = statistics_of(in_dtype.float())
    exact = {"z": exact, **statistics_of(exact)}
    assert_as_close_as_plain(got, {"z": in_dtype, **plain_stats}, exact, shape)


@pytest.mark.parametrize("along", [0, 1.5])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 197, 768, 12), (1, 256, 768, 12), (3, 65, 384, 6), (4, 197, 576, 12)]
)
def test_encoder_of_few(shape, dtype, along):
    """Three layers as one kernel; of 4x197x576 more row tiles than clusters run at once.

    ``along``: how far U goes along one direction, by which tokens differ in length, so that rows of
    the attention have to be done again.
    """
    from crate_kernels import cuda_extension

    if reasons := cuda_extension.against("cuda", torch.cuda.current_device()):
        pytest.skip("; ".join(reasons))
    kernels = pytest.importorskip("crate_kernels.block.cuda_kernels")
    b, n, d, heads = shape
    x = torch.randn(b, n, d, device="cuda").to(dtype)

    def matrix(scale=1.0):
        return (scale * d**-0.5 * torch.randn(d, d, device="cuda")).to(dtype)

    def vector(start=0.0):
        return start + 0.2 * torch.randn(d, device="cuda")

    layers = []
    for _ in range(3):
        gamma, beta, u = vector(1), vector(), matrix()
        one_direction = torch.outer(torch.randn(d, device="cuda"), torch.randn(d, device="cuda"))
        u = (u.float() + along * d**-0.5 * one_direction).to(dtype)
        folded_qkv = triton_kernels.fold(u, gamma, beta, dtype)
        folded_gram = triton_kernels.fold_gram(matrix(0.1), gamma, beta)
        layers.append(LayerOfFew(*folded_qkv, matrix(), vector(), *folded_gram))
    thresholds, rest = [0.01, 0.02, 0.0], (heads, (d // heads) ** -0.5, 1e-5)
    torch.cuda.synchronize()
    y = kernels.encoder_of_few(x, layers, thresholds, *rest)
    for _ in range(REPEATS):
        assert torch.equal(kernels.encoder_of_few(x, layers, thresholds, *rest), y)
    exact_layers = [LayerOfFew(*(t.double() for t in layer)) for layer in layers]
    exact = torch_kernels.encoder_of_few(x.double(), exact_layers, thresholds, *rest)
    plain = torch_kernels.encoder_of_few(x, layers, thresholds, *rest)
    assert_as_close_as_plain({"y": y}, {"y": plain}, {"y": exact}, shape)


def test_moments_of_tiles_that_are_not_there():
    """An odd number of column tiles, which clusters take by twos: nothing is written past them."""
    from crate_kernels import cuda_extension

    if reasons := cuda_extension.against("cuda", torch.cuda.current_device()):
        pytest.skip("; ".join(reasons))
    for rows, d in [(1600, 2368), (1408, 2944), (896, 2176)]:
        o, x, z = (torch.randn(rows, d, device="cuda").bfloat16() for _ in range(3))
        w_out = torch.randn(d, d, device="cuda").bfloat16()
        spans = cuda_extension.moments_shape(rows, d)[0]
        moments = torch.full((spans + 2, rows, 2), float("nan"), device="cuda")
        cuda_extension.load().residual_projection(
            o=o.data_ptr(), w_out=w_out.data_ptr(), bias=0, x=x.data_ptr(), z=z.data_ptr(),
            moments=moments.data_ptr(), rows=rows, d=d, inner=d, dtype="bfloat16",
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        assert moments[:spans].isfinite().all() and moments[spans:].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_small_gamma_in_front_of_ista(dtype):
    """float16 does not lose what gamma makes small beside the residual's own rounding."""
    kernels = pytest.importorskip("crate_kernels.ista.cuda_kernels")
    rows, d = 8000, 768
    z = torch.randn(rows, d, device="cuda").to(dtype)
    gamma, beta = 1e-4 * (1 + 0.2 * torch.randn(d, device="cuda")), torch.zeros(d, device="cuda")
    gram = (0.1 * d**-0.5 * torch.randn(d, d, device="cuda")).to(dtype)

    def plain(z, gamma, beta, gram):
        u = torch.nn.functional.layer_norm(z, (d,), gamma, beta)
        return {"y": torch.relu(u + u @ gram)}

    _, stats = triton_kernels.statistics(z, 1e-5, dtype)
    normed = triton_kernels.fold_gram(gram, gamma, beta)
    y, _, _ = kernels.apply_normed(z, stats, normed, 0.0, False, False)
    exact = plain(*(t.double() for t in (z, gamma, beta, gram)))
    in_dtype = plain(*(t.to(dtype) for t in (z, gamma, beta, gram)))
    assert_as_close_as_plain({"y": y}, in_dtype, exact)


@pytest.mark.parametrize("wants", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(591, 384), (1, 64), (8000, 768), (30011, 576)], ids=str)
def test_ista_without_the_normed_rows(shape, dtype, wants):
    """y = relu(u + u G - t) of u = LN(z), from z and its statistics; its mask, its moments."""
    kernels = pytest.importorskip("crate_kernels.ista.cuda_kernels")
    rows, d = shape
    z = (torch.randn(rows, d, device="cuda") + torch.randn(rows, 1, device="cuda")).to(dtype)
    gamma = 1 + 0.2 * torch.randn(d, device="cuda")
    beta = 0.2 * torch.randn(d, device="cuda")
    gram = (0.1 * d**-0.5 * torch.randn(d, d, device="cuda")).to(dtype)

    def plain(z, gamma, beta, gram):
        u = torch.nn.functional.layer_norm(z, (d,), gamma, beta)
        return torch.relu(u + u @ gram - 0.01)

    _, stats = triton_kernels.statistics(z, 1e-5, dtype)
    normed = triton_kernels.fold_gram(gram, gamma, beta)
    y, mask, moments = kernels.apply_normed(z, stats, normed, 0.01, *wants)
    for _ in range(REPEATS):
        again = kernels.apply_normed(z, stats, normed, 0.01, *wants)
        for a, b in zip(again, (y, mask, moments), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    exact = {"y": plain(*(t.double() for t in (z, gamma, beta, gram)))}
    in_dtype = {"y": plain(*(t.to(dtype) for t in (z, gamma, beta, gram)))}
    got = {"y": y}
    assert [mask is not None, moments is not None] == list(wants)
    if mask is not None:
        dy = torch.randn_like(y)
        _, g = kernels.input_gradient(dy, mask, gram, wants_x=False)
        assert torch.equal(g, dy * (y != 0))
    if moments is not None:
        stats = triton_kernels.statistics_of_moments(moments, d, 1e-5)
        got |= dict(zip(("mean", "rstd"), stats.unbind(1), strict=True))
        exact |= statistics_of(exact["y"])
        in_dtype |= statistics_of(in_dtype["y"].float())
    assert_as_close_as_plain(got, in_dtype, exact, shape)


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounded_weights(dtype, with_out):
    from crate_kernels.block import torch_kernels

    for d, inner in [(768, 768), (5, 7), (576, 384)]:
        shapes = ((inner, d), (d, inner), (d, d))
        w_qkv, w_out, weight = (torch.randn(*shape, device="cuda") for shape in shapes)
        given = (w_qkv, w_out if with_out else None, weight, dtype)
        assert torch.equal(*(k.rounded(*given) for k in (triton_kernels, torch_kernels)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "shape", [(591, 384), (1, 64), (8000, 768), (30011, 576), (4000, 1024)], ids=str
)
def test_moments_of_a_gemm_are_those_of_what_it_wrote(shape, dtype):
    """The statistics that come of them, against those of the y that the norm reads."""
    kernels = pytest.importorskip("crate_kernels.ista.cuda_kernels")
    rows, d = shape
    u = torch.randn(rows, d, device="cuda").to(dtype)
    gram = (0.1 * d**-0.5 * torch.randn(d, d, device="cuda")).to(dtype)
    y, moments = kernels.apply_gram_and_moments(u, gram, 0.01)
    assert torch.equal(y, kernels.apply_gram(u, u, gram, 0.01))
    for _ in range(REPEATS):
        again = kernels.apply_gram_and_moments(u, gram, 0.01)
        assert torch.equal(again[0], y) and torch.equal(again[1], moments)
    got = triton_kernels.statistics_of_moments(moments, d, 1e-5)
    exact = torch.relu(u.double() + u.double() @ gram.double() - 0.01)
    mean, variance = exact.mean(1), exact.var(1, correction=0)
    exact = {"mean": mean, "rstd": (variance + 1e-5).rsqrt()}
    _, plain = triton_kernels.statistics(y, 1e-5, dtype)
    assert_as_close_as_plain(
        dict(zip(exact, got.unbind(1), strict=True)),
        dict(zip(exact, plain.unbind(1), strict=True)),
        exact,
        shape,
    )


def apart(first, second, **options):
    x, *parameters = (first[name] for name in ("x", *PARAMETERS))
    given = {**OF_A_CHAIN, **options}
    y, moments = chained_block(x, None, *parameters, follows=False, precedes=False, **given)
    assert moments.numel() == 0
    return crate_block(y, **second, **options)


def in_a_row(first, second, **options):
    options = {**OF_A_CHAIN, **options}
    x, *parameters = (first[name] for name in ("x", *PARAMETERS))
    y, moments = chained_block(x, None, *parameters, follows=False, precedes=True, **options)
    # Where ISTA is by CUDA, by Triton where it is small.
    assert (moments.numel() > 0) == (y.shape[0] > 3)
    parameters = [second[name] for name in PARAMETERS]
    return chained_block(y, moments, *parameters, follows=True, precedes=False, **options)[0]


def published(first, second, heads):
    return published_block(published_block(**first, heads=heads), **second, heads=heads)


def of_two_layers(run, parameters, dy, **options):
    """The output and every gradient."""
    leaves = [{k: t.clone().requires_grad_() for k, t in p.items()} for p in parameters]
    y = run(*leaves, **options)
    y.backward(dy.to(y.dtype))
    grads = {f"{i}.d{k}": t.grad for i, p in enumerate(leaves) for k, t in p.items()}
    return {"y": y.detach(), **grads}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("batch", [3, 16, 24])  # 24: the second layer takes the first one's moments
def test_layers_in_a_row(batch, memory, dtype):
    """dx is masked with the y that the first layer wrote: the gradients are those without."""
    first, second = (inputs_on_gpu((batch, 197, 12, 64, 768), dtype) for _ in range(2))
    second.pop("x")
    parameters, dy = (first, second), torch.randn_like(first["x"])
    options = {"heads": 12, "memory": memory}
    got = of_two_layers(in_a_row, parameters, dy, **options)
    if batch < 24:
        # Two kernels make g + g G^T: they may add in another order.
        want = of_two_layers(apart, parameters, dy, **options)
        for name, a in want.items():
            difference = (got[name].double() - a.double()).norm() / a.double().norm()
            assert difference < torch.finfo(dtype).eps, (name, difference)
        return
    # With statistics of y before it is rounded other values fall to the relu's other side, and
    # a single one of them may be the largest error. Not so the mean square.
    plain = of_two_layers(published, parameters, dy, heads=12)
    wide = [{k: t.double() for k, t in p.items()} for p in parameters]
    exact = of_two_layers(published, wide, dy, heads=12)
    for name, a in exact.items():
        error, of_plain = ((t[name].double() - a).norm() for t in (got, plain))
        assert error <= 2 * of_plain, (name, error / of_plain)
