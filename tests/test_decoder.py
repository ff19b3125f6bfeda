"""Decoder: what fuse makes of CRATE-MAE's decoder, across its blocks and block by block."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import HALVES, assert_as_close_as_plain, calls
from test_alpha_encoder import Halved, same, with_gradients
from test_fuse import replica
from torch import nn

from crate_kernels import models
from crate_kernels.models.crate import PreNorm
from crate_kernels.models.mae import Dictionary
from crate_kernels.nn import MSSA, Attention, Decoder, fuse, unfuse
from crate_kernels.nn.decoder import run_decoders
from crate_kernels.nn.layers import log_once
from crate_kernels.whitebox import trace

DIM, HEADS, DIM_HEAD, DEPTH = 12, 3, 4, 3
STEPS = 2 * DEPTH


class Blocks(nn.ModuleList):
    """A decoder by itself, as models.MaskedAutoencoder runs it."""

    def forward(self, x):
        return run_decoders(self, x)


def one_by_one(blocks, x):
    """As the published model runs them."""
    for block in blocks:
        x = block(x)
    return x


def perturbed(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm." in name:
                p.add_(0.2 * torch.randn_like(p))
    return model


def decoder(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    blocks = [models.MAEDecoderBlock(DIM, HEADS, DIM_HEAD, **kwargs) for _ in range(DEPTH)]
    return perturbed(Blocks(blocks).to(dtype))


def tokens(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(2, 5, DIM, dtype=dtype)


def fused_copy(model):
    fused = copy.deepcopy(model)
    fuse(fused)
    return fused


def test_one_op_a_layer_and_nothing_else_changes():
    plain = decoder()
    fused = copy.deepcopy(plain)
    assert str(fuse(fused)) == f"replaced {DEPTH} Decoder, {DEPTH} MSSA; skipped 0"
    assert all(type(block) is Decoder for block in fused)
    want = with_gradients(plain, tokens())
    same(with_gradients(fused, tokens()), want)
    with torch.no_grad():
        y, count = calls(fused, tokens())
        assert count == {"decoder_block": DEPTH}
        y, count = calls(lambda x: one_by_one(fused, x), tokens())
        assert count == {"decoder_block": DEPTH}
    torch.testing.assert_close(y, want[0])
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert fused[0].dim == DIM  # what the published module holds besides
    again = fuse(fused)
    assert [layer.kind for layer in again.skipped] == ["MSSA"] * DEPTH + ["Decoder"] * DEPTH
    assert {layer.reason for layer in again.skipped} == {"fused already"} and not again


def test_unfuse_copy_and_pickle():
    model = decoder()
    want, before = model(tokens()), [set(vars(m)) for m in model.modules()]
    fuse(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is Decoder
        torch.testing.assert_close(other(tokens()), want)
        assert calls(other, tokens())[1]["decoder_block"] == DEPTH
    assert str(unfuse(model)) == f"restored {DEPTH} Decoder, {DEPTH} MSSA; skipped 0"
    assert type(model[0]) is models.MAEDecoderBlock
    assert [set(vars(m)) for m in model.modules()] == before
    assert torch.equal(model(tokens()), want)


def results(model, x, run, autocast):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = run(model, x)
    (y * torch.arange(y.numel(), device=y.device).view(y.shape).cos()).sum().backward()
    grads = {f"d{name}": p.grad.clone() for name, p in model.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads}


@pytest.mark.parametrize("autocast", [*HALVES, None], ids=str)
@pytest.mark.parametrize("run", [run_decoders, one_by_one])
def test_as_close_as_plain_pytorch(run, autocast):
    torch.manual_seed(0)
    blocks = [models.MAEDecoderBlock(48, 3, 16) for _ in range(DEPTH)]
    plain = perturbed(nn.ModuleList(blocks))
    fused, exact = fused_copy(plain), copy.deepcopy(plain).double()
    x = torch.randn(4, 17, 48)
    got, published = results(fused, x, run, autocast), results(plain, x, one_by_one, autocast)
    assert_as_close_as_plain(got, published, results(exact, x.double(), one_by_one, None))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("autocast", [*HALVES, None], ids=str)
def test_the_dtypes_are_those_of_the_unfused_model(dtype, autocast):
    plain = decoder(torch.float32 if autocast is not None else dtype)
    fused = fused_copy(plain)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        want = plain(tokens(dtype))
        for run in (run_decoders, one_by_one):
            y = run(fused, tokens(dtype))
            assert y.dtype == want.dtype == (autocast or dtype)
            exact = copy.deepcopy(plain).double()(tokens(dtype).double())
            assert_as_close_as_plain({"y": y}, {"y": want}, {"y": exact})


# ---- what runs module by module


HOOKED = ["1.layers.0.0", "1.layers.0.0.norm", "1.layers.0.0.fn", "1.layers.0.1", "1.layers.0.1.fn"]
HOOKED += ["1.layers.0.1.norm", "1.layers.0.1.fn.qkv", "1.layers.0.1.fn.to_out.1"]


@pytest.mark.parametrize("name", HOOKED)
def test_a_hooked_step_runs_module_by_module(name, caplog):
    model = decoder()
    want = with_gradients(model, tokens())
    fuse(model)
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[2]))
    log_once.cache_clear()
    y, count = calls(model, tokens())
    assert len(seen) == 1 and count["residual_norm"] == 1 and count["decoder_block"] == DEPTH - 1
    torch.testing.assert_close(y, want[0])
    same(with_gradients(model, tokens()), want)
    assert any(m.startswith("Decoder: a step runs unfused: ") for m in caplog.messages)
    handle.remove()
    assert calls(model, tokens())[1]["decoder_block"] == DEPTH


@pytest.mark.parametrize("name", ["1", *HOOKED])
def test_a_hook_sees_the_dtypes_of_the_unfused_model(name):
    plain = decoder(torch.float32)
    seen = []
    for model in (plain, fused_copy(plain)):
        model.get_submodule(name).register_forward_hook(
            lambda m, args, y: seen.append((args[0].dtype, y.dtype))
        )
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens(torch.float32))
    assert len(seen) == 2 and seen[0] == seen[1]


def test_a_hook_on_a_block_and_a_replaced_forward_are_called():
    model = decoder()
    want = model(tokens())
    fuse(model)
    seen, block = [], model[2]
    model[1].register_forward_hook(lambda m, args, y: seen.append(y))
    block.forward = lambda x: seen.append(x) or Decoder.forward(block, x)
    y, count = calls(model, tokens())
    assert torch.equal(*seen) and count["decoder_block"] == DEPTH
    torch.testing.assert_close(y, want)


def test_hooks_on_all_modules_are_called():
    model = decoder()
    want, seen = model(tokens()), []
    fuse(model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        y, count = calls(model, tokens())
    finally:
        handle.remove()
    assert seen.count(nn.LayerNorm) == seen.count(PreNorm) == STEPS
    assert seen.count(Decoder) == DEPTH and not count.keys() & {"decoder_block", "residual_norm"}
    torch.testing.assert_close(y, want)


def test_dropout_is_the_attentions():
    model = decoder(dropout=0.5)
    plain = copy.deepcopy(model)
    fuse(model)
    torch.manual_seed(2)
    want = with_gradients(plain, tokens())
    torch.manual_seed(2)
    same(with_gradients(model, tokens()), want)


def drop_norms_bias(block):
    block.layers[0][1].norm = nn.LayerNorm(DIM, bias=False).double()


def replace_norm(block):
    block.layers[0][0].norm = nn.RMSNorm(DIM).double()


def replace_forward(block):
    step = block.layers[0][1]
    step.forward = lambda x: 2 * step.fn(step.norm(x))


def parametrize(block):
    nn.utils.parametrize.register_parametrization(block.layers[0][0].fn, "weight", nn.Softplus())


def change_step(block):
    block.layers[0][0] = Halved(block.layers[0][0])


def change_dictionary(block):
    block.layers[0][0].fn = nn.Linear(DIM, DIM).double()


def eps_of_zero(block):
    block.layers[0][0].norm.eps = 0.0


CHANGES = [drop_norms_bias, replace_norm, replace_forward, parametrize, change_step]
CHANGES += [change_dictionary, eps_of_zero]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_op_would_pass_over_runs_module_by_module(change):
    model = decoder()
    fuse(model)
    change(model[1])
    want = tokens()
    for block in model:
        want = block.plain_forward(want)
    y, count = calls(model, tokens())
    assert count["residual_norm"] == 1 and count["decoder_block"] == DEPTH - 1
    torch.testing.assert_close(y, want)


def differ_in_eps(block):
    block.layers[0][0].norm.eps = 0.1


def drop_projection(block):
    block.layers[0][1] = PreNorm(DIM, MSSA(DIM, 1, DIM)).double()


def drop_out(block):
    block.layers[0][1].fn.dropout.p = 1.0


@pytest.mark.parametrize("change", [differ_in_eps, drop_projection, drop_out])
def test_what_only_the_op_of_a_layer_does_not_have_runs_step_by_step(change, caplog):
    model = decoder()
    fuse(model)
    change(model[1])
    log_once.cache_clear()
    want = model[2].plain_forward(model[1].plain_forward(model[0].plain_forward(tokens())))
    y, count = calls(model, tokens())
    assert count["residual_norm"] == 2 and count["decoder_block"] == DEPTH - 1
    assert any(m.startswith("Decoder: a layer runs step by step: ") for m in caplog.messages)
    torch.testing.assert_close(y, want)


def kept_elements(model, x):
    """Of the tokens, for the backward pass, with autocast off."""
    found = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: found.setdefault(t.data_ptr(), t) is None or t, lambda t: t
    ):
        model(x)
    return sum(t.numel() for t in found.values() if t.shape == x.shape)


def test_what_is_kept_for_the_backward_pass():
    model = decoder()
    want = with_gradients(model, tokens())
    assert str(fuse(model, memory="low")).startswith(f"replaced {DEPTH} Decoder")
    assert {block.memory for block in model} == {"low"}
    same(with_gradients(model, tokens()), want)
    x = tokens().requires_grad_()
    assert kept_elements(model, x) == 3 * DEPTH * x.numel()  # x, h, o
    fuse(model, memory="default")
    assert kept_elements(model, x) == 4 * DEPTH * x.numel()  # and w
    same(with_gradients(model, tokens()), want)
    with pytest.raises(ValueError, match="Decoder: expected memory to be one of"):
        model[0].memory = "least"
    unfuse(model)
    assert not hasattr(model[0], "memory")


def test_each_gradient_alone():
    plain = decoder()
    fused = fused_copy(plain)
    _, dx, *grads = with_gradients(plain, tokens())
    named = dict(fused.named_parameters())
    for name, want in zip((None, *named), (dx, *grads), strict=True):
        for other, p in named.items():
            p.requires_grad_(other == name)
        x = tokens().requires_grad_(name is None)
        y = fused(x)
        leaf = x if name is None else named[name]
        weights = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()
        (got,) = torch.autograd.grad((y * weights).sum(), leaf)
        torch.testing.assert_close(got, want)


def test_tokens_of_another_width_are_refused():
    model = decoder()
    fuse(model)
    with pytest.raises(ValueError, match=r"decoder_block: expected w_qkv of shape"):
        model(tokens()[..., :8])


def test_a_note_says_what_keeps_steps_unfused():
    model = decoder()
    model[1].layers[0][0].norm = nn.RMSNorm(DIM).double()
    note = "its dictionary norm is no plain nn.LayerNorm: 1 of 2 steps run norm and residual apart"
    assert f"note: 1 Decoder: {note} (1)" in str(fuse(model))


# ---- what is seen, and where it runs


def test_an_observer_sees_every_block():
    model = decoder()
    want = model(tokens())
    fuse(model)
    seen = []
    with model[1].observed(lambda *args: seen.append(args)):
        y, count = calls(model, tokens())
    assert count["decoder_block"] == DEPTH
    torch.testing.assert_close(y, want)
    ((block, i, x, after),) = seen
    assert (block, i) == (model[1], 0)
    torch.testing.assert_close(after, block.plain_forward(x))
    torch.testing.assert_close(x, model[0](tokens()))
    assert "_observers" not in vars(model[1])


def tiny_mae(**options):
    torch.manual_seed(0)
    size = {"image_size": 8, "patch_size": 2, "dim": DIM, "depth": 2, "heads": HEADS}
    return models.MaskedAutoencoder(**size, decoder_depth=2, decoder_heads=2, **options).double()


def test_a_trace_of_a_fused_model_gives_the_same_numbers():
    model = tiny_mae()
    img, mask = torch.randn(3, 3, 8, 8).double(), (torch.arange(16) % 3 > 0).expand(3, 16)
    with trace(model, attention=True) as before:
        model(img, mask=mask)
    fuse(model)
    with trace(model, attention=True) as after:
        _, count = calls(lambda img: model(img, mask=mask), img)
    assert count["decoder_block"] == 2 and count["crate_block"] == 2
    names = [f"decoder_blocks.{i}.layers.0.1.fn" for i in range(2)]
    assert after.layers == before.layers and after.layers[2:] == names
    for layer in range(4):
        for measure in ("coding_rate", "compressed_rates"):
            torch.testing.assert_close(after.values(measure, layer), before.values(measure, layer))
        torch.testing.assert_close(after.attention(layer), before.attention(layer))


def test_replicas():
    plain = decoder()
    wrapped = nn.DataParallel(copy.deepcopy(plain))
    fuse(wrapped)
    worker = replica(wrapped.module)
    y, count = calls(worker, tokens())
    assert type(worker[0]) is Decoder and count["decoder_block"] == DEPTH
    torch.testing.assert_close(y, plain(tokens()))
    worker(tokens()).square().sum().backward()
    plain(tokens()).square().sum().backward()
    same([p.grad for p in wrapped.parameters()], [p.grad for p in plain.parameters()])


def test_meta_models_swap_and_materialise():
    with torch.device("meta"):
        model = decoder(torch.float32)
        assert len(fuse(model)) == 2 * DEPTH
        assert model(torch.empty(2, 5, DIM)).shape == (2, 5, DIM)
    model.to_empty(device="cpu").double()
    plain = decoder()
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(tokens()), plain(tokens()))


@pytest.mark.parametrize("mode", ["train", "eval", "autocast"])
def test_compiles_into_one_graph(mode):
    torch.compiler.reset()
    model = decoder(torch.float32 if mode == "autocast" else torch.float64)
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if mode == "train":
        same(with_gradients(compiled, tokens()), with_gradients(model, tokens()))
        return
    x = tokens(torch.float32 if mode == "autocast" else torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        same([compiled(x)], [model(x)])


# ---- built by hand, and lookalikes


def test_built_directly():
    pair = (PreNorm(DIM, Dictionary(DIM)), PreNorm(DIM, MSSA(DIM, HEADS, DIM_HEAD)))
    model = Decoder([pair, copy.deepcopy(pair)]).double()
    want = model.plain_forward(tokens())
    y, count = calls(model, tokens())
    assert count["decoder_block"] == 2
    torch.testing.assert_close(y, want)
    seen = []
    with model.observed(lambda *args: seen.append(args[1:])):
        assert torch.equal(model(tokens()), y)
    assert [i for i, _, _ in seen] == [0, 1] and torch.equal(seen[0][2], seen[1][1])
    assert torch.equal(seen[0][1], tokens()) and torch.equal(seen[1][2], y)
    assert unfuse(model).skipped[-1].reason == "built as MSSA, not swapped in by fuse"
    for wrong in ((Halved(pair[0]), pair[1]), (pair[1], pair[0])):
        with pytest.raises(ValueError, match=r"Decoder: expected pairs of .* got one where layers"):
            Decoder([wrong])


class PublishedDictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM) * DIM**-0.5)
        self.step_size, self.lambd = 0.1, 5.0

    def forward(self, x):
        # A@x
        output = F.linear(x, self.weight, bias=None)
        return output


def sparse(self, x):
    return F.relu(F.linear(x, self.weight))


def transposed(self, x):
    return x @ self.weight


def as_published(self, x):
    for ff, attn in self.layers:
        grad_x = ff(x)
        x = grad_x - attn(grad_x)
    return x


def of_x(self, x):
    for ff, attn in self.layers:
        x = ff(x) - attn(x)
    return x


def added(self, x):
    for ff, attn in self.layers:
        x = ff(x)
        x = x + attn(x)
    return x


def lookalike(forward=as_published, of_dictionary=PublishedDictionary.forward):
    def other(name, forward):
        return type(name, (nn.Module,), {"forward": forward, "__module__": __name__})

    fn, model = PublishedDictionary(), other("Lookalike", forward)()
    if of_dictionary is not PublishedDictionary.forward:
        fn.__class__ = other("Dictionary", of_dictionary)
    steps = [PreNorm(DIM, fn), PreNorm(DIM, Attention(DIM, HEADS, DIM_HEAD))]
    model.layers = nn.ModuleList([nn.ModuleList(steps)])
    return perturbed(model.double())


def test_the_published_words_are_recognised():
    """Its dictionary holds what an ISTA does, and computes another thing."""
    model = lookalike()
    want = with_gradients(model, tokens())
    for _ in range(2):
        assert str(fuse(model)) == "replaced 1 Decoder, 1 MSSA; skipped 0"
        assert type(model) is Decoder
        same(with_gradients(model, tokens()), want)
        assert calls(model, tokens())[1]["decoder_block"] == 1
        assert {layer.reason for layer in fuse(model).skipped} == {"fused already"}
        unfuse(model)
        assert type(model).__name__ == "Lookalike"
        assert type(model.layers[0][0].fn) is PublishedDictionary


ELSE = "its forward computes something else than the published one"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"forward": of_x}, ELSE),
        ({"forward": added}, ELSE),
        ({"of_dictionary": sparse}, "layers.0.0: its forward uses relu"),
        ({"of_dictionary": transposed}, f"layers.0.0: {ELSE}"),
    ],
)
def test_what_only_looks_like_a_decoder_stays(changed, says):
    model = lookalike(**changed)
    want = model(tokens())
    report = fuse(model)
    assert ("Decoder", says) in [(layer.kind, layer.reason) for layer in report.skipped]
    assert [layer.kind for layer in report.replaced] == ["MSSA"]
    assert type(model).__name__ == "Lookalike"
    torch.testing.assert_close(model(tokens()), want)
