"""Encoder: what fuse makes of a published encoder, when it runs layers as one op, what stays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import calls
from torch import nn

from crate_kernels import models, prepare_for_inference
from crate_kernels.models.crate import PreNorm, Transformer
from crate_kernels.nn import ISTA, MSSA, Encoder, fuse, unfuse
from crate_kernels.nn.layers import log_once

DIM, HEADS, DIM_HEAD, DEPTH = 12, 3, 4, 3


def transformer(**kwargs):
    torch.manual_seed(0)
    return Transformer(DIM, DEPTH, HEADS, DIM_HEAD, **kwargs).double()


def tokens(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(2, 5, DIM, dtype=dtype)


def with_gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("memory", ["default", "low"])
def test_a_layer_is_one_op_and_nothing_else_changes(memory):
    plain = transformer()
    fused = copy.deepcopy(plain)
    report = fuse(fused, memory=memory)
    assert str(report) == f"replaced 1 Encoder, {DEPTH} MSSA, {DEPTH} ISTA; skipped 0"
    assert type(fused) is Encoder and fused.memory == memory
    want, got = with_gradients(plain, tokens()), with_gradients(fused, tokens())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert calls(fused, tokens())[1] == {"crate_block": DEPTH}
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert fused.depth == DEPTH  # what the published module holds besides


def test_memory_may_be_changed_and_is_checked():
    model = transformer()
    fuse(model)
    assert model.memory == "default"
    assert not fuse(model, memory="low")
    assert model.memory == "low"
    assert not fuse(model)
    assert model.memory == "low"
    for call in (lambda: fuse(model, memory="none"), lambda: Encoder([], memory="little")):
        with pytest.raises(ValueError, match=r"expected memory to be one of \('default', 'low'\)"):
            call()


def test_unfuse_copy_and_pickle():
    model = transformer()
    want = model(tokens())
    fuse(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is Encoder
        torch.testing.assert_close(other(tokens()), want)
    before = set(vars(transformer())) | {"memory"}
    vars(model)["memory"] = 128  # the published module's own, if it has one
    assert model.memory == "default"
    assert str(unfuse(model)) == f"restored 1 Encoder, {DEPTH} MSSA, {DEPTH} ISTA; skipped 0"
    assert type(model) is Transformer and set(vars(model)) == before and model.memory == 128
    torch.testing.assert_close(model(tokens()), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_of_the_unfused_model(dtype):
    plain = transformer().float()
    fused = copy.deepcopy(plain)
    fuse(fused)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = plain(tokens(dtype)), fused(tokens(dtype))
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)  # bfloat16 through three layers


HOOKED = ["layers.1.0", "layers.1.0.norm", "layers.1.1.fn", "layers.1.0.fn.qkv", "layers.1.0.fn"]


@pytest.mark.parametrize("name", HOOKED)
def test_a_hooked_layer_runs_module_by_module(name):
    model = transformer()
    want = model(tokens())
    fuse(model)
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[2]))
    y, count = calls(model, tokens())
    assert len(seen) == 1 and count["crate_block"] == DEPTH - 1
    torch.testing.assert_close(y, want)
    handle.remove()
    assert calls(model, tokens())[1] == {"crate_block": DEPTH}


def test_an_observer_sees_every_layer_and_stops_none_from_being_one_op():
    model = transformer()
    fuse(model)
    seen, model.layers[1][0].norm.eps = [], 1e-3  # the second layer runs module by module
    want = model(tokens())
    with model.observed(lambda *args: seen.append(args)):
        y, count = calls(model, tokens())
        model(tokens(), return_attention=True)
    assert count["crate_block"] == DEPTH - 1 and torch.equal(y, want)
    assert [i for _, i, _, _ in seen] == list(range(DEPTH))
    x = tokens()
    for encoder, i, before, after in seen:
        assert encoder is model and torch.equal(before, x)
        x = after
        attn, ff = model.layers[i]
        torch.testing.assert_close(after, ff(attn(before) + before))
    assert torch.equal(x, want)
    model(tokens())
    assert len(seen) == DEPTH and "_observers" not in vars(model)


def test_dropout_runs_module_by_module_while_training():
    model = transformer(dropout=0.5)
    report = fuse(model)
    (encoder,) = [layer for layer in report.replaced if layer.kind == "Encoder"]
    assert encoder.reason.endswith(f"{DEPTH} of {DEPTH} layers run MSSA and ISTA apart")
    assert "crate_block" not in calls(model, tokens())[1]
    assert calls(model.eval(), tokens())[1] == {"crate_block": DEPTH}


def change_eps(model):
    model.layers[0][1].norm.eps = 1e-3


def drop_norms_bias(model):
    model.layers[0][0].norm = nn.LayerNorm(DIM, bias=False).double()


def replace_norm(model):
    model.layers[0][0].norm = nn.Identity()


def replace_forward(model):
    step = model.layers[0][1]
    step.forward = lambda x: 2 * step.fn(step.norm(x))


class Halved(PreNorm):
    def forward(self, x, **kwargs):
        return 0.5 * self.fn(self.norm(x), **kwargs)


def change_class(model):
    model.layers[0][0].__class__ = Halved


CHANGES = [change_eps, drop_norms_bias, replace_norm, replace_forward, change_class]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_op_would_pass_over_runs_module_by_module(change):
    model = transformer()
    fuse(model)
    plain = copy.deepcopy(model)
    for m in (model, plain):
        change(m)
    want = plain.plain_forward(tokens())
    y, count = calls(model, tokens())
    assert count["crate_block"] == DEPTH - 1
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("affine", [True, False])
def test_layers_with_rms_norm_run_mssa_and_ista_by_themselves(affine, caplog):
    plain = transformer()
    for step in (step for pair in plain.layers for step in pair):
        step.norm = nn.RMSNorm(DIM, eps=1e-6, elementwise_affine=affine).double()
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert [type(step.fn) for pair in fused.layers for step in pair] == [MSSA, ISTA] * DEPTH
    reason = "its attention norm is no plain nn.LayerNorm"
    assert f"{reason}: {DEPTH} of {DEPTH} layers run MSSA and ISTA apart" in str(report)
    log_once.cache_clear()
    for a, b in zip(with_gradients(fused, tokens()), with_gradients(plain, tokens()), strict=True):
        torch.testing.assert_close(a, b)
    assert caplog.messages == [f"a layer of an Encoder runs unfused: {reason}"]
    assert calls(fused, tokens())[1] == {"tied_attention": DEPTH, "ista": DEPTH}
    prepare_for_inference(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(tokens()), plain(tokens()))


def test_eps_of_zero_and_norms_of_another_dtype_run_module_by_module():
    for dtype, eps in ((torch.float64, 0.0), (torch.bfloat16, 1e-5)):
        model = transformer().to(dtype)
        for attn, ff in model.layers:
            attn.norm.eps = ff.norm.eps = eps
            if dtype == torch.bfloat16:
                attn.norm.float(), ff.norm.float()
        fuse(model)
        want = model.plain_forward(tokens(dtype))
        y, count = calls(model, tokens(dtype))
        assert "crate_block" not in count
        torch.testing.assert_close(y, want)


def test_flags_go_to_the_attention():
    block = models.MAEEncoderBlock(DIM, HEADS, DIM_HEAD).double()
    want = [block(tokens(), **k) for k in ({}, {"return_attention": True}, {"return_key": True})]
    fuse(block)
    assert type(block) is Encoder
    got = [block(tokens(), **k) for k in ({}, {"return_attention": True}, {"return_key": True})]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_built_directly():
    def pair():
        return PreNorm(DIM, MSSA(DIM, HEADS, DIM_HEAD)), PreNorm(DIM, ISTA(DIM))

    encoder = Encoder([pair(), pair()], memory="low").double()
    want = encoder.plain_forward(tokens())
    y, count = calls(encoder, tokens())
    assert count == {"crate_block": 2}
    torch.testing.assert_close(y, want)
    assert unfuse(encoder).skipped[0].reason == "built as Encoder, not swapped in by fuse"
    halved = Halved(DIM, MSSA(DIM, HEADS, DIM_HEAD))
    with pytest.raises(ValueError, match="Halved is a subclass of PreNorm"):
        Encoder([(halved, PreNorm(DIM, ISTA(DIM)))])


# ---- lookalikes


def like_transformer(forward):
    def init(self, layers):
        nn.Module.__init__(self)
        self.layers = layers

    names = {"__init__": init, "forward": forward, "__module__": __name__}
    return type("Lookalike", (nn.Module,), names)(transformer().layers)


def twice(self, x):
    for attn, ff in self.layers:
        x = ff(attn(x) + x + x)
    return x


def swapped(self, x):
    for attn, ff in self.layers:
        x = attn(ff(x) + x)
    return x


def residual(self, x):
    for attn, ff in self.layers:
        x = attn(x) + x
        x = ff(x) + x
    return x


def counting(self, x):
    for attn, ff in self.layers:
        x = ff(attn(x) + x)
        self.calls = 1
    return x


def unrolled(self, x):
    (a, f), (b, g), (c, h) = self.layers
    x = f(a(x) + x)
    x = g(b(x) + x)
    return h(c(x) + x)


def first_three(self, x):
    n = 0
    for attn, ff in self.layers:
        n = n + 1
        x = ff(attn(x) + x) * (1 + (n - 1) * (n - 2) * (n - 3))
    return x


def exits_early(self, x, return_attention=False, return_key=False):
    for attn, ff in self.layers:
        if return_attention:
            return x
        x = ff(attn(x) + x)
        return_attention = return_key + 1
    return x


@pytest.mark.parametrize("forward", [first_three, exits_early])
def test_deep_lookalikes_stay(forward):
    layers = nn.ModuleList([*transformer().layers, *transformer().layers])
    model = like_transformer(forward)
    model.layers = layers
    want = model(tokens())
    assert [layer.kind for layer in fuse(model).skipped] == ["Encoder"]
    torch.testing.assert_close(model(tokens()), want)


def test_an_unrolled_encoder_is_one_for_its_own_depth():
    model = like_transformer(unrolled)
    want = model(tokens())
    fuse(model)
    torch.testing.assert_close(model(tokens()), want)


def test_layers_that_lack_a_step_are_no_encoder():
    model = transformer()
    model.layers[0][1] = None
    assert "Encoder" not in {layer.kind for layer in fuse(model).replaced}


def as_published(self, x):
    depth = 0  # noqa: F841
    for attn, ff in self.layers:
        grad_x = attn(x) + x

        x = ff(grad_x)
    return x


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (twice, "its forward computes something else than the published one"),
        (swapped, "its forward computes something else than the published one"),
        (residual, "its forward computes something else than the published one"),
        (counting, "its forward uses calls"),
    ],
)
def test_what_only_looks_like_an_encoder_stays(forward, says):
    model = like_transformer(forward)
    want = model(tokens())
    report = fuse(model)
    assert [(layer.kind, layer.reason) for layer in report.skipped] == [("Encoder", says)]
    assert len(report.replaced) == 2 * DEPTH and type(model).__name__ == "Lookalike"
    torch.testing.assert_close(model(tokens()), want)


def test_the_published_words_are_recognised():
    model = like_transformer(as_published)
    want = model(tokens())
    assert not fuse(model).skipped
    assert type(model) is Encoder
    torch.testing.assert_close(model(tokens()), want)


class Scaled(nn.Module):
    """A step that looks like PreNorm."""

    def __init__(self, step):
        super().__init__()
        self.norm, self.fn = step.norm, step.fn

    def forward(self, x, **kwargs):
        return self.fn(self.norm(x) * 2, **kwargs)


class Subclass(Transformer):
    pass


def test_other_steps_and_subclasses_stay():
    model = transformer()
    model.layers[2][0] = Scaled(model.layers[2][0])
    (skipped,) = fuse(model).skipped
    assert skipped.reason == (
        "layers.2.0: its forward computes something else than the published one"
    )
    model = transformer()
    model.layers[1][1].fn.forward = model.layers[1][1].fn.forward
    reasons = {layer.kind: layer.reason for layer in fuse(model).skipped}
    assert reasons["Encoder"] == "layers.1.1: expected fn to be a swapped ISTA, got FeedForward"
    (skipped,) = fuse(Subclass(DIM, DEPTH, HEADS, DIM_HEAD)).skipped
    assert skipped.reason == "Subclass is a subclass of Transformer"


@pytest.mark.parametrize("train", [False, True])
def test_compiles_into_one_graph(train):
    torch.compiler.reset()
    model = transformer()
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if train:
        want, got = with_gradients(model, tokens()), with_gradients(compiled, tokens())
    else:
        with torch.no_grad():
            want, got = [model(tokens())], [compiled(tokens())]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
