"""AlphaEncoder: what fuse makes of CRATE-alpha's encoder, what runs as its modules, what stays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import assert_as_close_as_plain, calls
from test_fuse import replica
from torch import nn

from crate_kernels.models.alpha import AlphaTransformer
from crate_kernels.models.crate import PreNorm
from crate_kernels.nn import (
    MSSA,
    AlphaEncoder,
    AlphaStep,
    OvercompleteFeedForward,
    OvercompleteISTA,
    fuse,
    unfuse,
)
from crate_kernels.nn.layers import log_once
from crate_kernels.whitebox import trace

DIM, HEADS, DIM_HEAD, DEPTH = 12, 3, 4, 3
STEPS = 2 * DEPTH


def transformer(dtype=torch.float64, scaled=True, **kwargs):
    torch.manual_seed(0)
    kwargs = {"layer_scale": 0.5 if scaled else None, **kwargs}
    model = AlphaTransformer(DIM, DEPTH, HEADS, DIM_HEAD, **kwargs).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("norm.weight", "norm.bias", "layer_scale")):
                p.add_(0.2 * torch.randn_like(p))
    return model


def tokens(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(2, 5, DIM, dtype=dtype)


def with_gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("memory", ["default", "low"])
def test_one_op_between_two_steps_and_nothing_else_changes(scaled, memory):
    plain = transformer(scaled=scaled)
    fused = copy.deepcopy(plain)
    report = fuse(fused, memory=memory)
    says = f"replaced 1 AlphaEncoder, {DEPTH} MSSA, {DEPTH} OvercompleteISTA; skipped 0"
    assert str(report) == says and type(fused) is AlphaEncoder
    assert {pair[1].fn.memory for pair in fused.layers} == {memory}
    same(with_gradients(fused, tokens()), with_gradients(plain, tokens()))
    with torch.no_grad():
        count = calls(fused, tokens())[1]
    assert count == {
        "residual_norm": STEPS,
        "tied_attention": DEPTH,
        "overcomplete_ista": DEPTH,
    }
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert fused.depth == DEPTH  # what the published module holds besides
    assert {layer.kind for layer in fuse(fused).skipped} == {
        "AlphaEncoder",
        "MSSA",
        "OvercompleteISTA",
    }


def test_unfuse_copy_and_pickle():
    model = transformer()
    want, before = model(tokens()), set(vars(model))
    fuse(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is AlphaEncoder
        torch.testing.assert_close(other(tokens()), want)
    says = f"restored 1 AlphaEncoder, {DEPTH} MSSA, {DEPTH} OvercompleteISTA; skipped 0"
    assert str(unfuse(model)) == says
    assert type(model) is AlphaTransformer and set(vars(model)) == before
    assert torch.equal(model(tokens()), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [True, False])
def test_autocast_gives_the_dtypes_of_the_unfused_model(dtype, autocast, scaled):
    """Of the stream between the layers as of what leaves the encoder."""
    plain = transformer(torch.float32, scaled)
    fused = copy.deepcopy(plain)
    fuse(fused)
    seen = []
    with torch.autocast("cpu", autocast), fused.observed(lambda *args: seen.append(args)):
        want, got = plain(tokens(dtype)), fused(tokens(dtype))
        for (_, i, x, y), (attn, ff) in zip(seen, plain.layers, strict=True):
            published = attn(x) + x
            assert (ff(published) + published).dtype == y.dtype, i
    assert got.dtype == want.dtype
    exact = copy.deepcopy(plain).double()(tokens(dtype).double())
    assert_as_close_as_plain({"y": got}, {"y": want}, {"y": exact})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_autocast(dtype):
    plain = transformer(dtype)
    fused = copy.deepcopy(plain)
    fuse(fused)
    want, got = plain(tokens(dtype)), fused(tokens(dtype))
    assert got.dtype == want.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=16 * unit, atol=16 * unit)


# ---- what runs module by module


HOOKED = ["layers.1.0", "layers.1.0.norm", "layers.1.1.fn", "layers.1.0.fn", "layers.1.1"]


@pytest.mark.parametrize("name", HOOKED)
def test_a_hooked_step_runs_module_by_module(name, caplog):
    model = transformer()
    want = with_gradients(model, tokens())
    fuse(model)
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[2]))
    log_once.cache_clear()
    y, count = calls(model, tokens())
    assert len(seen) == 1 and count["residual_norm"] == STEPS - 1
    torch.testing.assert_close(y, want[0])
    same(with_gradients(model, tokens()), want)
    (message,) = caplog.messages
    assert message.startswith("AlphaEncoder: a step runs unfused: its ")
    handle.remove()
    assert calls(model, tokens())[1]["residual_norm"] == STEPS


@pytest.mark.parametrize("name", [*HOOKED, "layers.1.0.fn.qkv", "layers.1.0.fn.to_out.1"])
def test_a_hook_sees_the_dtypes_of_the_unfused_model(name):
    plain = transformer(torch.float32)
    fused = copy.deepcopy(plain)
    fuse(fused)
    seen = []
    for model in (plain, fused):
        model.get_submodule(name).register_forward_hook(
            lambda m, args, y: seen.append((args[0].dtype, y.dtype))
        )
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens(torch.float32))
    assert len(seen) == 2 and seen[0] == seen[1]


def test_hooks_on_all_modules_are_called():
    model = transformer()
    want, seen = model(tokens()), []
    fuse(model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        y, count = calls(model, tokens())
    finally:
        handle.remove()
    assert seen.count(nn.LayerNorm) == seen.count(AlphaStep) == STEPS
    assert "residual_norm" not in count
    torch.testing.assert_close(y, want)


def test_drop_path_runs_module_by_module_while_training():
    model = transformer(drop_path=0.5)
    plain = copy.deepcopy(model)
    report = fuse(model)
    note = f"DropPath 0.25 is active while training: {STEPS - 2} of {STEPS} steps run norm and"
    assert note in str(report)
    torch.manual_seed(2)
    want = with_gradients(plain, tokens())
    torch.manual_seed(2)
    same(with_gradients(model, tokens()), want)
    assert calls(model, tokens())[1]["residual_norm"] == 2  # the first layer's is 0
    assert calls(model.eval(), tokens())[1]["residual_norm"] == STEPS
    torch.testing.assert_close(model(tokens()), plain.eval()(tokens()))


def test_dropout_is_the_attentions():
    model = transformer(dropout=0.5)
    plain = copy.deepcopy(model)
    fuse(model)
    torch.manual_seed(2)
    want = with_gradients(plain, tokens())
    torch.manual_seed(2)
    same(with_gradients(model, tokens()), want)


class Halved(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.norm, self.fn = step.norm, step.fn

    def forward(self, x):
        return 0.5 * self.fn(self.norm(x))


def drop_norms_bias(model):
    model.layers[1][0].norm = nn.LayerNorm(DIM, bias=False).double()


def replace_norm(model):
    model.layers[1][0].norm = nn.RMSNorm(DIM).double()


def replace_norms_forward(model):
    norm = model.layers[1][1].norm
    norm.forward = lambda x: 2 * nn.functional.layer_norm(x, (DIM,))


def replace_forward(model):
    step = model.layers[1][1]
    step.forward = lambda x: 2 * step.fn(step.norm(x))


def parametrize(model):
    norm = model.layers[1][1].norm
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())


def change_step(model):
    model.layers[1][0] = Halved(model.layers[1][0])


def change_fn(model):
    model.layers[1][1].fn = nn.Sequential(model.layers[1][1].fn, nn.Tanh())


def eps_of_zero(model):
    model.layers[1][0].norm.eps = 0.0


def one_scale_for_all(model):
    scale = model.layers[1][0].layer_scale
    model.layers[1][0].layer_scale = nn.Parameter(scale.detach()[:1])


CHANGES = [drop_norms_bias, replace_norm, replace_norms_forward, replace_forward, parametrize]
CHANGES += [change_step, change_fn, eps_of_zero, one_scale_for_all]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_op_would_pass_over_runs_module_by_module(change):
    model = transformer()
    fuse(model)
    change(model)
    want = model.plain_forward(tokens())
    y, count = calls(model, tokens())
    assert count["residual_norm"] == STEPS - 1
    torch.testing.assert_close(y, want)


def test_norms_of_another_dtype_run_module_by_module():
    model = transformer(torch.bfloat16)
    for step in (step for pair in model.layers for step in pair):
        step.norm.float()
    fuse(model)
    want = model.plain_forward(tokens(torch.bfloat16))
    y, count = calls(model, tokens(torch.bfloat16))
    assert "residual_norm" not in count
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want)


# ---- what is seen, and where it runs


def test_an_observer_sees_every_layer_and_stops_none_from_being_fused():
    model = transformer()
    fuse(model)
    seen, model.layers[1][0].norm.eps = [], 0.0  # a step that runs module by module
    want = model(tokens())
    with model.observed(lambda *args: seen.append(args)):
        y, count = calls(model, tokens())
    assert count["residual_norm"] == STEPS - 1 and torch.equal(y, want)
    assert [i for _, i, _, _ in seen] == list(range(DEPTH))
    x = tokens()
    for encoder, i, before, after in seen:
        assert encoder is model and torch.equal(before, x)
        x, (attn, ff) = after, model.layers[i]
        published = attn(before) + before
        torch.testing.assert_close(after, ff(published) + published)
    assert torch.equal(x, want)
    model(tokens())
    assert len(seen) == DEPTH and "_observers" not in vars(model)


@pytest.mark.parametrize("holder", [nn.Identity, nn.Sequential])
def test_a_trace_of_a_fused_model_gives_the_same_numbers(holder):
    model = transformer() if holder is nn.Identity else nn.Sequential(transformer())
    with trace(model, attention=True) as before:
        model(tokens())
    fuse(model)
    with trace(model, attention=True) as after:
        y, count = calls(model, tokens())
    assert count["residual_norm"] == STEPS and torch.equal(model(tokens()), y)
    prefix = "" if holder is nn.Identity else "0."
    assert after.layers == before.layers == [f"{prefix}layers.{i}.0.fn" for i in range(DEPTH)]
    assert after.skipped == before.skipped == []
    for layer in range(DEPTH):
        for measure in ("coding_rate", "compressed_rates"):
            torch.testing.assert_close(after.values(measure, layer), before.values(measure, layer))
        torch.testing.assert_close(after.attention(layer), before.attention(layer))
        with pytest.raises(ValueError, match="a layer with sparsity measured"):
            after.values("sparsity", layer)
    with before:  # a block before, a block after fuse
        model(tokens())
    assert before.table().rows[0].samples == 4


def test_data_parallel_and_replicas():
    plain = transformer()
    wrapped = nn.DataParallel(copy.deepcopy(plain))
    fuse(wrapped)
    worker = replica(wrapped.module)
    y, count = calls(worker, tokens())
    assert type(worker) is AlphaEncoder and count["residual_norm"] == STEPS
    torch.testing.assert_close(y, plain(tokens()))
    worker(tokens()).square().sum().backward()
    plain(tokens()).square().sum().backward()
    same([p.grad for p in wrapped.parameters()], [p.grad for p in plain.parameters()])


def test_meta_models_swap_and_materialise():
    with torch.device("meta"):
        model = AlphaTransformer(DIM, DEPTH, HEADS, DIM_HEAD, layer_scale=0.5)
        assert len(fuse(model)) == 1 + STEPS
        assert model(torch.empty(2, 5, DIM)).shape == (2, 5, DIM)
    model.to_empty(device="cpu").double()
    plain = transformer()
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(tokens()), plain(tokens()))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("scaled", [True, False])
def test_compiles_into_one_graph(train, scaled):
    torch.compiler.reset()
    model = transformer(scaled=scaled)
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if train:
        same(with_gradients(compiled, tokens()), with_gradients(model, tokens()))
    else:
        with torch.no_grad():
            same([compiled(tokens())], [model(tokens())])


# ---- built by hand, and lookalikes


def test_built_directly():
    def pair(step):
        return step(DIM, MSSA(DIM, HEADS, DIM_HEAD)), step(DIM, OvercompleteISTA(DIM))

    encoder = AlphaEncoder([pair(AlphaStep), pair(PreNorm)]).double()
    want = encoder.plain_forward(tokens())
    y, count = calls(encoder, tokens())
    assert count["residual_norm"] == 4
    torch.testing.assert_close(y, want)
    assert unfuse(encoder).skipped[0].reason == "built as AlphaEncoder, not swapped in by fuse"
    with pytest.raises(ValueError, match=r"AlphaEncoder: expected steps that .* got one where"):
        AlphaEncoder([(Halved(encoder.layers[0][0]), encoder.layers[0][1])])


def like_transformer(forward, layers=None):
    def init(self, layers):
        nn.Module.__init__(self)
        self.layers = layers

    names = {"__init__": init, "forward": forward, "__module__": __name__}
    return type("Lookalike", (nn.Module,), names)(layers or transformer().layers)


def as_published(self, x):
    for attn, ff in self.layers:
        grad_x = attn(x) + x

        x = ff(grad_x) + grad_x
    return x


def of_crate(self, x):
    for attn, ff in self.layers:
        x = ff(attn(x) + x)
    return x


def swapped(self, x):
    for attn, ff in self.layers:
        x = ff(x) + x
        x = attn(x) + x
    return x


def counting(self, x):
    for attn, ff in self.layers:
        x = attn(x) + x
        x = ff(x) + x
        self.calls = 1
    return x


def flagged(self, x, return_attention=False, return_key=False):
    for attn, ff in self.layers:
        x = attn(x) + x
        x = ff(x) + x
    return x


def published_steps():
    """As somebody else writes them: PreNorm's, without scales."""
    torch.manual_seed(0)
    layers = nn.ModuleList()
    for attn, ff in transformer(scaled=False).layers:
        dictionary = OvercompleteFeedForward(DIM)
        dictionary.load_state_dict(ff.fn.state_dict())
        layers.append(nn.ModuleList([PreNorm(DIM, attn.fn), PreNorm(DIM, dictionary)]))
    return layers.double()


@pytest.mark.parametrize("layers", [None, published_steps])
def test_the_published_words_are_recognised(layers):
    model = like_transformer(as_published, layers and layers())
    want = with_gradients(model, tokens())
    assert not fuse(model).skipped
    assert type(model) is AlphaEncoder
    same(with_gradients(model, tokens()), want)
    assert calls(model, tokens())[1]["residual_norm"] == STEPS
    unfuse(model)
    assert type(model).__name__ == "Lookalike"


ELSE = "its forward computes something else than the published one"


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (of_crate, ELSE),
        (swapped, ELSE),
        (counting, "its forward uses calls"),
        (flagged, "its forward takes other arguments"),
    ],
)
def test_what_only_looks_like_an_encoder_stays(forward, says):
    model = like_transformer(forward)
    want = model(tokens())
    report = fuse(model)
    assert [(layer.kind, layer.reason) for layer in report.skipped] == [("AlphaEncoder", says)]
    assert len(report.replaced) == STEPS and type(model).__name__ == "Lookalike"
    torch.testing.assert_close(model(tokens()), want)


def test_other_steps_stay():
    model = transformer()
    model.layers[2][0] = Halved(model.layers[2][0])
    (skipped,) = fuse(model).skipped
    assert skipped.reason == f"layers.2.0: {ELSE}"
    model = transformer()
    model.layers[1][1].fn.forward = model.layers[1][1].fn.forward
    reasons = {layer.kind: layer.reason for layer in fuse(model).skipped}
    assert reasons["AlphaEncoder"] == (
        "layers.1.1: expected fn to be a swapped OvercompleteISTA, got OvercompleteFeedForward"
    )
    model = transformer()
    model.layers[0][0].more = nn.Linear(2, 2)
    (skipped,) = fuse(model).skipped
    assert skipped.reason.startswith("layers.0.0: expected ['fn', 'layer_scale', 'norm'] as")
