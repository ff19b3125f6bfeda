"""nn.MSSA and nn.ISTA against the plain layers, and every reason to run like them."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from crate_kernels.nn import ISTA, MSSA, Attention, FeedForward, layers

CHILDREN = ("qkv", "attend", "dropout", "to_out", "to_out.0", "to_out.1")


@pytest.fixture
def op_calls(monkeypatch):
    """How often the fused op ran."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return mssa(*args, **kwargs)

    mssa = layers.mssa
    monkeypatch.setattr(layers, "mssa", counted)
    return calls


def mssa_pair(dim=12, heads=3, dim_head=4, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    plain = Attention(dim, heads, dim_head, dropout, dtype=dtype)
    fused = MSSA(dim, heads, dim_head, dropout, dtype=dtype)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def assert_same_step(plain, fused, x, tolerance):
    """Same output, same gradients of the input and of every parameter."""
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [layer(leaf) for layer, leaf in zip((plain, fused), xs, strict=True)]
    dy = torch.randn_like(ys[0])
    for y in ys:
        y.backward(dy)
    got = [ys[1], xs[1].grad, *(p.grad for p in fused.parameters())]
    want = [ys[0], xs[0].grad, *(p.grad for p in plain.parameters())]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("dim", "heads", "dim_head", "n"), [(12, 3, 4, 7), (10, 2, 8, 1), (8, 1, 8, 5), (8, 1, 6, 5)]
)
def test_mssa_equals_the_plain_layer(dim, heads, dim_head, n, dtype, tolerance, op_calls):
    plain, fused = mssa_pair(dim, heads, dim_head, dtype=dtype)
    assert_same_step(plain, fused, torch.randn(2, n, dim, dtype=dtype), tolerance)
    assert len(op_calls) == 1
    fused.scale = plain.scale = 1.7
    assert_same_step(plain, fused, torch.randn(2, n, dim, dtype=dtype), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 9, 8), (8,), (2, 2, 3, 8)])
def test_ista_equals_the_plain_layer(shape, dtype, tolerance):
    torch.manual_seed(0)
    plain = FeedForward(8, step_size=0.3, lambd=0.5, dtype=dtype)
    fused = ISTA(8, step_size=0.3, lambd=0.5, dtype=dtype)
    fused.load_state_dict(plain.state_dict())
    assert_same_step(plain, fused, torch.randn(shape, dtype=dtype), tolerance)
    fused.lambd = plain.lambd = 0.1
    fused.step_size = plain.step_size = 0.2
    assert_same_step(plain, fused, torch.randn(shape, dtype=dtype), tolerance)


def test_parameters_are_the_published_ones():
    shapes = {k: tuple(v.shape) for k, v in MSSA(12, heads=3, dim_head=5).state_dict().items()}
    assert shapes == {"qkv.weight": (15, 12), "to_out.0.weight": (12, 15), "to_out.0.bias": (12,)}
    assert isinstance(MSSA(8, heads=1, dim_head=8).to_out, nn.Identity)
    assert {k: tuple(v.shape) for k, v in ISTA(12).state_dict().items()} == {"weight": (12, 12)}
    layer = MSSA(16, dropout=0.25)
    assert (layer.heads, layer.scale, layer.attend.dim) == (8, 64**-0.5, -1)
    assert layer.dropout.p == layer.to_out[1].p == 0.25
    assert (ISTA(4).step_size, ISTA(4).lambd) == (0.1, 0.1)
    torch.manual_seed(3)
    weight = ISTA(64).weight
    torch.manual_seed(3)
    assert torch.equal(weight, nn.init.kaiming_uniform_(torch.empty(64, 64)))


def test_return_attention_and_return_key(op_calls):
    plain, fused = mssa_pair()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert torch.equal(fused(x, return_key=True), plain.qkv(x))
    attention = fused(x, return_attention=True)
    assert torch.equal(attention, plain(x, return_attention=True))
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    assert not op_calls


HOOKS = {
    "forward": lambda m, hit: m.register_forward_hook(lambda *a: hit()),
    "forward with kwargs": lambda m, hit: m.register_forward_hook(
        lambda *a: hit(), with_kwargs=True
    ),
    "always called": lambda m, hit: m.register_forward_hook(lambda *a: hit(), always_call=True),
    "forward pre": lambda m, hit: m.register_forward_pre_hook(lambda *a: hit()),
    "backward": lambda m, hit: m.register_full_backward_hook(lambda *a: hit()),
    "backward pre": lambda m, hit: m.register_full_backward_pre_hook(lambda *a: hit()),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("child", CHILDREN)
def test_hooks_on_children_fire(child, kind, op_calls):
    plain, fused = mssa_pair()
    hits = []
    handle = HOOKS[kind](fused.get_submodule(child), lambda: hits.append(1))
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    y = fused(x)
    y.sum().backward()
    assert len(hits) == 1
    assert not op_calls
    torch.testing.assert_close(y, plain(x))
    handle.remove()
    fused(x)
    assert op_calls


def test_a_hook_can_change_what_the_layer_computes():
    _, fused = mssa_pair()
    fused.qkv.register_forward_hook(lambda module, args, output: output * 0)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(fused(x), fused.to_out[0].bias.expand(2, 5, 12))


def test_hooks_on_all_modules_fire(op_calls):
    _, fused = mssa_pair()
    called = []
    handle = torch_module.register_module_forward_hook(lambda m, *a: called.append(type(m)))
    try:
        fused(torch.randn(2, 5, 12, dtype=torch.float64))
    finally:
        handle.remove()
    assert nn.Softmax in called
    assert nn.Linear in called
    assert not op_calls


def test_active_dropout_runs_the_plain_layer(op_calls, caplog):
    plain, fused = mssa_pair(dropout=0.5)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    layers.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="crate_kernels"):
        torch.manual_seed(1)
        y = fused(x)
        fused(x)
    assert [r.getMessage() for r in caplog.records] == [
        "MSSA runs unfused: dropout 0.5 is active while training"
    ]
    torch.manual_seed(1)
    assert torch.equal(y, plain(x))
    assert not op_calls
    fused.eval()
    torch.testing.assert_close(fused(x), plain.eval()(x))
    assert len(op_calls) == 1
    for layer in (plain, fused):
        layer.to_out[1].train()
    outputs = []
    for layer in (plain, fused):
        torch.manual_seed(3)
        outputs.append(layer(x))
    torch.testing.assert_close(*outputs)
    assert (outputs[0] == 0).any() and len(op_calls) == 2


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self):  # as PEFT's own wrapper has it
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def wrap_qkv(layer):
    layer.qkv = LoRA(layer.qkv)


def wrap_out(layer):
    layer.to_out[0] = LoRA(layer.to_out[0])


def parametrize_qkv(layer):
    parametrize.register_parametrization(layer.qkv, "weight", Halved())


def replace_forward(layer):
    layer.qkv.forward = lambda x: nn.functional.linear(x, layer.qkv.weight) + 1.0


def replace_attend(layer):
    layer.attend = nn.Softmax(dim=-2)


def sigmoid_attend(layer):
    layer.attend = nn.Sigmoid()


def biased_qkv(layer):
    layer.qkv.bias = nn.Parameter(torch.ones(12, dtype=torch.float64))


def longer_out(layer):
    layer.to_out.append(nn.Tanh())


def other_out(layer):
    layer.to_out = nn.Tanh()


CHANGES = [wrap_qkv, wrap_out, parametrize_qkv, replace_forward, replace_attend, sigmoid_attend]
CHANGES += [biased_qkv, longer_out, other_out]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_child_is_called(change, op_calls):
    """The result follows the change, as in the plain layer changed alike."""
    layers_ = mssa_pair()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    before = layers_[1](x)
    for layer in layers_:
        torch.manual_seed(2)
        change(layer)
    del op_calls[:]
    assert torch.equal(layers_[1](x), layers_[0](x))
    assert not op_calls
    assert not torch.allclose(layers_[1](x), before)


def test_a_parametrized_dictionary_is_used():
    torch.manual_seed(0)
    layer = ISTA(8, dtype=torch.float64)
    plain = FeedForward(8, dtype=torch.float64)
    plain.weight.data = layer.weight.data / 2
    parametrize.register_parametrization(layer, "weight", Halved())
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(clone):
    model = nn.Sequential(MSSA(12, 3, 4), ISTA(12))
    x = torch.randn(2, 5, 12)
    model(x).sum().backward()
    other = clone(model)
    assert torch.equal(other(x), model(x))
    assert type(other[0]) is MSSA
    with torch.no_grad():
        other[1].weight.zero_()
    assert not torch.equal(other(x), model(x))


@pytest.mark.parametrize("in_context", [False, True])
def test_meta_device(in_context):
    if in_context:
        with torch.device("meta"):
            model = nn.Sequential(MSSA(12, 3, 4), ISTA(12))
    else:
        model = nn.Sequential(
            MSSA(12, 3, 4, device="meta", dtype=torch.float64),
            ISTA(12, device="meta", dtype=torch.float64),
        )
        assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu").float()
    source = nn.Sequential(MSSA(12, 3, 4), ISTA(12))
    model.load_state_dict(source.state_dict())
    x = torch.randn(2, 5, 12)
    assert torch.equal(model(x), source(x))


def test_shared_weights_get_both_gradients():
    torch.manual_seed(0)
    first, second = FeedForward(8, dtype=torch.float64), ISTA(8, dtype=torch.float64)
    second.weight = first.weight
    both = nn.Sequential(ISTA(8, dtype=torch.float64), ISTA(8, dtype=torch.float64))
    both[0].weight = both[1].weight = nn.Parameter(first.weight.detach().clone())
    x = torch.randn(5, 8, dtype=torch.float64)
    nn.Sequential(first, second)(x).sum().backward()
    both(x).sum().backward()
    assert len(list(both.parameters())) == 1
    torch.testing.assert_close(both[0].weight.grad, first.weight.grad)


@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_keep_hooks(op_calls):
    plain, fused = mssa_pair()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(fused, fullgraph=True, backend="aot_eager")(x), plain(x)
    )
    for layer in (plain, fused):
        layer.qkv.register_forward_hook(lambda module, args, output: output * 2)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: ISTA(8, step_size=-0.1), ValueError, "ISTA: expected step_size .*got -0.1"),
        (lambda: ISTA(8, lambd=float("nan")), ValueError, "ISTA: expected lambd .*got nan"),
        (lambda: ISTA(8, lambd="0.1"), TypeError, "ISTA: expected lambd .*got str"),
        (lambda: MSSA(8, heads=0), ValueError, "MSSA: expected heads .*got 0"),
        (lambda: MSSA(8, heads=2.0), TypeError, "MSSA: expected heads .*got float"),
        (lambda: MSSA(8, 2, 4)(torch.randn(2, 5, 6)), ValueError, "mssa: expected x of shape"),
        (lambda: ISTA(8)(torch.randn(2, 5, 6)), ValueError, "ista: expected x of shape"),
    ],
)
def test_bad_input(build, error, words):
    with pytest.raises(error, match=words):
        build()
