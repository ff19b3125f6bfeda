"""A trace on a GPU: the fused path, no waiting, numbers as close as plain PyTorch's."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers import HALVES, assert_as_close_as_plain, calls

from crate_kernels import fuse, whitebox
from crate_kernels.models import CRATE, crate_base
from crate_kernels.nn.layers import log_once
from crate_kernels.whitebox import trace, tracing

pytest.importorskip("triton")

DEPTH = 3


def small_crate():
    torch.manual_seed(0)
    size = {"image_size": 64, "patch_size": 4, "dim": 128, "depth": DEPTH, "heads": 2}
    return CRATE(**size, num_classes=10).cuda().eval()


def images(batch=16):
    torch.manual_seed(1)
    return torch.randn(batch, 3, 64, 64, device="cuda")


def plain_rate(w, dtype):
    """R^c as published, norms and products in the dtype of w, the determinant in ``dtype``."""
    w = w / torch.norm(w, dim=-1, keepdim=True)
    n, p = w.shape[-2:]
    gram = torch.eye(n, device=w.device, dtype=dtype) + p / (n * 0.01) * (w @ w.mT).to(dtype)
    return torch.logdet(gram).sum(-1) / 2


# batch, heads, tokens, head_dim: both sides of the Gram matrix, odd sizes, none at all.
SHAPES = [(8, 12, 197, 64), (4, 12, 197, 48), (8, 2, 33, 64), (2, 1, 197, 768), (1, 1, 1, 8)]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rates_are_as_close_as_plain(shape, dtype):
    w = torch.randn(*shape, device="cuda").to(dtype)
    w = w.transpose(1, 2).contiguous().transpose(1, 2)  # as w = h U^T lies
    got = whitebox.compressed_rate(w)
    assert torch.equal(got, whitebox.compressed_rate(w)) and got.dtype == torch.float32
    plain, exact = plain_rate(w, torch.float32), plain_rate(w.double(), torch.float64)
    assert_as_close_as_plain({"rate": got}, {"rate": plain}, {"rate": exact}, shape)
    assert whitebox.compressed_rate(w[:0]).shape == (0,)
    zeros = (w == 0).double().mean((2, 3))
    assert torch.equal(whitebox.sparsity(w), zeros)


def test_large_values_in_float16():
    w = 60000 * torch.rand(2, 2, 50, 16, device="cuda").half()
    got = {"rate": whitebox.compressed_rate(w)}
    plain = {"rate": plain_rate(w.float(), torch.float32)}
    exact = {"rate": plain_rate(w.double(), torch.float64)}
    assert_as_close_as_plain(got, plain, exact, unit=torch.finfo(torch.float16).eps)
    w[0, 0, 0, 0] = torch.inf
    assert whitebox.compressed_rate(w).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fused_and_unfused_agree(dtype):
    plain = small_crate()
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    assert fuse(fused)
    found = []
    for model in (fused, plain, exact):
        x = images().double() if model is exact else images()
        enabled = dtype != torch.float32 and model is not exact
        cast = torch.autocast("cuda", dtype, enabled=enabled)
        with torch.no_grad(), cast, trace(model, attention=True) as t:
            model(x)
        of_layers = {
            measure: torch.stack([t.values(measure, i) for i in range(DEPTH)]).float()
            for measure in ("coding_rate", "compressed_rates", "sparsity")
        }
        rows = torch.stack([t.attention(i) for i in range(DEPTH)]).float()
        found.append({**of_layers, "attention": rows})
    assert_as_close_as_plain(*found, unit=torch.finfo(dtype).eps)


def test_the_fused_path_is_taken(caplog):
    model = small_crate()
    fuse(model)
    log_once.cache_clear()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        want = model(images())
        with caplog.at_level(logging.WARNING, "crate_kernels"), trace(model, attention=True):
            got = model(images())
            _, count = calls(model, images())
    assert count == {"patch_embedding": 1, "crate_block": DEPTH}
    assert not [r for r in caplog.records if "unfused" in r.message]
    assert torch.equal(got, want)


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_waits_for_the_device(fused, monkeypatch):
    """Determinants included, which fall due at every layer here."""
    monkeypatch.setattr(tracing, "PENDING", 0)
    model = small_crate()
    if fused:
        fuse(model)
    chosen = {"queries": [0, -1], "heads": [1]}
    cast = torch.autocast("cuda", torch.bfloat16)
    with torch.no_grad(), cast, trace(model, attention=chosen) as t:
        model(images())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(images())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert t.table().rows[-1].samples == 32
    torch.testing.assert_close(*t.values("compressed_rate", 1).chunk(2))


def test_memory_of_a_long_trace_is_bounded():
    """Gram matrices wait within PENDING; what is kept of a batch is a few numbers a layer."""
    torch.manual_seed(0)
    model = crate_base().cuda().eval()
    fuse(model)
    x = torch.randn(16, 3, 224, 224, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), trace(model) as t:
        model(x)
        before = torch.cuda.memory_allocated()
        for _ in range(20):
            model(x)
        grown = torch.cuda.memory_allocated() - before
    assert grown < tracing.PENDING + (32 << 20)
    assert t.table().rows[0].samples == 21 * 16


def test_data_parallel_on_all_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = small_crate().double()
    fuse(model)
    found = []
    for m in (model, torch.nn.DataParallel(model)):
        with torch.no_grad(), trace(m, samples=None) as t:
            for batch in (10, 6):
                m(images(batch).double())
        found.append(t)
    for layer in range(DEPTH):
        for measure in ("coding_rate", "compressed_rates", "sparsity"):
            one, several = (t.values(measure, layer) for t in found)
            torch.testing.assert_close(several, one)
