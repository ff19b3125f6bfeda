"""CRATE-alpha in published form, and what fuse makes of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from layers_of_others import DIM, Wide, like, types_of
from torch import nn

from crate_kernels import fuse, models, unfuse
from crate_kernels.nn import MSSA, OvercompleteFeedForward, OvercompleteISTA

SIZE = {"image_size": 8, "patch_size": 4, "dim": 12, "depth": 2, "heads": 3, "dim_head": 4}


def tiny_alpha(seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    return models.CRATEAlpha(**{**SIZE, "num_classes": 5, "dtype": dtype, **kwargs})


def images(batch=2, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, 3, 8, 8, dtype=dtype)


def gradients(model, img):
    model.zero_grad()
    model(img).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def steps_of(model):
    return [step.fn for layer in model.transformer.layers for step in layer]


# ---- the published form

SIZES = {
    "tiny": (models.crate_alpha_tiny, 4_811_944, 192, 12, 3, 64, 16),
    "small": (models.crate_alpha_small, 40_975_912, 576, 12, 12, 48, 16),
    "base": (models.crate_alpha_base, 72_328_936, 768, 12, 12, 64, 16),
    "large": (models.crate_alpha_large, 253_650_920, 1024, 24, 16, 64, 14),
    "huge": (models.crate_alpha_huge, 526_819_560, 1280, 32, 16, 80, 14),
}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    build, parameters, dim, depth, heads, dim_head, patch = SIZES[size]
    model = build(device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())
    assert (model.transformer.dim, model.transformer.depth) == (dim, depth)
    attn, ff = model.transformer.layers[-1]
    assert (attn.fn.heads, attn.fn.scale) == (heads, dim_head**-0.5)
    assert ff.fn.D.shape == ff.fn.D1.shape == (dim, 4 * dim)
    assert (ff.fn.eta, ff.fn.lmbda) == (0.1, 0.1)
    assert model.conv1.weight.shape == (dim, 3, patch, patch)
    assert [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)] == (
        [1e-6] * 2 * depth + [1e-5]
    )


def test_keys_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in tiny_alpha(depth=1).state_dict().items()}
    norm = {"weight": (12,), "bias": (12,)}
    published = {
        "pos_embedding": (1, 5, 12),
        "cls_token": (1, 1, 12),
        "conv1.weight": (12, 3, 4, 4),
        "conv1.bias": (12,),
        **{f"transformer.layers.0.0.norm.{k}": v for k, v in norm.items()},
        "transformer.layers.0.0.fn.qkv.weight": (12, 12),
        "transformer.layers.0.0.fn.to_out.0.weight": (12, 12),
        **{f"transformer.layers.0.1.norm.{k}": v for k, v in norm.items()},
        "transformer.layers.0.1.fn.D": (12, 48),
        "transformer.layers.0.1.fn.D1": (12, 48),
        **{f"mlp_head.0.{k}": v for k, v in norm.items()},
        "mlp_head.1.weight": (5, 12),
        "mlp_head.1.bias": (5,),
    }
    assert shapes == published
    scaled = tiny_alpha(depth=1, layer_scale=1e-5).state_dict()
    more = {f"transformer.layers.0.{i}.layer_scale": (12,) for i in (0, 1)}
    assert {k: tuple(v.shape) for k, v in scaled.items()} == {**published, **more}


def forward_by_hand(state, img, patch=4, heads=3, eta=0.1, lmbda=0.1):
    """The published forward, from the state dict alone."""

    def norm(x, key, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"], eps)

    patches = F.unfold(img, patch, stride=patch).mT
    x = patches @ state["conv1.weight"].flatten(1).T + state["conv1.bias"]
    x = torch.cat([state["cls_token"].expand(len(img), 1, -1), x], dim=1)
    x = x + state["pos_embedding"][:, : x.shape[1]]
    for i in range(sum(key.endswith("qkv.weight") for key in state)):
        attn, ff = f"transformer.layers.{i}.0", f"transformer.layers.{i}.1"
        w = norm(x, f"{attn}.norm", 1e-6) @ state[f"{attn}.fn.qkv.weight"].T
        outs = [
            torch.softmax(h @ h.mT * h.shape[-1] ** -0.5, dim=-1) @ h
            for h in w.chunk(heads, dim=-1)
        ]
        step = torch.cat(outs, dim=-1) @ state[f"{attn}.fn.to_out.0.weight"].T
        x = x + step * state.get(f"{attn}.layer_scale", 1.0)
        u, d, d1 = norm(x, f"{ff}.norm", 1e-6), state[f"{ff}.fn.D"], state[f"{ff}.fn.D1"]
        z = torch.relu(eta * u @ d - eta * lmbda)
        z = torch.relu(z - eta * (z @ d.T - u) @ d - eta * lmbda)
        x = x + z @ d1.T * state.get(f"{ff}.layer_scale", 1.0)
    x = norm(x[:, 0], "mlp_head.0", 1e-5)
    return x @ state["mlp_head.1.weight"].T + state["mlp_head.1.bias"]


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_forward_is_the_published_one(layer_scale):
    model = tiny_alpha(layer_scale=layer_scale, eta=0.2, lmbda=0.3)
    want = forward_by_hand(model.state_dict(), images(), eta=0.2, lmbda=0.3)
    torch.testing.assert_close(model(images()), want)
    fuse(model)
    torch.testing.assert_close(model(images()), want)


def test_initial_values():
    """One seed, one model: drawn in the published order, from the published distributions."""
    model = tiny_alpha(dim=24, heads=2, dim_head=12, dtype=torch.float32)
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 24, 4, 4)
    assert torch.equal(model.conv1.weight, stem.weight)
    assert torch.equal(model.pos_embedding, torch.randn(1, 5, 24))
    assert torch.equal(model.cls_token, torch.randn(1, 1, 24))
    qkv, out = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)
    attn, ff = model.transformer.layers[0]
    assert torch.equal(attn.fn.qkv.weight, qkv.weight)
    assert torch.equal(attn.fn.to_out[0].weight, out.weight)
    for dictionary in (ff.fn.D, ff.fn.D1):
        assert torch.equal(dictionary, nn.init.kaiming_uniform_(torch.empty(24, 96)))


def test_drop_path():
    """Whole items, the later the layer the likelier, only while training; the mean stays."""
    model = tiny_alpha(drop_path=0.5, depth=3)
    assert [step.drop_path for layer in model.transformer.layers for step in layer] == [
        *([0.0] * 2),
        *([0.25] * 2),
        *([0.5] * 2),
    ]
    step, x = model.transformer.layers[2][1], torch.randn(400, 2, 12, dtype=torch.float64)
    y, full = step(x), step.eval()(x)
    left_out = (y == 0).flatten(1).all(1)
    assert 120 < left_out.sum() < 280
    torch.testing.assert_close(y[~left_out], 2 * full[~left_out])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 3}, "image_size to be a multiple of 3, got 8"),
        ({"drop_path": 1.0}, "drop_path < 1, got 1.0"),
        ({"drop_path": -0.1}, "drop_path to be finite and >= 0, got -0.1"),
        ({"eta": -0.1}, "eta to be finite and >= 0, got -0.1"),
        ({"lmbda": float("nan")}, "lmbda to be finite and >= 0, got nan"),
    ],
)
def test_bad_options(change, words):
    with pytest.raises(ValueError, match=words):
        tiny_alpha(**change)


def test_too_many_patches():
    with pytest.raises(ValueError, match="CRATEAlpha: expected at most 4 patches, got 9"):
        tiny_alpha()(torch.randn(1, 3, 12, 12, dtype=torch.float64))


def test_checkpoints_load():
    source, target = tiny_alpha(0), tiny_alpha(1)
    models.load_checkpoint(target, {f"module.{k}": v for k, v in source.state_dict().items()})
    assert torch.equal(target(images()), source(images()))
    fuse(target)
    models.load_checkpoint(target, {"model": tiny_alpha(2).state_dict()})
    torch.testing.assert_close(target(images()), tiny_alpha(2)(images()))
    with pytest.raises(ValueError, match=r"missing \(1\): transformer.layers.0.1.fn.D1"):
        state = source.state_dict()
        del state["transformer.layers.0.1.fn.D1"]
        models.load_checkpoint(target, state)


# ---- fuse


def test_fuse_and_unfuse():
    plain = tiny_alpha()
    model = copy.deepcopy(plain)
    before, keys = types_of(model), [sorted(vars(m)) for m in model.modules()]
    report = fuse(model)
    kinds = "1 PatchProjection, 1 AlphaEncoder, 2 MSSA, 2 OvercompleteISTA"
    assert str(report) == f"replaced {kinds}; skipped 0"
    assert [type(fn) for fn in steps_of(model)] == [MSSA, OvercompleteISTA] * 2
    torch.testing.assert_close(model(images()), plain(images()))
    for got, want in zip(gradients(model, images()), gradients(plain, images()), strict=True):
        torch.testing.assert_close(got, want)
    assert {layer.reason for layer in fuse(model).skipped} == {"fused already"}
    assert str(unfuse(model)) == f"restored {kinds}; skipped 0"
    assert types_of(model) == before
    assert [sorted(vars(m)) for m in model.modules()] == keys
    assert torch.equal(model(images()), plain(images()))


def test_layers_of_others_are_recognised():
    """One with products, and one as the published code has it, with einsum."""

    def einsum(self, x):
        z = F.relu(self.eta * torch.einsum("dm,btd->btm", self.D, x) - self.eta * self.lmbda)
        back = torch.einsum("dm,btm->btd", self.D, z) - x
        step = self.eta * torch.einsum("dm,btd->btm", self.D, back)
        z = F.relu(z - step - self.eta * self.lmbda)
        return torch.einsum("dm,btm->btd", self.D1, z)

    torch.manual_seed(0)
    plain = nn.Sequential(Wide(), like(Wide, forward=einsum)()).double()
    model, x = copy.deepcopy(plain), torch.randn(2, 5, DIM, dtype=torch.float64)
    assert str(fuse(model)) == "replaced 2 OvercompleteISTA; skipped 0"
    torch.testing.assert_close(model(x), plain(x))


def test_memory():
    model = tiny_alpha()
    wide = steps_of(model)[1::2]
    for memory, want in ((None, "default"), ("low", "low"), (None, "low"), ("default", "default")):
        fuse(model, memory=memory)
        assert [fn.memory for fn in wide] == [want] * 2
    full = gradients(model, images())
    fuse(model, memory="low")
    assert all(map(torch.equal, gradients(model, images()), full))
    with pytest.raises(
        ValueError, match=r"OvercompleteISTA: expected memory to be one of .*'none'"
    ):
        wide[0].memory = "none"
    unfuse(model)
    fuse(model)
    assert [fn.memory for fn in wide] == ["default"] * 2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle_of_a_fused_model(clone):
    model = tiny_alpha()
    fuse(model, memory="low")
    other = clone(model)
    assert torch.equal(other(images()), model(images()))
    assert [fn.memory for fn in steps_of(other)[1::2]] == ["low"] * 2
    assert len(unfuse(other)) == 6 and isinstance(steps_of(model)[1], OvercompleteISTA)


def test_one_dictionary_for_both():
    plain = tiny_alpha()
    for fn in steps_of(plain)[1::2]:
        fn.D1 = fn.D
    fused = copy.deepcopy(plain)
    assert len(fuse(fused)) == 6
    for got, want in zip(gradients(fused, images()), gradients(plain, images()), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtypes(dtype):
    plain = tiny_alpha(dtype=torch.float32)
    fused = copy.deepcopy(plain)
    fuse(fused)
    seen = {}
    for name, model in (("plain", plain), ("fused", fused)):
        seen[name] = []
        for fn in steps_of(model):
            fn.register_forward_hook(lambda m, args, y, to=seen[name]: to.append(y.dtype))
        with torch.autocast("cpu", dtype):
            model(images(dtype=torch.float32))
    assert seen["fused"] == seen["plain"] == [dtype] * 4


@pytest.mark.filterwarnings("ignore")
def test_compiled():
    plain = tiny_alpha(depth=1, dtype=torch.float32)
    fused = copy.deepcopy(plain)
    fuse(fused)
    torch._dynamo.reset()
    compiled, img = torch.compile(fused, fullgraph=True, backend="aot_eager"), images().float()
    torch.testing.assert_close(compiled(img), plain(img), rtol=1e-4, atol=1e-5)
    compiled(img).square().sum().backward()
    for got, want in zip(fused.parameters(), gradients(plain, img), strict=True):
        torch.testing.assert_close(got.grad, want, rtol=1e-3, atol=1e-4)


def test_layers_by_themselves():
    """Any leading dimensions, built fused or swapped."""
    torch.manual_seed(0)
    plain = OvercompleteFeedForward(6, 3, eta=0.2, lmbda=0.3, dtype=torch.float64)
    built = OvercompleteISTA(6, 3, eta=0.2, lmbda=0.3, dtype=torch.float64)
    built.load_state_dict(plain.state_dict())
    assert repr(built) == "OvercompleteISTA(6, 18, eta=0.2, lmbda=0.3)"
    for shape in ((6,), (5, 6), (2, 3, 4, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(built(x), plain(x))
    assert unfuse(built).skipped[0].reason == "built as OvercompleteISTA, not swapped in by fuse"


def test_digits_are_learnt():
    """The loss falls as that of the published form does, step by step."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    img = torch.tensor(digits.images[:128], dtype=torch.float64)[:, None] / 8
    labels = torch.tensor(digits.target[:128])
    losses = {}
    for swap in (False, True):
        model = tiny_alpha(channels=1, num_classes=10, dim=24, heads=2, dim_head=12)
        if swap:
            fuse(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[swap] = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(img), labels)
            loss.backward()
            optimizer.step()
            losses[swap].append(loss.item())
    assert losses[True][-1] < 0.5 * losses[True][0]
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-5, atol=0)
