"""The ISTA kernels on a GPU: every GEMM configuration against float64, repeatable; the cached G."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    distinct,
    ista_inputs,
    off_the_kink,
    published_ista,
    results,
)

from crate_kernels import ista
from crate_kernels.ista import gram_cache
from crate_kernels.ista.op import explain_ista

triton_kernels = pytest.importorskip("crate_kernels.ista.triton_kernels")

REPEATS = 100
# x's dtype and that of the products: one for all, or autocast on float32.
DTYPES = [(d, d) for d in (*HALVES, torch.float32)] + [(torch.float32, d) for d in HALVES]
# Rows and width: large and small tiles, rows that fill none, widths that have no descriptors.
SHAPES = [(6307, 768), (7300, 576), (4400, 1001), (70, 64), (333, 100), (25, 7), (2300, 2048)]
FEW = [(10, 64), (1, 7), (500, 768)]  # fewer rows than columns: two products
# For the CUDA kernels: several tiles for each block and less than one, either width of tile, halves
# of a pair of tiles, and widths that end inside a chunk.
CUDA_SHAPES = [
    *((25216, 768), (12608, 1024), (50432, 384), (7300, 576), (6307, 768), (2300, 2048)),
    *((1000, 640), (333, 104), (129, 8), (70, 64), (10, 64)),
]


def configurations():
    for (x_dtype, c_dtype), (rows, d) in itertools.product(DTYPES, SHAPES):
        described = d % 8 == 0
        chosen = triton_kernels.gemm_config(c_dtype, rows, d, described)
        gram = triton_kernels.gemm_config(c_dtype, d, d, described)
        yield (x_dtype, c_dtype, chosen, gram, described), (x_dtype, c_dtype, rows, d)
    for (x_dtype, c_dtype), (rows, d) in itertools.product(DTYPES, FEW):
        yield (x_dtype, c_dtype, rows, d), (x_dtype, c_dtype, rows, d)


def cuda_cases():
    dtypes = [(d, d) for d in HALVES] + [(torch.float32, d) for d in HALVES]
    for (x_dtype, c_dtype), (rows, d) in itertools.product(dtypes, CUDA_SHAPES):
        yield x_dtype, c_dtype, rows, d


CASES = [("triton", case) for case in distinct(configurations())]
CASES += [("cuda", case) for case in cuda_cases()]


def skip_unfit(backend):
    x = torch.empty(1, 64, device="cuda", dtype=torch.bfloat16)
    against = explain_ista(x, torch.empty(64, 64, device="cuda", dtype=torch.bfloat16)).reasons
    if against[backend]:
        pytest.skip(f"{backend}: {'; '.join(against[backend])}")


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    skip_unfit(request.param)
    return request.param


def in_dtype(c_dtype, x_dtype, function, **options):
    """``function`` as a layer runs it: under autocast where the two dtypes differ."""
    off = contextlib.nullcontext()

    def run(**inputs):
        with off if x_dtype == c_dtype else torch.autocast("cuda", c_dtype):
            return function(**inputs, **options)

    return run


def inputs_on_gpu(rows, d, x_dtype, c_dtype):
    inputs = {k: t.to("cuda", x_dtype) for k, t in ista_inputs(rows, d).items()}
    dy = torch.randn(rows, d, device="cuda").to(x_dtype)
    return inputs, off_the_kink(dy, inputs["x"].to(c_dtype), inputs["weight"])


@pytest.mark.parametrize(("backend", "case"), CASES, ids=str)
def test_configuration(backend, case):
    """As close to float64 as the criterion asks, and REPEATS times the same bits."""
    skip_unfit(backend)
    x_dtype, c_dtype, rows, d = case
    inputs, dy = inputs_on_gpu(rows, d, x_dtype, c_dtype)
    fused = in_dtype(c_dtype, x_dtype, ista, backend=backend)
    got = results(fused, inputs, dy)
    plain = results(in_dtype(c_dtype, x_dtype, published_ista), inputs, dy)
    exact = results(published_ista, inputs, dy, torch.float64)
    unit = None if x_dtype == c_dtype else torch.finfo(c_dtype).eps
    assert_as_close_as_plain(got, plain, exact, case, unit=unit)
    with torch.no_grad():
        inference = fused(**inputs)
    assert_as_close_as_plain({"y": inference}, {"y": plain["y"]}, {"y": exact["y"]}, case, unit)
    for _ in range(REPEATS):
        again = results(fused, inputs, dy)
        assert all(torch.equal(again[name], got[name]) for name in got)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_as_torch_is_told(precision):
    torch.set_float32_matmul_precision(precision)
    inputs, dy = inputs_on_gpu(900, 384, torch.float32, torch.float32)
    dy = off_the_kink(dy, inputs["x"].bfloat16(), inputs["weight"])  # as wide as TF32 rounds
    got, plain = (results(f, inputs, dy) for f in (ista, published_ista))
    assert_as_close_as_plain(got, plain, results(published_ista, inputs, dy, torch.float64))


def unaligned(t):
    flat = torch.empty(t.numel() + 1, device=t.device, dtype=t.dtype)[1:]
    return flat.view(t.shape).copy_(t)


def transposed(t):
    return t.mT.contiguous().mT


def in_wider_rows(t):
    return torch.cat([t, torch.full_like(t, float("nan"))], dim=1)[:, : t.shape[1]]


@pytest.mark.parametrize("change", [unaligned, transposed, in_wider_rows])
@pytest.mark.parametrize(("rows", "d"), [(6307, 768), (2100, 2048), (2500, 3000)])
def test_any_strides(change, rows, d, backend):
    inputs, dy = inputs_on_gpu(rows, d, torch.bfloat16, torch.bfloat16)
    leaves = {k: change(t).detach().requires_grad_() for k, t in inputs.items()}
    y = ista(**leaves, backend=backend)
    y.backward(change(dy))
    plain, exact = (results(published_ista, inputs, dy, dtype) for dtype in (None, torch.float64))
    got = {"y": y.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}}
    assert_as_close_as_plain(got, plain, exact)


def test_more_elements_than_32_bits_count(backend):
    rows, d = (1 << 31) // 768 + 333, 768
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB")
    inputs, dy = inputs_on_gpu(1000, d, torch.bfloat16, torch.bfloat16)
    weight = inputs["weight"]
    x, do = (torch.zeros(rows, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x[-1000:], do[-1000:] = inputs["x"], dy
    got = results(ista, {"x": x, "weight": weight}, do, backend=backend)
    assert not got["y"][:-1000].any() and not got["dx"][:-1000].any()
    got |= {name: got[name][-1000:] for name in ("y", "dx")}
    plain, exact = (results(published_ista, inputs, dy, dtype) for dtype in (None, torch.float64))
    assert_as_close_as_plain(got, plain, exact)


def test_nan_and_overflow_are_seen(backend):
    inputs, dy = inputs_on_gpu(3 * 64, 64, torch.float16, torch.float16)
    inputs["x"][100] = float("nan")
    got = results(ista, inputs, dy, backend=backend)
    assert got["y"][100].isnan().all() and got["dweight"].isnan().all()
    assert got["y"][:100].isfinite().all() and got["dx"][:100].isfinite().all()
    inputs = inputs_on_gpu(192, 64, torch.float16, torch.float16)[0]
    got = results(ista, inputs, dy * float("inf"), backend=backend)
    assert not got["dx"].isfinite().all() and not got["dweight"].isfinite().all()


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_one_gradient_alone(x_dtype, backend):
    """The same bits as with both wanted."""
    inputs, dy = inputs_on_gpu(1500, 384, x_dtype, torch.bfloat16)
    fused = in_dtype(torch.bfloat16, x_dtype, ista, backend=backend)
    both = results(fused, inputs, dy)
    for name in inputs:
        leaves = {k: t.clone().requires_grad_(k == name) for k, t in inputs.items()}
        fused(**leaves).backward(dy)
        assert torch.equal(leaves[name].grad, both[f"d{name}"])


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_compiled(x_dtype, backend):
    """torch.compile believes the shapes that the ops announce, the mask's too."""
    inputs, dy = inputs_on_gpu(1500, 384, x_dtype, torch.bfloat16)
    fused = in_dtype(torch.bfloat16, x_dtype, ista, backend=backend)
    got = results(torch.compile(fused, fullgraph=x_dtype == torch.bfloat16), inputs, dy)
    assert all(torch.equal(got[k], t) for k, t in results(fused, inputs, dy).items())


# ---- G, kept while no gradient is wanted


@pytest.mark.parametrize("d", [64, 768])
def test_a_changed_weight_is_never_missed(d):
    inputs, _ = inputs_on_gpu(2 * d, d, torch.bfloat16, torch.bfloat16)
    x, weight = inputs["x"], inputs["weight"]

    def fresh():
        return ista(x, weight.clone())

    for change in (lambda: None, lambda: weight.data[0, 0].add_(1), lambda: weight.data.mul_(1.1)):
        change()
        for _ in range(2):
            assert torch.equal(ista(x, weight), fresh())
    weight.data[-1, -1] = float("nan")
    assert ista(x, weight).isnan().any() and ista(x, weight).isnan().any()


def test_a_captured_graph_sees_a_changed_weight():
    inputs, _ = inputs_on_gpu(1000, 384, torch.bfloat16, torch.bfloat16)
    x, weight = inputs["x"], inputs["weight"]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ista(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = ista(x, weight)
    for factor in (1.0, 1.1, 0.7):
        weight.data.mul_(factor)
        for _ in range(2):
            y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, ista(x, weight.clone()))
            assert torch.equal(y, ista(x, weight))  # on another stream


def test_a_capture_that_no_call_came_before():
    inputs, _ = inputs_on_gpu(1000, 384, torch.bfloat16, torch.bfloat16)
    ista(**{k: t.clone() for k, t in inputs.items()})  # compiled, but not with this weight
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ista(**inputs)
    assert inputs["weight"] not in gram_cache._entries
    graph.replay()
    assert torch.equal(y, ista(**inputs))


def test_streams_have_a_gram_each():
    inputs, _ = inputs_on_gpu(1000, 384, torch.bfloat16, torch.bfloat16)
    want = ista(**inputs)
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    for _ in range(5):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(ista(**inputs))
    torch.cuda.synchronize()
    assert all(torch.equal(y, want) for y in found)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_opcheck(backend):
    skip_unfit(backend)
    op = torch.ops.crate_kernels
    for rows in (40, 3):
        x, weight = (t.float().cuda() for t in ista_inputs(rows, 16).values())
        xc = x.bfloat16()
        y, gram, mask = op.ista(x, xc, weight, 0.1, 0.2, backend)
        leaves = (x.clone().requires_grad_(), xc, weight.clone().requires_grad_())
        torch.library.opcheck(op.ista, (*leaves, 0.1, 0.2, backend))
        kept = mask if mask.numel() > 0 else y
        saved = (torch.randn_like(y), kept, xc, weight, gram, 0.1, torch.float32, True, True)
        torch.library.opcheck(op.ista_backward, (*saved, backend))
        torch.library.opcheck(op.ista_apply, (x, xc, weight.bfloat16(), 0.1, backend))
