"""Every kernel configuration builds for sm_80 and sm_90 on a machine without a GPU."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from compile_only import builds_for, transposed_accumulators

from crate_kernels import backends
from crate_kernels.block import triton_kernels as block_kernels
from crate_kernels.cross_entropy import triton_kernels as cross_entropy_kernels
from crate_kernels.decode import triton_kernels as decode_kernels
from crate_kernels.ista import triton_kernels as ista_kernels
from crate_kernels.ista.learned import triton_kernels as learned_kernels
from crate_kernels.masked import triton_kernels as masked_kernels
from crate_kernels.mssa import triton_kernels as mssa_kernels
from crate_kernels.mssa.masks import Mask
from crate_kernels.overcomplete_ista import triton_kernels as overcomplete_kernels
from crate_kernels.patch_embedding import triton_kernels as stem_kernels
from crate_kernels.residual_norm import triton_kernels as residual_kernels
from crate_kernels.rotary import triton_kernels as rotary_kernels
from crate_kernels.tied_embedding import triton_kernels as embedding_kernels

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


def launch_ista_learned(x_dtype, c_dtype, rows, d, size, signed):
    x, weight = meta(rows, d, dtype=x_dtype), meta(d, d, dtype=x_dtype)
    xc, eta, lambd = x.to(c_dtype), meta(size, dtype=torch.float32), meta(d, dtype=x_dtype)
    a = ista_kernels.make_gram(weight, 1.0, c_dtype)
    y = learned_kernels.apply_gram(x, xc, a, eta, lambd, signed)
    learned_kernels.apply_weight(x, xc, weight, eta, lambd, signed)
    options = (eta, lambd, x_dtype, [True] * 4)
    learned_kernels.backward(torch.empty_like(y), y, xc, weight, a, *options)


def launch_block(dtype, x_dtype, d):
    x, p = meta(300, d, dtype=x_dtype), meta(300, d, dtype=dtype)
    gamma = meta(d, dtype=torch.float32)
    block_kernels.normalise(x, None, None, gamma, gamma, 1e-5, dtype)
    z, h, stats = block_kernels.normalise(x, p, gamma, gamma, gamma, 1e-5, dtype)
    block_kernels.statistics(x, 1e-5, dtype)
    block_kernels.fold(meta(2 * d, d, dtype=x_dtype), gamma, gamma, dtype)
    block_kernels.fold_gram(meta(d, d, dtype=dtype), gamma, gamma)
    block_kernels.statistics_of_moments(meta(4, 64 * d, 2, dtype=torch.float32), d, 1e-5)
    for out in (meta(d, 2 * d, dtype=x_dtype), None):
        block_kernels.rounded(meta(2 * d, d, dtype=x_dtype), out, meta(d, d, dtype=x_dtype), dtype)
    block_kernels.normalise_backward(h, z, stats, gamma, gamma, None, True, True)
    block_kernels.normalise_backward(h, z, stats, gamma, gamma, z, False, False, True)
    block_kernels.normalise_backward(h, z, stats, gamma, gamma, z, True, True)


def launch_residual_norm(x_dtype, dtype, d):
    x, y = meta(300, d, dtype=x_dtype), meta(300, d, dtype=dtype)
    gamma, h = meta(d, dtype=torch.float32), meta(300, d, dtype=dtype)
    for *added, factor in ((None, None, 1.0), (y, None, 1.0), (y, None, -1.0), (y, gamma, 1.0)):
        given = (x, *added, gamma, gamma, 1e-6, x_dtype, dtype, factor)
        z, _, stats = residual_kernels.forward(*given)
        z = x if z is None else z
        y_dtype = None if added[0] is None else dtype
        kept = None if added[1] is None else y  # for dscale
        for dz in (None, z):
            given = (dz, h, z, stats, gamma, kept, added[1])
            residual_kernels.backward(*given, x_dtype, y_dtype, factor)


def launch_cross_entropy(dtype, v, width, stride, label_dtype, ignore_index):
    logits = meta(300, stride, dtype=dtype)[:, :width]
    labels = meta(300, dtype=label_dtype)
    loss, count, stats = cross_entropy_kernels.forward(logits, labels, v, ignore_index)
    for wants_sums in (False, True):
        saved = (loss, logits, labels, stats, count)
        cross_entropy_kernels.backward(*saved, v, ignore_index, wants_sums)


def launch_masked_patches(dtype, img_dtype, channels, patch_size, d):
    img = meta(2, channels, 2 * patch_size, 3 * patch_size, dtype=img_dtype)
    mask, token = meta(2, 6, dtype=torch.float32), meta(1, 1, d, dtype=torch.float32)
    given = (meta(2, 6, d, dtype=dtype), mask, token, token, meta(1, 7, d, dtype=img_dtype))
    masked_kernels.tokens_backward(masked_kernels.tokens_forward(*given, dtype), mask, dtype)
    predicted, one = meta(2, 7, channels * patch_size**2, dtype=dtype)[:, 1:], mask[0, 0]
    for norm_pix in (False, True):
        given = (predicted, img, mask, one, patch_size, norm_pix)
        masked_kernels.loss_forward(*given)
        masked_kernels.loss_backward(one, *given)


def launch_tied_embedding(dtype, words, d):
    idx, weight = meta(2, 300, dtype=torch.int64), meta(words, d, dtype=torch.float32)
    for positions in (None, idx):
        x = embedding_kernels.forward(
            idx, weight, meta(300, d, dtype=torch.float32), positions, dtype
        )
    for given in (None, meta(words, d, dtype=dtype)):
        rows = (x.view(-1, d), idx.view(-1))
        embedding_kernels.add_rows(*rows, given, words, -1, torch.float32)


def launch_patch_embedding(dtype, img_dtype, channels, patch_size, d):
    img = meta(2, channels, 2 * patch_size[0], 3 * patch_size[1], dtype=img_dtype)
    zhat = stem_kernels.normalise_patches(img, patch_size, 1e-5, dtype)
    e, gamma = meta(2, zhat.shape[1], d, dtype=dtype), meta(d, dtype=torch.float32)
    weight, norm = (
        meta(d, zhat.shape[2], dtype=torch.float32),
        meta(zhat.shape[2], dtype=torch.float32),
    )
    stem_kernels.fold(norm, norm, weight, gamma, channels, dtype)
    for cls, pos in ((None, None), (meta(1, 1, d, dtype=dtype), meta(1, 7, d, dtype=dtype))):
        x = stem_kernels.embed(e, gamma, gamma, gamma, cls, pos, 1e-5, dtype)
        stem_kernels.embed_backward(x, e, gamma, gamma, cls is not None, 1e-5)


def launch_overcomplete(x_dtype, dtype, rows, d, m, transposed=False):
    x, dictionary = meta(rows, d, dtype=dtype), meta(d, m, dtype=dtype)
    if transposed:
        dictionary = meta(m, d, dtype=dtype).mT
    z1 = overcomplete_kernels.encode(x, dictionary, 0.1, 0.01)
    r = overcomplete_kernels.residual(x.to(x_dtype), z1, dictionary)
    z2 = overcomplete_kernels.refine(z1, r, dictionary, 0.1, 0.01)
    e2 = overcomplete_kernels.refine_backward(x, dictionary, z2, 0.1)
    e1 = overcomplete_kernels.encode_backward(e2, r, dictionary, z1, 0.1)
    overcomplete_kernels.input_gradient(r, e1, dictionary, x_dtype)


def launch_decode(dtype, head_dim, n_new, batch=64, capacity=4096, heads=12):
    w = meta(batch, n_new, heads * head_dim, dtype=dtype)
    cache = meta(batch, capacity, heads * head_dim, dtype=dtype)
    decode_kernels.decode(w, cache, meta(batch, dtype=torch.int32), heads, 0.125)


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


def test_full_float32_sums_each_tile_by_itself():
    with builds_for((9, 0)) as builds:
        launch_attention(torch.float32, 64, 512, True)
        launch_masked(torch.float32, 64, 512, False, MASKS["dropout"])
    for ttir in (build.asm["ttir"] for build in builds if "delta" not in build.name):
        zeros = re.findall(r"(%\w+) = arith\.constant dense<0\.0", ttir)
        starts = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", ttir)
        assert starts and set(starts) <= set(zeros)


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


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_ista_with_learned_thresholds_builds(capability, x_dtype):
    with builds_for(capability) as builds:
        for rows, d in [(25216, 768), (64, 20)]:
            launch_ista_learned(x_dtype, torch.bfloat16, rows, d, d, False)
            launch_ista_learned(x_dtype, torch.bfloat16, rows, d, 1, True)
        launch_ista_learned(torch.float32, torch.float32, 1, 1, 1, True)
    check(builds, capability)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_passes_over_rows_build(capability, x_dtype):
    with builds_for(capability) as builds:
        for d in (20, 384, 768, 1024):
            launch_block(torch.bfloat16, x_dtype, d)
            launch_patch_embedding(torch.bfloat16, x_dtype, 3, (16, 16), d)
            launch_masked_patches(torch.bfloat16, x_dtype, 3, 16, d)
        launch_patch_embedding(torch.bfloat16, x_dtype, 1, (14, 7), 33)
        launch_patch_embedding(torch.bfloat16, x_dtype, 3, (32, 32), 1280)
    check(builds, capability)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize(
    ("x_dtype", "dtype"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)]
)
def test_residual_norm_builds(capability, x_dtype, dtype):
    with builds_for(capability) as builds:
        for d in (1, 20, 192, 768, 1280, 4096):
            launch_residual_norm(x_dtype, dtype, d)
    check(builds, capability)
    assert {build.name for build in builds} == {
        "normalise_kernel",
        "normalise_backward_kernel",
        "sum_partials_kernel",
    }


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tied_embedding_builds(capability, dtype):
    with builds_for(capability) as builds:
        for words, d in [(50304, 768), (50265, 768), (1, 1), (300, 2048)]:
            launch_tied_embedding(dtype, words, d)
    check(builds, capability)
    assert {build.name for build in builds} == {"embed_kernel", "pieces_kernel", "rows_kernel"}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cross_entropy_builds(capability, dtype):
    shapes = [(50304, 50304, 50304), (50265, 50272, 50272), (50265, 50265, 50272), (7, 7, 7)]
    with builds_for(capability) as builds:
        for shape in shapes:
            launch_cross_entropy(dtype, *shape, torch.int64, -100)
        launch_cross_entropy(dtype, 1, 1, 1, torch.int32, 1)
    check(builds, capability)
    assert {build.name for build in builds} == {
        "cross_entropy_forward_kernel",
        "cross_entropy_backward_kernel",
    }
    for build in builds:  # 16 bytes a load, and a thread keeps to its own columns
        if build.metadata.num_warps == 8:
            assert re.search(r"ld\.global\S*\.v4\.b32", build.asm["ptx"])
        loop = re.search(r"scf.for .*?\n    }", build.asm["ttgir"], re.DOTALL)
        assert loop is None or "convert_layout" not in loop[0]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)],
)
def test_overcomplete_ista_builds(capability, x_dtype, dtype):
    with builds_for(capability) as builds:
        for rows, d, m in [(25216, 768, 3072), (197, 20, 50)]:
            launch_overcomplete(x_dtype, dtype, rows, d, m)
        launch_overcomplete(x_dtype, dtype, 25216, 768, 3072, transposed=True)
    check(builds, capability)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim"),
    [((8, 0), torch.bfloat16, 64), ((9, 0), torch.bfloat16, 80), ((9, 0), torch.float32, 128)],
)
def test_decode_builds(capability, dtype, head_dim):
    with builds_for(capability) as builds:
        for n_new in (1, 4, 40):
            launch_decode(dtype, head_dim, n_new)
        launch_decode(dtype, head_dim, 1, capacity=100)  # in one part
    check(builds, capability)
    assert {b.name for b in builds} == {
        "decode_one_kernel",
        "decode_rows_kernel",
        "combine_kernel",
    }
    for build in builds:  # what is read ahead stays in registers
        loop = re.search(r"scf.for .*?\n    }", build.asm["ttgir"], re.DOTALL)
        if build.name == "decode_one_kernel":
            assert loop and "local_load" not in loop[0] and "convert_layout" not in loop[0]


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
        launch_overcomplete(torch.float32, torch.bfloat16, 1, 1, 8)
        launch_decode(torch.bfloat16, 1, 1, batch=1, capacity=1, heads=1)
        launch_decode(torch.bfloat16, 1, 2, batch=1, capacity=1, heads=1)
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
