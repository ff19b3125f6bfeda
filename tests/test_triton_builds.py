"""Every kernel configuration builds for sm_80 and sm_90 on a machine without a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from compile_only import builds_for, transposed_accumulators

from crate_kernels import backends
from crate_kernels.ista import triton_kernels as ista_kernels
from crate_kernels.mssa import triton_kernels as mssa_kernels
from crate_kernels.mssa.masks import Mask
from crate_kernels.rotary import triton_kernels as rotary_kernels

pytestmark = pytest.mark.skipif(backends.interpreted(), reason="nothing is compiled there")

# Bytes of shared memory that one block may have.
SHARED_MEMORY = {(8, 0): 163 * 1024, (9, 0): 227 * 1024}

ROWS = (1, 37, 64, 197, 512, 1024, 4096, 8192)
ATTENTION = [
    (torch.bfloat16, 64, (False, True)),
    (torch.bfloat16, 80, (False, True)),
    (torch.bfloat16, 16, (True,)),
    (torch.bfloat16, 48, (False,)),
    (torch.bfloat16, 256, (False,)),
    (torch.float32, 64, (False, True)),
    (torch.float32, 160, (False,)),
]


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_attention(dtype, head_dim, n, causal):
    heads = 3
    w = meta(2, n, heads * head_dim, dtype=dtype)
    o, lse = mssa_kernels.forward(w, heads, 0.125, causal)
    mssa_kernels.backward(w, w, o, lse, heads, 0.125, causal)


MASKS = {
    "lengths": Mask(torch.empty(2, dtype=torch.int32, device="meta")),
    "packed": Mask(torch.empty(3, dtype=torch.int64, device="meta"), 512),
    "window": Mask(window=128),
    "packed, window": Mask(torch.empty(3, dtype=torch.int32, device="meta"), 4096, 64),
    "dropout": Mask(dropout=0.1, seed=torch.empty(1, dtype=torch.int64, device="meta")),
}


def launch_masked(dtype, head_dim, n, causal, mask):
    heads, packed = 3, mask.longest > 0
    w = meta(*((2 * n,) if packed else (2, n)), heads * head_dim, dtype=dtype)
    o, lse = mssa_kernels.forward(w, heads, 0.125, causal, mask)
    mssa_kernels.backward(w, w, o, lse, heads, 0.125, causal, mask)


def launch_ista(x_dtype, c_dtype, rows, d):
    x, weight = meta(rows, d, dtype=x_dtype), meta(d, d, dtype=x_dtype)
    xc = x.to(c_dtype)
    gram = ista_kernels.make_gram(weight, 0.1, c_dtype)
    ista_kernels.refresh_gram(weight, torch.empty_like(weight), gram, 0.1)
    y = ista_kernels.apply_gram(x, xc, gram, 0.01)
    ista_kernels.apply_weight(x, xc, weight, 0.1, 0.01)
    dy = torch.empty_like(y)
    _, g = ista_kernels.input_gradient(dy, y, gram)
    ista_kernels.weight_gradient(xc, g, weight, 0.1)
    ista_kernels.backward_weight(dy, y, xc, weight, 0.1, x_dtype, True, True)


def check(builds, capability):
    assert builds
    for build in builds:
        what = f"{build.name} {build.metadata}"
        assert build.asm["cubin"], what
        assert build.metadata.shared <= SHARED_MEMORY[capability], what
        hazards = transposed_accumulators(build.asm["ttir"])
        assert not hazards, f"accumulators transposed and multiplied again in {what}: {hazards}"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize(("dtype", "head_dim", "causal"), ATTENTION)
def test_tied_attention_builds(capability, dtype, head_dim, causal):
    with builds_for(capability) as builds:
        for n, future_hidden in itertools.product(ROWS, causal):
            launch_attention(dtype, head_dim, n, future_hidden)
    check(builds, capability)
    names = {build.name for build in builds}
    assert any("forward" in name for name in names) and any("backward" in name for name in names)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_attention_builds(capability, mask):
    with builds_for(capability) as builds:
        launch_masked(torch.bfloat16, 64, 512, mask != "packed", MASKS[mask])
    check(builds, capability)
    assert len(builds) == 3


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_tied_rotary_builds(capability):
    cos = meta(37, 64, dtype=torch.bfloat16)
    with builds_for(capability) as builds:
        for norm_eps in (None, 1e-6):
            w = meta(2, 37, 3 * 128, dtype=torch.bfloat16)
            y, rstd = rotary_kernels.forward(w, cos, cos, 3, norm_eps)
            rotary_kernels.backward(w, None if norm_eps is None else y, rstd, cos, cos, 3)
    check(builds, capability)
    assert len(builds) == 4


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize(
    ("x_dtype", "c_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_ista_builds(capability, x_dtype, c_dtype):
    with builds_for(capability) as builds:
        for rows, d in [(25216, 768), (25216, 50), (64, 64), (1, 20)]:
            launch_ista(x_dtype, c_dtype, rows, d)
    check(builds, capability)


def test_sizes_of_one_build():
    """Triton makes integer arguments equal to 1 constants: one image, head, token, column."""
    with builds_for((9, 0)) as builds:
        w = meta(1, 1, 16, dtype=torch.bfloat16)
        o, lse = mssa_kernels.forward(w, 1, 1.0, True)
        mssa_kernels.backward(w, w, o, lse, 1, 1.0, True)
        w = meta(1, 1, 1, dtype=torch.bfloat16)
        o, lse = mssa_kernels.forward(w, 1, 1.0, False)
        mssa_kernels.backward(w, w, o, lse, 1, 1.0, False)
        launch_ista(torch.float32, torch.bfloat16, 1, 1)
    check(builds, (9, 0))


def test_float32_products_are_exact_or_tf32_as_torch_is_told():
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            with builds_for((8, 0)) as builds:
                launch_attention(torch.float32, 64, 64, False)
            tensor_cores = [b for b in builds if ".tf32" in b.asm["ptx"]]
            dots = [b for b in builds if "tt.dot" in b.asm["ttir"]]
            assert len(dots) == 2
            assert tensor_cores == ([] if precision == "highest" else dots)
    finally:
        torch.set_float32_matmul_precision(before)


@triton.jit
def _transposes_an_accumulator(A, OUT, TRANSPOSE: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a = tl.load(A + at)
    p = tl.dot(a, tl.trans(a)).to(a.dtype)
    if TRANSPOSE:
        p = tl.trans(p)
    tl.store(OUT + at, tl.dot(p, a))


def test_the_search_for_transposed_accumulators_finds_one():
    a, out = meta(16, 16, dtype=torch.bfloat16), meta(16, 16, dtype=torch.float32)
    for transpose in (False, True):
        with builds_for((9, 0)) as builds:
            _transposes_an_accumulator[(1,)](a, out, TRANSPOSE=transpose)
        assert len(transposed_accumulators(builds[0].asm["ttir"])) == transpose
