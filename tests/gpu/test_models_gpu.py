"""Fused models on a GPU: autocast, GradScaler, torch.compile, CUDA graphs, training curves."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
from helpers import HALVES, assert_as_close_as_plain, calls

from crate_kernels import (
    cuda_extension,
    explain,
    fuse,
    ista,
    mssa,
    prepare_for_inference,
    tied_attention,
)
from crate_kernels.bench import workloads
from crate_kernels.bench.check import compare
from crate_kernels.bench.model_cases import MaskedCase, ModelCase
from crate_kernels.bench.peers import candidate
from crate_kernels.models import CRATE, MaskedAutoencoder

pytest.importorskip("triton")

CLASSES = 10


def small_crate(**overrides):
    size = {"image_size": 32, "patch_size": 4, "dim": 128, "depth": 3, "heads": 2}
    return CRATE(**{**size, "num_classes": CLASSES, "pool": "mean", **overrides}).cuda()


def fused_copy(model):
    other = copy.deepcopy(model)
    assert len(fuse(other)) > 0
    return other


def images(batch=16):
    """A pattern for each class under fresh noise, and the classes."""
    fixed = torch.Generator("cuda").manual_seed(0)
    patterns = torch.randn(CLASSES, 3, 32, 32, device="cuda", generator=fixed)
    labels = torch.arange(batch, device="cuda") % CLASSES
    return patterns[labels] + torch.randn(batch, 3, 32, 32, device="cuda"), labels


def loss_of(model, x, labels, dtype=torch.bfloat16):
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        return F.cross_entropy(model(x), labels)


def gradients(model, *batch, share=1.0, **kwargs):
    model.zero_grad()
    (share * loss_of(model, *batch, **kwargs)).backward()
    return [p.grad.clone() for p in model.parameters()]


PUBLISHED = [("crate_small", "bf16"), ("crate_tiny", "fp16"), ("crate_mae_base", "bf16")]


@pytest.mark.parametrize(("name", "dtype"), PUBLISHED)
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_published_size_passes_the_benchmarks_gate(name, dtype, mode):
    w = workloads.model(name, mode, 8, dtype=dtype)
    kind = MaskedCase if name == "crate_mae_base" else ModelCase
    case = kind.make(w, torch.device("cuda", 0), torch.Generator("cuda").manual_seed(0))
    reference = case.reference()
    plain = case.outputs(candidate("eager-narrow"))
    for ours in ("crate_kernels", "crate_kernels-low"):
        found = compare(case.outputs(candidate(ours)), plain, reference)
        assert found.passed, str(found)


def test_auto_takes_triton_for_float32():
    x = torch.randn(2, 5, 64, device="cuda")
    assert explain("mssa", x, torch.randn(64, 64, device="cuda"), heads=1).chosen == "triton"
    assert explain("ista", x.double(), torch.eye(64, device="cuda").double()).chosen == "reference"


def test_grad_scaler_backs_off_and_trains():
    torch.manual_seed(0)
    model = fused_copy(small_crate())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**32, growth_interval=1000)
    batch, losses, skipped = images(64), [], 0
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(model, *batch, dtype=torch.float16)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        losses.append(loss.item())
    assert skipped > 0, "2**32 overflows float16: the scaler has to see inf"
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_training_curves_cannot_be_told_apart():
    """Fused and unfused from one seed differ less than unfused from two seeds."""
    curves = {}
    for name, seed in (("plain", 0), ("other seed", 1), ("fused", 0)):
        torch.manual_seed(seed)
        model = small_crate()
        if name == "fused":
            fuse(model)
        torch.manual_seed(100 + seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        curve = []
        for _ in range(150):
            optimizer.zero_grad()
            loss = loss_of(model, *images(64))
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves[name] = torch.stack(curve)
    assert curves["plain"][-10:].mean() < 0.7 * curves["plain"][0]

    def apart(name):
        return (curves[name] - curves["plain"]).square().mean().sqrt()

    assert apart("fused") < 0.5 * apart("other seed")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled_model(mode):
    """One graph, and the numbers of the model that is not compiled."""
    torch.manual_seed(0)
    model = fused_copy(small_crate(depth=2)).train(mode == "train")
    batch = images()
    compiled = torch.compile(model, fullgraph=True)
    if mode == "eval":
        with torch.no_grad():
            for change in (1.0, 1.2):  # G must follow the weight in here too
                model.transformer.layers[0][1].fn.weight.mul_(change)
                torch.testing.assert_close(compiled(batch[0]), model(batch[0]))
        return
    want = gradients(model, *batch, dtype=torch.float32)
    got = gradients(compiled, *batch, dtype=torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_one_compiled_graph_for_any_number_of_tokens():
    def layer(x, w_qkv, weight):
        return ista(x + mssa(x, w_qkv, heads=4), weight)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    w_qkv, weight = (0.05 * torch.randn(256, 256, device="cuda") for _ in range(2))
    leaves = [w_qkv.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()]
    for n in (150, 197, 333):
        x = torch.randn(4, n, 256, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn_like(x)
        with torch._dynamo.config.patch(error_on_recompile=n != 150):
            y = compiled(x, *leaves)
        wide = [t.detach().double().requires_grad_() for t in leaves]

        def everything(y, leaves, dy=dy):
            dw_qkv, dweight = torch.autograd.grad(y, leaves, dy.to(y.dtype))
            return {"y": y, "dw_qkv": dw_qkv, "dweight": dweight}

        plain = everything(layer(x, *leaves), leaves)
        exact = everything(layer(x.double(), *wide), wide)
        assert_as_close_as_plain(everything(y, leaves), plain, exact, n)


def test_a_training_step_goes_into_a_cuda_graph():
    torch.manual_seed(0)
    model = fused_copy(small_crate())
    other = copy.deepcopy(model)
    x, labels = images()
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True, capturable=True)
        for m in (model, other)
    ]

    def step(m, optimizer):
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(m, x, labels)
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            for _ in range(2):
                step(m, optimizer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, optimizers[0])
    for _ in range(3):
        graph.replay()
        eager = step(other, optimizers[1])
        torch.cuda.synchronize()
        assert torch.equal(captured, eager)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_less_memory_than_unfused():
    peaks = []
    plain = small_crate(image_size=64)
    x = torch.randn(32, 3, 64, 64, device="cuda")
    for model in (plain, fused_copy(plain)):
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss_of(model, x, torch.zeros(32, dtype=torch.long, device="cuda")).backward()
            model.zero_grad(set_to_none=True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.5 * peaks[0]


def test_the_device_of_the_tensors_counts():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    w = torch.randn(2, 65, 128, device="cuda:1", dtype=torch.bfloat16)
    x, weight = w.clone().requires_grad_(), torch.randn(128, 128, device="cuda:1").to(w)
    assert torch.cuda.current_device() == 0
    found = [tied_attention(w, heads=2), ista(x, weight), ista(w, weight)]
    found[1].sum().backward()
    want = [
        t.to("cuda:1")
        for t in (tied_attention(w.to("cuda:0"), heads=2), ista(w.to(0), weight.to(0)))
    ]
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1]) and torch.equal(found[2], want[1])
    assert x.grad.isfinite().all() and x.grad.device == w.device


def test_data_parallel_on_all_devices():
    """Each device's share of the batch, as one device computes it. (In float16: the threads of
    DataParallel take autocast's default dtype, whatever the caller's is.)"""
    torch.manual_seed(0)
    model = fused_copy(small_crate())
    devices = torch.cuda.device_count()
    x, labels = images(16)
    shares = list(zip(x.chunk(devices), labels.chunk(devices), strict=True))
    got = gradients(torch.nn.DataParallel(model), x, labels, dtype=torch.float16)
    each = [
        gradients(model, *share, share=len(share[0]) / len(x), dtype=torch.float16)
        for share in shares
    ]
    for a, *parts in zip(got, *each, strict=True):
        torch.testing.assert_close(a, sum(parts))


def test_prepared_inference_is_the_same_captured_too():
    model = fused_copy(small_crate()).eval()
    ready = copy.deepcopy(model)
    prepare_for_inference(ready)
    x, _ = images()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        want = model(x)
        assert torch.equal(ready(x), want) and torch.equal(ready(x), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ready(x)
        graph.replay()
        assert torch.equal(captured, want)


@pytest.mark.parametrize("batch", [1, 3, 12])
def test_prepared_inference_of_few_rows(batch, monkeypatch):
    """One kernel where the CUDA ones are built, but for the largest batch; as accurate, captured
    too, and repeatable."""
    block = pytest.importorskip("crate_kernels.block.cuda_kernels")
    ran = []
    monkeypatch.setattr(
        block, "encoder_of_few", lambda *a, run=block.encoder_of_few: ran.append(1) or run(*a)
    )
    plain = small_crate(dim=384, heads=6).eval()
    ready = fused_copy(plain)
    prepare_for_inference(ready)
    x, _ = images(batch)
    # Kernels that fill fresh memory would keep ours from starting early.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        want = ready(x)
        eager = plain(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ready(x)
        for _ in range(50):  # within autocast, which keeps the head's weight for the graph
            graph.replay()
            assert torch.equal(captured, want)
    if not cuda_extension.against("cuda", torch.cuda.current_device()):
        assert len(ran) == (2 if batch < 12 else 0)
    with torch.no_grad():
        exact = plain.double()(x.double())
    assert_as_close_as_plain({"y": want}, {"y": eager}, {"y": exact})


# ---- CRATE-MAE's decoder


def small_mae():
    torch.manual_seed(0)
    size = {"image_size": 64, "patch_size": 8, "dim": 192, "depth": 1, "heads": 3}
    return MaskedAutoencoder(**size, decoder_depth=3, decoder_heads=3).cuda()


def of_decoder(model, codes, autocast):
    """The predicted patches, and every gradient."""
    model.zero_grad()
    codes = codes.clone().requires_grad_()
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        y = model.forward_decoder(codes)
    (y.double() * torch.arange(y.numel(), device="cuda").view(y.shape).cos()).sum().backward()
    named = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": codes.grad, **{f"d{k}": grad for k, grad in named.items()}}


@pytest.mark.parametrize("autocast", [*HALVES, None], ids=str)
@pytest.mark.parametrize("chained", [True, False])
def test_maes_decoder(chained, autocast):
    """As close to float64 as the published one, by the mean square and the median over batches;
    across its blocks, and block by block, where each is called for a hook."""
    plain = small_mae()
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    assert "3 Decoder" in str(fuse(fused))
    if not chained:
        for block in fused.decoder_blocks:
            block.register_forward_hook(lambda *_: None)
    ratios = {}
    for _ in range(7):
        codes = torch.randn(8, 65, 192, device="cuda")
        got, published = (of_decoder(m, codes, autocast) for m in (fused, plain))
        for name, want in of_decoder(exact, codes.double(), None).items():
            assert got[name].dtype == published[name].dtype
            error, of_plain = ((t[name].double() - want).norm() for t in (got, published))
            floor = 2 * torch.finfo(torch.float32).eps * want.norm()
            ratios.setdefault(name, []).append((error / torch.maximum(of_plain, floor)).item())
    for name, several in ratios.items():
        assert statistics.median(several) <= (3 if name.startswith("d") else 2), (name, several)


def test_maes_decoder_runs_fused():
    model = small_mae()
    fuse(model)
    codes = torch.randn(2, 65, 192, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        _, count = calls(model.forward_decoder, codes)
        assert model.decoder_blocks[0](codes).dtype == torch.bfloat16
    assert count["decoder_block"] == 3


def test_compiled_mae():
    model = small_mae()
    fuse(model)
    compiled = torch.compile(model.forward_decoder, fullgraph=True)
    codes = torch.randn(4, 65, 192, device="cuda")
    exact = copy.deepcopy(model).double().forward_decoder(codes.double())
    with torch.autocast("cuda", torch.bfloat16):
        plain, got = model.forward_decoder(codes), compiled(codes)
    assert_as_close_as_plain({"y": got}, {"y": plain}, {"y": exact})
