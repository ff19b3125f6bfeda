"""fuse / unfuse: what a swap changes (speed) and what it does not (all else)."""

from __future__ import annotations

import copy
import functools
import pickle
import random
from itertools import pairwise

import pytest
import torch
from layers_of_others import (
    DIM,
    DIM_HEAD,
    HEADS,
    Attn,
    Block,
    Sparse,
    like,
    stack,
    tokens,
    types_of,
)
from torch import nn

import crate_kernels
from crate_kernels import models
from crate_kernels.nn import ISTA, MSSA, fuse, unfuse


def tiny_crate(**kwargs):
    torch.manual_seed(0)
    size = {"image_size": 8, "patch_size": 4, "dim": DIM, "depth": 2, "heads": HEADS}
    return models.CRATE(**{**size, "num_classes": 5, "dim_head": DIM_HEAD, **kwargs})


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


# ---- what a swap keeps


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kwargs", [{}, {"heads": 1, "dim_head": DIM}, {"heads": 2, "dim_head": 8}])
def test_outputs_and_gradients_stay(dtype, tolerance, kwargs):
    plain = stack(dtype=dtype, **kwargs)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert [layer.name for layer in report.replaced] == ["0.attn", "0.ff", "1.attn", "1.ff"]
    assert [layer.kind for layer in report.replaced] == ["MSSA", "ISTA"] * 2
    assert not report.skipped
    assert [type(fused[0].attn), type(fused[0].ff)] == [MSSA, ISTA]
    x = tokens(dtype)
    torch.testing.assert_close(fused(x), plain(x), rtol=tolerance, atol=tolerance)
    for got, want in zip(gradients(fused, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_modules_parameters_and_keys_stay():
    model = stack()
    model.eval()
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    state = model.state_dict()
    fuse(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert not any(m.training for m in model.modules())


def test_unfuse_restores_classes_and_bits():
    plain = stack(attn=functools.partial(Attn, dropout=0.3)).train()
    model = copy.deepcopy(plain)
    before, keys = types_of(model), [sorted(vars(m)) for m in model.modules()]
    assert len(fuse(model)) == 4
    assert types_of(model) != before
    report = unfuse(model)
    assert len(report) == 4
    assert str(report) == "restored 2 MSSA, 2 ISTA; skipped 0"
    assert types_of(model) == before
    assert [sorted(vars(m)) for m in model.modules()] == keys
    for mode in (True, False):
        torch.manual_seed(2)
        want = plain.train(mode)(tokens())
        torch.manual_seed(2)
        assert torch.equal(model.train(mode)(tokens()), want)
    assert not unfuse(model)
    assert len(fuse(model)) == 4


def test_state_dicts_cross_both_ways():
    plain, fused = tiny_crate(), tiny_crate()
    fuse(fused)
    for source, target in ((plain, fused), (fused, plain)):
        with torch.no_grad():
            for p in source.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        target.load_state_dict(source.state_dict())
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(target(x), source(x))


def test_an_optimizer_made_before_keeps_training():
    trained = []
    for swap in (False, True):
        model = stack()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(4):
            if swap and step == 1:
                fuse(model)
            optimizer.zero_grad()
            loss = (model(tokens()) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[3] < losses[2] < losses[1] < losses[0]
        trained.append([p.detach() for p in model.parameters()])
    for got, want in zip(*trained, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_hooks_from_before_and_after_fire():
    model = tiny_crate()
    layer = model.transformer.layers[0]
    hits = []

    def note(module, args, output):
        hits.append((module, tuple(output.shape)))

    layer[1].register_forward_hook(note)
    layer[0].fn.qkv.register_forward_hook(note)
    layer[0].fn.register_forward_hook(note)
    want = model(torch.ones(1, 3, 8, 8))
    first = list(hits)
    report = fuse(model)
    layer[1].fn.register_forward_hook(note)
    del hits[:]
    torch.testing.assert_close(model(torch.ones(1, 3, 8, 8)), want)
    # As before, and the later one inside layer[1].
    assert [module for module, _ in hits] == [
        layer[0].fn.qkv,
        layer[0].fn,
        layer[1].fn,
        layer[1],
    ]
    assert [hit for hit in hits if hit[0] is not layer[1].fn] == first
    assert report.replaced[0].reason == "qkv has hooks: runs unfused"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle_of_a_fused_model(clone):
    model = stack()
    fuse(model)
    other = clone(model)
    assert types_of(other) == types_of(model)
    assert torch.equal(other(tokens()), model(tokens()))
    assert len(unfuse(other)) == 4
    assert type(other[0].attn) is Attn
    assert type(model[0].attn) is MSSA


def test_meta_models_swap_and_materialise():
    with torch.device("meta"):
        model = stack(depth=1)
        assert len(fuse(model)) == 2
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    plain = stack(depth=1)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(tokens()), plain(tokens()))


def replica(model):
    """What nn.DataParallel runs on each device: shallow copies whose weights are plain tensors."""
    modules = list(model.modules())
    copies = {m: m._replicate_for_data_parallel() for m in modules}
    for module in modules:
        for name, child in module._modules.items():
            setattr(copies[module], name, copies[child])
        for name, p in module._parameters.items():
            setattr(copies[module], name, None if p is None else p * 1)
    return copies[model]


def test_data_parallel():
    plain = stack()
    wrapped = nn.DataParallel(copy.deepcopy(plain))
    report = fuse(wrapped)
    assert [layer.name for layer in report.replaced][:2] == ["module.0.attn", "module.0.ff"]
    torch.testing.assert_close(wrapped(tokens()), plain(tokens()))
    worker = replica(wrapped.module)
    assert type(worker[0].attn) is MSSA
    assert not list(worker.parameters())
    torch.testing.assert_close(worker(tokens()), plain(tokens()))
    worker(tokens()).square().sum().backward()
    for got, want in zip(wrapped.parameters(), gradients(plain, tokens()), strict=True):
        torch.testing.assert_close(got.grad, want)


def test_autocast_keeps_the_dtypes():
    plain = stack(depth=1, dtype=torch.float32)
    fused = copy.deepcopy(plain)
    fuse(fused)
    outputs = []
    for model in (plain, fused):
        for layer in (model[0].attn, model[0].ff):
            layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(tokens(torch.float32))
    assert [o.dtype for o in outputs] == [torch.bfloat16, torch.float32] * 2
    for got, want in zip(outputs[2:], outputs[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_shared_modules_swap_once():
    block = Block().double()
    model = nn.Sequential(block, nn.Identity(), block)
    model.last = nn.Sequential(block.ff)
    report = fuse(model)
    assert [layer.name for layer in report.replaced] == ["0.attn", "0.ff"]
    assert model.last[0] is block.ff
    assert len(unfuse(model)) == 2


def test_weights_shared_between_layers():
    plain = stack()
    plain[1].ff.weight = plain[0].ff.weight
    plain[1].attn.qkv.weight = plain[0].attn.qkv.weight
    fused = copy.deepcopy(plain)
    assert len(fuse(fused)) == 4
    assert fused[1].ff.weight is fused[0].ff.weight
    for got, want in zip(gradients(fused, tokens()), gradients(plain, tokens()), strict=True):
        torch.testing.assert_close(got, want)


def test_dropout_is_noted_and_kept():
    plain = stack(attn=functools.partial(Attn, dropout=0.5))
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert {layer.reason for layer in report.replaced if layer.kind == "MSSA"} == {
        "dropout 0.5: while training runs on Triton or unfused"
    }
    assert (
        "note: 2 MSSA: dropout 0.5: while training runs on Triton or unfused (0.attn and 1 more)"
        in str(report)
    )
    for mode in (True, False):
        torch.manual_seed(2)
        want = plain.train(mode)(tokens())
        torch.manual_seed(2)
        torch.testing.assert_close(fused.train(mode)(tokens()), want)


def test_fuse_leaves_the_random_state_and_the_gradients():
    model = stack()
    gradients(model, tokens())
    before = [p.grad.clone() for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(fuse(model)) == 4
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.is_grad_enabled()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
def test_compiled_fused_model(training):
    plain = stack(depth=1, dtype=torch.float32).train(training)
    fused = copy.deepcopy(plain)
    fuse(fused)
    targets = []

    def backend(graph, inputs, **kwargs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs, **kwargs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    x = tokens(torch.float32)
    torch.testing.assert_close(compiled(x), plain(x))
    assert [sum(op in t for t in targets) for op in ("tied_attention", "kernels.ista")] == [1, 1]
    compiled(x).square().sum().backward()
    for got, want in zip(fused.parameters(), gradients(plain, x), strict=True):
        torch.testing.assert_close(got.grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_fusing_a_compiled_model_compiles_it_again():
    model = stack(depth=1, dtype=torch.float32)
    graphs = []

    def backend(graph, inputs):
        graphs.append(sum("tied_attention" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = tokens(torch.float32)
    with torch.no_grad():
        want = compiled(x)
        report = fuse(compiled)
        assert [layer.name for layer in report.replaced] == ["_orig_mod.0.attn", "_orig_mod.0.ff"]
        torch.testing.assert_close(compiled(x), want)
    assert graphs == [0, 1]


# ---- the published classes of this package, and einops


def test_models_of_this_package():
    model = tiny_crate()
    report = fuse(model)
    assert str(report) == "replaced 1 PatchEmbedding, 1 Encoder, 2 MSSA, 2 ISTA; skipped 0"
    assert report
    assert report.replaced[0].name == "transformer.layers.0.0.fn"
    again = fuse(model)
    assert not again
    assert {layer.reason for layer in again.skipped} == {"fused already"}
    block = models.MAEEncoderBlock(DIM, HEADS, DIM_HEAD).double()
    want = [block(tokens(), **k) for k in ({}, {"return_attention": True}, {"return_key": True})]
    assert len(fuse(block)) == 3
    got = [block(tokens(), **k) for k in ({}, {"return_attention": True}, {"return_key": True})]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_einops_forward_is_recognised():
    einops = pytest.importorskip("einops")
    namespace = {"torch": torch, "rearrange": einops.rearrange}
    exec(
        "def forward(self, x, return_attention=False, return_key=False):\n"
        "    if return_key:\n"
        "        return self.qkv(x)\n"
        "    w = rearrange(self.qkv(x), 'b n (h d) -> b h n d', h=self.heads)\n"
        "    p = self.attend(torch.matmul(w, w.transpose(-1, -2)) * self.scale)\n"
        "    if return_attention:\n"
        "        return p\n"
        "    out = torch.matmul(self.dropout(p), w)\n"
        "    return self.to_out(rearrange(out, 'b h n d -> b n (h d)'))\n",
        namespace,
    )
    model = stack(attn=like(Attn, forward=namespace["forward"]))
    want = model(tokens())
    assert len(fuse(model)) == 4
    torch.testing.assert_close(model(tokens()), want)
    namespace["rearrange"] = lambda *args, **kwargs: einops.rearrange(*args, **kwargs)
    unfuse(model)
    report = fuse(model)
    assert {layer.reason for layer in report.skipped} == {
        "its forward uses rearrange, which is not torch's or einops' own"
    }


# ---- nothing to do, and bad input


def test_a_model_with_nothing_to_swap():
    for swap, verb in ((fuse, "replaced"), (unfuse, "restored")):
        report = swap(nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2)))
        assert not report
        assert not report.skipped
        assert str(report) == f"{verb} nothing: the model has no layer to swap"


def test_layers_built_fused_have_nothing_to_restore():
    report = unfuse(nn.Sequential(MSSA(DIM, HEADS, DIM_HEAD)))
    assert not report
    assert report.skipped[0].reason == "built as MSSA, not swapped in by fuse"


def test_a_class_changed_after_fuse_is_not_restored():
    model = stack(depth=1)
    fuse(model)
    nn.utils.parametrize.register_parametrization(model[0].ff, "weight", nn.Identity())
    report = unfuse(model)
    assert [layer.name for layer in report.replaced] == ["0.attn"]
    assert report.skipped[0].reason == "its class became ParametrizedISTA after fuse"
    nn.utils.parametrize.remove_parametrizations(model[0].ff, "weight")
    assert len(unfuse(model)) == 1
    assert type(model[0].ff) is Sparse


def test_the_package_exports_both():
    assert crate_kernels.fuse is fuse
    assert crate_kernels.unfuse is unfuse


@pytest.mark.parametrize("swap", [fuse, unfuse])
@pytest.mark.parametrize("model", [3, None, Attn, {"model": 1}], ids=str)
def test_not_a_module(swap, model):
    with pytest.raises(TypeError, match=f"{swap.__name__}: expected model to be a torch.nn.Module"):
        swap(model)


def test_reports_are_frozen():
    report = fuse(stack())
    with pytest.raises(AttributeError):
        report.replaced[0].name = "x"
    assert all(a.name <= b.name for a, b in pairwise(report.replaced))
