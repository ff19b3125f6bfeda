"""The models in published form, and the checkpoints they take or refuse."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crate_kernels import models

SIZE = {"image_size": 8, "patch_size": 4, "dim": 12, "depth": 2, "heads": 3, "dim_head": 4}


def tiny_crate(seed=0, **kwargs):
    torch.manual_seed(seed)
    return models.CRATE(**{**SIZE, "num_classes": 5, **kwargs})


def images(batch=2, side=8):
    torch.manual_seed(1)
    return torch.randn(batch, 3, side, side)


def copied(state):
    return {key: value.clone() for key, value in state.items()}


# ---- the published form

SIZES = {
    "tiny": (models.crate_tiny, 6_090_856, 384, 12, 6, 64),
    "small": (models.crate_small, 13_116_328, 576, 12, 12, 48),
    "base": (models.crate_base, 22_796_008, 768, 12, 12, 64),
    "large": (models.crate_large, 77_641_192, 1024, 24, 16, 64),
}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    build, parameters, dim, depth, heads, dim_head = SIZES[size]
    model = build(device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())
    with torch.device("meta"):
        assert build().state_dict().keys() == model.state_dict().keys()
    assert (model.transformer.dim, model.transformer.depth) == (dim, depth)
    layer = model.transformer.layers[-1]
    assert (layer[0].fn.heads, layer[0].fn.scale) == (heads, dim_head**-0.5)
    assert layer[0].fn.qkv.weight.shape == (heads * dim_head, dim)
    assert (layer[1].fn.step_size, layer[1].fn.lambd) == (0.1, 0.1)
    assert len(model.transformer.layers) == depth


def test_keys_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in tiny_crate(depth=1).state_dict().items()}
    norm = {"weight": (12,), "bias": (12,)}
    assert shapes == {
        "pos_embedding": (1, 5, 12),
        "cls_token": (1, 1, 12),
        **{f"to_patch_embedding.1.{k}": (48,) for k in norm},
        "to_patch_embedding.2.weight": (12, 48),
        "to_patch_embedding.2.bias": (12,),
        **{f"to_patch_embedding.3.{k}": v for k, v in norm.items()},
        **{f"transformer.layers.0.0.norm.{k}": v for k, v in norm.items()},
        "transformer.layers.0.0.fn.qkv.weight": (12, 12),
        "transformer.layers.0.0.fn.to_out.0.weight": (12, 12),
        "transformer.layers.0.0.fn.to_out.0.bias": (12,),
        **{f"transformer.layers.0.1.norm.{k}": v for k, v in norm.items()},
        "transformer.layers.0.1.fn.weight": (12, 12),
        **{f"mlp_head.0.{k}": v for k, v in norm.items()},
        "mlp_head.1.weight": (5, 12),
        "mlp_head.1.bias": (5,),
    }


def forward_by_hand(state, img, pool, patch=4, heads=3, eta=0.1, lambd=0.1):
    """The published forward, from the state dict alone."""

    def norm(x, key):
        return F.layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"], 1e-5)

    def linear(x, key):
        return F.linear(x, state[f"{key}.weight"], state.get(f"{key}.bias"))

    rows, columns = img.shape[2] // patch, img.shape[3] // patch
    x = torch.stack(
        [
            img[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            .movedim(1, -1)
            .flatten(1)
            for r in range(rows)
            for c in range(columns)
        ],
        dim=1,
    )
    stem = "to_patch_embedding"
    x = norm(linear(norm(x, f"{stem}.1"), f"{stem}.2"), f"{stem}.3")
    x = torch.cat([state["cls_token"].expand(len(img), 1, -1), x], dim=1)
    x = x + state["pos_embedding"][:, : x.shape[1]]
    for i in range(sum(key.endswith("qkv.weight") for key in state)):
        attn, ff = f"transformer.layers.{i}.0", f"transformer.layers.{i}.1"
        outs = []
        for w in linear(norm(x, f"{attn}.norm"), f"{attn}.fn.qkv").chunk(heads, dim=-1):
            outs.append(torch.softmax(w @ w.mT * w.shape[-1] ** -0.5, dim=-1) @ w)
        x = norm(x + linear(torch.cat(outs, dim=-1), f"{attn}.fn.to_out.0"), f"{ff}.norm")
        d = state[f"{ff}.fn.weight"]
        x = torch.relu(x + eta * (x @ d - x @ d.mT @ d) - eta * lambd)
    x = x.mean(dim=1) if pool == "mean" else x[:, 0]
    return linear(norm(x, "mlp_head.0"), "mlp_head.1")


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (4, 4)])
def test_forward_is_the_published_one(pool, shape):
    model = tiny_crate(image_size=(8, 12), pool=pool, lambd=0.2, dtype=torch.float64)
    img = torch.randn(2, 3, *shape, dtype=torch.float64)
    want = forward_by_hand(model.state_dict(), img, pool, lambd=0.2)
    torch.testing.assert_close(model(img), want)


def test_initial_values():
    """One seed, one model: drawn in the published order, from the published distributions."""
    model = tiny_crate(dim=96, heads=2, dim_head=48)
    torch.manual_seed(0)
    stem = nn.Linear(48, 96)
    assert torch.equal(model.to_patch_embedding[2].weight, stem.weight)
    assert torch.equal(model.pos_embedding, torch.randn(1, 5, 96))
    assert torch.equal(model.cls_token, torch.randn(1, 1, 96))
    qkv = nn.Linear(96, 96, bias=False)
    assert torch.equal(model.transformer.layers[0][0].fn.qkv.weight, qkv.weight)
    nn.Linear(96, 96)
    weight = nn.init.kaiming_uniform_(torch.empty(96, 96))
    assert torch.equal(model.transformer.layers[0][1].fn.weight, weight)


def test_overrides():
    model = models.crate_tiny(
        7, image_size=16, patch_size=8, depth=1, step_size=0.2, lambd=0.3, dropout=0.4, dim=64
    )
    attn, ff = model.transformer.layers[0]
    assert (attn.fn.dropout.p, attn.fn.to_out[1].p) == (0.4, 0.4)
    assert (ff.fn.step_size, ff.fn.lambd) == (0.2, 0.3)
    assert model(images(2, 16)).shape == (2, 7)
    assert attn.fn.qkv.weight.shape == (60, 64)  # 6 heads of 64 // 6
    with pytest.raises(TypeError, match="depht"):
        models.crate_tiny(depht=1)


def test_emb_dropout():
    model = tiny_crate(emb_dropout=0.9)
    img = images()
    assert not torch.equal(model(img), model(img))
    assert torch.equal(model.eval()(img), model(img))


def test_mae_encoder_block():
    block = models.MAEEncoderBlock(12, 3, 4)
    assert [k for k in block.state_dict() if "norm" not in k] == [
        "layers.0.0.fn.qkv.weight",
        "layers.0.0.fn.to_out.0.weight",
        "layers.0.0.fn.to_out.0.bias",
        "layers.0.1.fn.weight",
    ]
    attn, ff = block.layers[0]
    assert ff.fn.lambd == 0.5
    x = torch.randn(2, 5, 12)
    assert torch.equal(block(x), ff(attn(x) + x))
    assert block(x, return_attention=True).shape == (2, 3, 5, 5)
    assert torch.equal(block(x, return_key=True), attn.fn.qkv(attn.norm(x)))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tiny_crate(image_size=10), r"multiple of patch_size \(4, 4\), got \(10, 10\)"),
        (lambda: tiny_crate(pool="max"), "pool to be 'cls' or 'mean', got 'max'"),
        (lambda: tiny_crate(step_size=-1.0), "step_size .*got -1.0"),
        (lambda: tiny_crate()(torch.randn(2, 3, 10, 8)), r"multiple of 4 .*got \(2, 3, 10, 8\)"),
        (lambda: tiny_crate()(torch.randn(3, 8, 8)), r"\(B, C, H, W\) .*got \(3, 8, 8\)"),
        (lambda: tiny_crate()(torch.randn(2, 3, 16, 8)), "at most 4 patches, got 8"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# ---- checkpoints


def prefixed(prefix):
    def wrap(state):
        return {prefix + key: value for key, value in state.items()}

    return wrap


def compiled_layers(state):
    return {key.replace(".fn.", ".fn._orig_mod."): value for key, value in state.items()}


WRAPPED = {
    "plain": dict,
    "module": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod.module."),
    "compiled layers": compiled_layers,
    "state_dict": lambda state: {"epoch": 3, "state_dict": prefixed("module.")(state)},
    "model": lambda state: {"model": dict(state), "scaler": {}},
}


@pytest.mark.parametrize("form", WRAPPED)
@pytest.mark.parametrize("parallel", [False, True])
def test_checkpoints_load(form, parallel, tmp_path):
    source, target = tiny_crate(1), tiny_crate(2)
    parameters = list(target.parameters())
    model = nn.DataParallel(target) if parallel else target
    checkpoint = WRAPPED[form](source.state_dict())
    assert models.load_checkpoint(model, checkpoint) is model
    assert torch.equal(target(images()), source(images()))
    assert all(a is b for a, b in zip(target.parameters(), parameters, strict=True))
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(checkpoint, path)
    other = tiny_crate(3)
    models.load_checkpoint(other, path)
    assert torch.equal(other(images()), source(images()))
    models.load_checkpoint(tiny_crate(4), str(path))


def test_half_checkpoints_load_into_float():
    model = tiny_crate()
    models.load_checkpoint(model, {k: v.half() for k, v in tiny_crate(1).state_dict().items()})
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


HEAD = "mlp_head.1.weight"
WRONG = {
    "missing": (lambda s: without(s, HEAD, "cls_token"), [r"missing \(2\): cls_token; mlp_head.1"]),
    "unexpected": (lambda s: {**s, "extra": s[HEAD]}, [r"unexpected \(1\): extra"]),
    "shape": (
        lambda s: {**s, HEAD: torch.ones(7, 12)},
        [r"wrong shape \(1\): mlp_head.1.weight: expected \(5, 12\), got \(7, 12\)"],
    ),
    "not a tensor": (lambda s: {**s, HEAD: 1}, ["mlp_head.1.weight: expected a tensor, got int"]),
    "twice": (
        lambda s: {**s, f"module.{HEAD}": s[HEAD]},
        [r"twice in the checkpoint \(1\): mlp_head.1.weight \(mlp_head.1.weight, module.mlp"],
    ),
    "all at once": (
        lambda s: {**without(s, "cls_token"), "extra": s[HEAD], HEAD: torch.ones(7, 12)},
        [r"missing \(1\)", r"unexpected \(1\)", r"wrong shape \(1\)"],
    ),
    "another depth": (
        lambda s: {k: v for k, v in s.items() if "layers.1" not in k},
        [r"missing \(8\)"],
    ),
    "empty": (lambda s: {}, [r"missing \(28\): .*and 18 more"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_checkpoints_change_nothing(name):
    change, words = WRONG[name]
    model = tiny_crate()
    before = copied(model.state_dict())
    with pytest.raises(ValueError) as error:
        models.load_checkpoint(model, change(dict(tiny_crate(1).state_dict())))
    for expected in words:
        error.match(expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("checkpoint", [3, [1], {1: 2}, None], ids=str)
def test_not_a_checkpoint(checkpoint):
    with pytest.raises(TypeError, match="load_checkpoint: expected a path, a state dict"):
        models.load_checkpoint(tiny_crate(), checkpoint)


def test_meta_models_need_storage_first():
    model, source = tiny_crate(device="meta"), tiny_crate(1)
    with pytest.raises(ValueError, match="to_empty"):
        models.load_checkpoint(model, source.state_dict())
    model.to_empty(device="cpu")
    models.load_checkpoint(model, source.state_dict())
    assert torch.equal(model(images()), source(images()))


def test_deepcopy():
    model = tiny_crate()
    other = copy.deepcopy(model)
    assert torch.equal(other(images()), model(images()))
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
