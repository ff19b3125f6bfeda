"""Overcomplete ISTA on a GPU: every GEMM configuration against float64, repeatable; CRATE-alpha."""

from __future__ import annotations

import contextlib
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    distinct,
    off_the_kinks,
    on_exact_sides,
    overcomplete_codes,
    overcomplete_inputs,
    published_overcomplete_ista,
    results,
)

from crate_kernels import explain, fuse, models, overcomplete_ista
from crate_kernels.bench import workloads
from crate_kernels.bench.check import compare
from crate_kernels.bench.model_cases import ModelCase
from crate_kernels.bench.peers import candidate
from crate_kernels.overcomplete_ista.op import MEMORY

ista_kernels = pytest.importorskip("crate_kernels.ista.triton_kernels")

REPEATS = 100
# x's dtype and that of the products: one for all, or autocast on float32.
DTYPES = [(d, d) for d in (*HALVES, torch.float32)] + [(torch.float32, d) for d in HALVES]
# Rows, D and M: large and small tiles, as many rows as columns, rows that fill no tile, sizes that
# have no descriptors; M below D.
SHAPES = [(25216, 768, 3072), (6307, 384, 1536), (3072, 96, 3072), (128, 32, 128), (70, 64, 32)]
SHAPES += [(333, 100, 201), (25, 7, 9)]
# For the CUDA kernels: several tiles for each block and less than one, either width of tile, halves
# of a pair of tiles, sizes that end inside a chunk, and M below D.
CUDA_SHAPES = [
    *((25216, 768, 3072), (12608, 576, 2304), (50432, 384, 1152), (25216, 192, 768)),
    *((394, 384, 1536), (127, 192, 576), (3072, 96, 3072), (700, 64, 968)),
    *((333, 104, 200), (129, 8, 64), (70, 64, 32)),
]


def configurations():
    for (x_dtype, c_dtype), (rows, d, m) in itertools.product(DTYPES, SHAPES):
        described = d % 8 == m % 8 == 0
        chosen = [ista_kernels.gemm_config(c_dtype, rows, n, described) for n in (d, m)]
        yield (x_dtype, c_dtype, *chosen, described), (x_dtype, c_dtype, rows, d, m)


def cuda_cases():
    dtypes = [(d, d) for d in HALVES] + [(torch.float32, d) for d in HALVES]
    for (x_dtype, c_dtype), (rows, d, m) in itertools.product(dtypes, CUDA_SHAPES):
        yield x_dtype, c_dtype, rows, d, m


CASES = [("triton", case) for case in distinct(configurations())]
CASES += [("cuda", case) for case in cuda_cases()]


def skip_unfit(backend, c_dtype=torch.bfloat16):
    x = torch.empty(1, 64, device="cuda", dtype=c_dtype)
    weight = torch.empty(64, 256, device="cuda", dtype=c_dtype)
    against = explain("overcomplete_ista", x, weight).reasons[backend]
    if against:
        pytest.skip(f"{backend}: {'; '.join(against)}")


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


def inputs_on_gpu(rows, d, m, x_dtype, c_dtype, tied=False):
    inputs = overcomplete_inputs(rows, d, width=m, tied=tied)
    inputs = {k: t.to("cuda", x_dtype) for k, t in inputs.items()}
    return inputs, torch.randn(rows, d, device="cuda").to(c_dtype)


def off_kinks(dout, inputs, c_dtype, unit=None, backend="triton"):
    """dout without the tokens that have a code on the other side of its relu than in float64.

    In half precision every token of many codes has some, ours as often as the published: there
    dout stays as it is.
    """
    x, dictionary = inputs["x"], inputs["dictionary"]
    given = (x, x.to(c_dtype), dictionary, None, 0.1, 0.1, "default", backend)
    ours = torch.ops.crate_kernels.overcomplete_ista(*given)[2:4]
    unit = unit or torch.finfo(c_dtype).eps
    if c_dtype in HALVES and dictionary.shape[1] > 512:
        on_exact_sides(inputs, ours, unit)
        return dout
    plain = in_dtype(c_dtype, x.dtype, overcomplete_codes)(**inputs)
    return off_the_kinks(dout, inputs, (ours, plain), unit)


@pytest.mark.parametrize(("backend", "case"), CASES, ids=str)
def test_configuration(backend, case):
    """As close to float64 as the criterion asks, and REPEATS times the same bits."""
    skip_unfit(backend)
    x_dtype, c_dtype, rows, d, m = case
    inputs, dout = inputs_on_gpu(rows, d, m, x_dtype, c_dtype)
    dout = off_kinks(dout, inputs, c_dtype, backend=backend)
    fused = in_dtype(c_dtype, x_dtype, overcomplete_ista, backend=backend)
    got = results(fused, inputs, dout)
    plain = results(in_dtype(c_dtype, x_dtype, published_overcomplete_ista), inputs, dout)
    exact = results(published_overcomplete_ista, inputs, dout, torch.float64)
    unit = None if x_dtype == c_dtype else torch.finfo(c_dtype).eps
    assert_as_close_as_plain(got, plain, exact, case, unit=unit)
    with torch.no_grad():
        assert torch.equal(fused(**inputs), got["y"])
    low = in_dtype(c_dtype, x_dtype, overcomplete_ista, backend=backend, memory="low")
    for function in (low, *[fused] * REPEATS):
        again = results(function, inputs, dout)
        assert all(torch.equal(again[name], got[name]) for name in got)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("x_dtype", "c_dtype"), DTYPES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_tied(memory, x_dtype, c_dtype, backend):
    skip_unfit(backend, c_dtype)
    inputs, dout = inputs_on_gpu(1000, 32, 128, x_dtype, c_dtype, tied=True)
    dout = off_kinks(dout, inputs, c_dtype, backend=backend)
    function = in_dtype(c_dtype, x_dtype, overcomplete_ista, memory=memory, backend=backend)
    got = results(function, inputs, dout)
    plain = results(in_dtype(c_dtype, x_dtype, published_overcomplete_ista), inputs, dout)
    exact = results(published_overcomplete_ista, inputs, dout, torch.float64)
    unit = None if x_dtype == c_dtype else torch.finfo(c_dtype).eps
    assert_as_close_as_plain(got, plain, exact, unit=unit)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_as_torch_is_told(precision):
    torch.set_float32_matmul_precision(precision)
    inputs, dout = inputs_on_gpu(900, 96, 128, torch.float32, torch.float32)
    unit = torch.finfo(torch.bfloat16).eps if precision == "high" else None
    dout = off_kinks(dout, inputs, torch.float32, unit)
    got, plain = (
        results(f, inputs, dout) for f in (overcomplete_ista, published_overcomplete_ista)
    )
    exact = results(published_overcomplete_ista, inputs, dout, torch.float64)
    assert_as_close_as_plain(got, plain, exact)


def unaligned(t):
    flat = torch.empty(t.numel() + 1, device=t.device, dtype=t.dtype)[1:]
    return flat.view(t.shape).copy_(t)


def transposed(t):
    return t.mT.contiguous().mT


def in_wider_rows(t):
    return torch.cat([t, torch.full_like(t, float("nan"))], dim=1)[:, : t.shape[1]]


@pytest.mark.parametrize("change", [unaligned, transposed, in_wider_rows])
@pytest.mark.parametrize(("rows", "d", "m"), [(6307, 768, 3072), (70, 64, 32)])
def test_any_strides(change, rows, d, m, backend):
    inputs, dout = inputs_on_gpu(rows, d, m, torch.bfloat16, torch.bfloat16)
    dout = off_kinks(dout, inputs, torch.bfloat16, backend=backend)
    leaves = {k: change(t).detach().requires_grad_() for k, t in inputs.items()}
    y = overcomplete_ista(**leaves, backend=backend)
    assert y.is_contiguous()
    y.backward(change(dout))
    got = {"y": y.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}}
    plain = results(published_overcomplete_ista, inputs, dout)
    exact = results(published_overcomplete_ista, inputs, dout, torch.float64)
    assert_as_close_as_plain(got, plain, exact)


def by(backend):
    return functools.partial(overcomplete_ista, backend=backend)


def test_codes_of_more_elements_than_32_bits_count(backend):
    rows, d, m = (1 << 31) // 128 + 333, 32, 128
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB")
    inputs, dout = inputs_on_gpu(1000, d, m, torch.bfloat16, torch.bfloat16)
    dout = off_kinks(dout, inputs, torch.bfloat16, backend=backend)
    x, do = (torch.zeros(rows, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x[-1000:], do[-1000:] = inputs["x"], dout
    got = results(by(backend), {**inputs, "x": x}, do)
    assert not got["y"][:-1000].any() and not got["dx"][:-1000].any()
    got |= {name: got[name][-1000:] for name in ("y", "dx")}
    plain = results(published_overcomplete_ista, inputs, dout)
    exact = results(published_overcomplete_ista, inputs, dout, torch.float64)
    assert_as_close_as_plain(got, plain, exact)


def test_nan_and_overflow_are_seen(backend):
    inputs, dout = inputs_on_gpu(3 * 64, 64, 256, torch.float16, torch.float16)
    inputs["x"][100] = float("nan")
    got = results(by(backend), inputs, dout)
    assert got["y"][100].isnan().all() and got["ddictionary"].isnan().all()
    assert got["y"][:100].isfinite().all() and got["dx"][:100].isfinite().all()
    inputs = inputs_on_gpu(192, 64, 256, torch.float16, torch.float16)[0]
    got = results(by(backend), inputs, dout * float("inf"))
    assert not any(got[f"d{name}"].isfinite().all() for name in inputs)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_one_gradient_alone(x_dtype, backend):
    """The same bits as with all wanted."""
    inputs, dout = inputs_on_gpu(1500, 384, 1536, x_dtype, torch.bfloat16)
    fused = in_dtype(torch.bfloat16, x_dtype, overcomplete_ista, backend=backend)
    full = results(fused, inputs, dout)
    for name in inputs:
        leaves = {k: t.clone().requires_grad_(k == name) for k, t in inputs.items()}
        fused(**leaves).backward(dout)
        assert torch.equal(leaves[name].grad, full[f"d{name}"])


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory", MEMORY)
def test_compiled(x_dtype, memory, backend):
    """torch.compile believes the shapes that the ops announce."""
    inputs, dout = inputs_on_gpu(1500, 384, 1536, x_dtype, torch.bfloat16)
    options = {"memory": memory, "backend": backend}
    fused = in_dtype(torch.bfloat16, x_dtype, overcomplete_ista, **options)
    got = results(torch.compile(fused, fullgraph=x_dtype == torch.bfloat16), inputs, dout)
    assert all(torch.equal(got[k], t) for k, t in results(fused, inputs, dout).items())


@pytest.mark.parametrize("memory", MEMORY)
def test_opcheck(memory, backend):
    op = torch.ops.crate_kernels
    x, dictionary, decoder = (t.float().cuda() for t in overcomplete_inputs(40, 16).values())
    xc, numbers = x.bfloat16(), (0.1, 0.2)
    out, *kept = op.overcomplete_ista(x, xc, dictionary, decoder, *numbers, memory, backend)
    leaves = [t.clone().requires_grad_() for t in (x, dictionary, decoder)]
    given = (leaves[0], xc.clone(), *leaves[1:], *numbers, memory, backend)
    torch.library.opcheck(op.overcomplete_ista, given)
    saved = (torch.randn_like(out), xc, *kept, dictionary, decoder, [True] * 3, *numbers)
    torch.library.opcheck(op.overcomplete_ista_backward, (*saved, torch.float32, memory, backend))


@pytest.mark.parametrize("dtype", HALVES)
def test_one_row(dtype, backend):
    """Forward: of one row a single code on the other side of its relu decides the gradients."""
    inputs, _ = inputs_on_gpu(1, 768, 3072, dtype, dtype)
    exact = {k: t.double() for k, t in inputs.items()}
    got = {"y": by(backend)(**inputs)}
    plain = {"y": published_overcomplete_ista(**inputs)}
    assert_as_close_as_plain(got, plain, {"y": published_overcomplete_ista(**exact)})


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "d", "m"), [(333, 104, 200), (12608, 384, 1536), (1, 64, 968)])
def test_bits_are_those_of_the_codes(dtype, rows, d, m):
    """In the layout of csrc/ista/tiles.cuh: bit 8 (2 h + e) + 7 - j of the word (row block, column
    block, half, warp, group, pair) is row 16 warp + group + 8 h, column 8 j + 2 pair + e."""
    skip_unfit("cuda")
    inputs, _ = inputs_on_gpu(rows, d, m, dtype, dtype)
    given = (inputs["x"], inputs["x"], inputs["dictionary"], None, 0.1, 0.1, "default", "cuda")
    *codes, bits = torch.ops.crate_kernels.overcomplete_ista(*given)[2:]
    for z, words in zip(codes, bits, strict=True):
        words = words.view(torch.int32).view(-(-rows // 128), -(-m // 64), 2, 4, 8, 4)
        h, e, j = torch.meshgrid(*map(torch.arange, (2, 2, 8)), indexing="ij")
        found = words[..., None, None, None] >> (8 * (2 * h + e) + 7 - j).cuda() & 1
        # (row block, column block, half, warp, group, pair, h, e, j), by rows and by columns
        found = found.permute(0, 2, 3, 6, 4, 1, 8, 5, 7).flatten(5).flatten(0, 4)
        assert torch.equal(found[:rows, :m] == 1, z > 0)


def test_a_captured_step_by_cuda():
    """The gradients of the step that is not captured, in every replay."""
    skip_unfit("cuda")
    inputs, dout = inputs_on_gpu(1500, 384, 1536, torch.bfloat16, torch.bfloat16)
    want = results(by("cuda"), inputs, dout)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(by("cuda"), inputs, dout)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = results(by("cuda"), inputs, dout)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(found[name], t) for name, t in want.items())


# ---- CRATE-alpha


@pytest.mark.parametrize(
    ("rows", "d", "m", "chosen"),
    [
        (25216, 768, 3072, "cuda"),
        (25216, 64, 256, "triton"),
        (197, 768, 3072, "triton"),
        (25216, 768, 1001, "triton"),
    ],
)
def test_auto(rows, d, m, chosen):
    skip_unfit("cuda")
    x = torch.empty(rows, d, device="cuda", dtype=torch.bfloat16)
    weight = torch.empty(d, m, device="cuda", dtype=torch.bfloat16)
    assert explain("overcomplete_ista", x, weight).chosen == chosen


@pytest.mark.parametrize(("name", "dtype"), [("crate_alpha_small", "bf16")])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_published_size_passes_the_benchmarks_gate(name, dtype, mode):
    w = workloads.model(name, mode, 8, dtype=dtype)
    case = ModelCase.make(w, torch.device("cuda", 0), torch.Generator("cuda").manual_seed(0))
    reference = case.reference()
    plain = case.outputs(candidate("eager-narrow"))
    for ours in ("crate_kernels", "crate_kernels-low"):
        found = compare(case.outputs(candidate(ours)), plain, reference)
        assert found.passed, str(found)


@pytest.mark.parametrize("memory", MEMORY)
def test_a_captured_training_step(memory):
    """The gradients of the step that is not captured, in every replay."""
    torch.manual_seed(0)
    size = {"image_size": 32, "patch_size": 4, "dim": 128, "depth": 3, "heads": 2}
    model = models.CRATEAlpha(num_classes=10, **size).cuda()
    fuse(model, memory=memory)
    img, labels = torch.randn(16, 3, 32, 32, device="cuda"), torch.arange(16, device="cuda") % 10

    def step():
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(model(img), labels)
        return torch.autograd.grad(loss, list(model.parameters()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = [g.clone() for g in step()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = step()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(g, w) for g, w in zip(found, want, strict=True))


def test_low_memory_takes_less():
    torch.manual_seed(0)
    peaks = {}
    for memory in MEMORY:
        model = models.crate_alpha_tiny(depth=4).cuda()
        fuse(model, memory=memory)
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            model(torch.randn(64, 3, 224, 224, device="cuda")).sum().backward()
        peaks[memory] = torch.cuda.max_memory_allocated()
        del model
    # Codes of four layers less, but for those that one layer makes again.
    codes = 2 * 2 * 64 * 197 * 4 * 192
    assert peaks["default"] - peaks["low"] > 2 * codes
