"""PatchEmbedding: what fuse makes of a published stem, when it runs as one op, what stays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from crate_kernels import models
from crate_kernels.nn import PatchEmbedding, fuse, unfuse
from crate_kernels.nn.patch_embedding import Patches

PATCH, DIM = (4, 2), 12


def stem(patches=None, dtype=torch.float64):
    torch.manual_seed(0)
    width = 3 * PATCH[0] * PATCH[1]
    children = (nn.LayerNorm(width), nn.Linear(width, DIM), nn.LayerNorm(DIM))
    return nn.Sequential(patches or Patches(*PATCH), *children).to(dtype)


def crate(**options):
    torch.manual_seed(0)
    size = {"image_size": (8, 6), "patch_size": PATCH, "dim": DIM, "depth": 1, "heads": 3}
    return models.CRATE(num_classes=5, dim_head=4, **size, **options)


def images(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 6, dtype=dtype)


def with_gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


class Calls(TorchDispatchMode):
    """The shapes that patch_embedding returns."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op == torch.ops.crate_kernels.patch_embedding.default:
            self.shapes.append(tuple(out[0].shape))
        return out


def calls(model, x):
    with Calls() as seen, torch.no_grad():
        model(x)
    return seen.shapes


def einops_patches():
    layers = pytest.importorskip("einops.layers.torch")
    return layers.Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=PATCH[0], p2=PATCH[1])


@pytest.mark.parametrize("patches", [Patches, einops_patches])
def test_the_stem_is_one_op_and_nothing_else_changes(patches):
    plain = stem(einops_patches() if patches is einops_patches else None)
    fused = copy.deepcopy(plain)
    assert str(fuse(fused)) == "replaced 1 PatchEmbedding; skipped 0"
    for a, b in zip(with_gradients(fused, images()), with_gradients(plain, images()), strict=True):
        torch.testing.assert_close(a, b)
    assert calls(fused, images()) == [(2, 6, DIM)]
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert str(fuse(fused)).startswith("replaced nothing; skipped 1")
    again = pickle.loads(pickle.dumps(fused))
    assert type(again) is PatchEmbedding and calls(again, images()) == [(2, 6, DIM)]
    assert str(unfuse(fused)) == "restored 1 PatchEmbedding; skipped 0"
    assert type(fused) is nn.Sequential and vars(fused).keys() == vars(plain).keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_adds_class_token_and_positions_in_the_op(dtype):
    plain = crate(emb_dropout=0.0).to(dtype)
    fused = copy.deepcopy(plain)
    fuse(fused)
    for a, b in zip(
        with_gradients(fused, images(dtype)), with_gradients(plain, images(dtype)), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert calls(fused, images(dtype)) == [(2, 7, DIM)]
    # Fewer patches than there are positions, and an encoder as published.
    small = images(dtype)[:, :, :4]
    assert calls(fused, small) == [(2, 3, DIM)]
    torch.testing.assert_close(fused(small), plain(small))
    unfuse(fused.transformer)
    assert calls(fused, images(dtype)) == [(2, 6, DIM)]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_under_autocast_are_those_of_the_children(x_dtype):
    plain = stem(dtype=torch.float32)
    fused = copy.deepcopy(plain)
    fuse(fused)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(images(x_dtype)).dtype == plain(images(x_dtype)).dtype
    model = crate()
    want = copy.deepcopy(model)
    fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(model, images(torch.float32)) == [(2, 7, DIM)]
        features = [m.forward_features(images(torch.float32)).dtype for m in (model, want)]
    assert features[0] == features[1] == torch.float32


@pytest.mark.parametrize("hooked", ["", "0", "1", "2", "3"])
def test_hooks_are_called(hooked):
    model = crate().double()
    fuse(model)
    want = model(images())
    seen = []
    module = model.to_patch_embedding.get_submodule(hooked)
    module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    torch.testing.assert_close(model(images()), want)
    assert len(seen) == 1


def test_no_dropout_is_passed_over():
    model = crate(emb_dropout=0.5).double()
    fuse(model)
    x = images()
    assert not torch.equal(model(x), model(x))


def test_bad_images_get_the_published_errors():
    model = crate()
    fuse(model)
    with pytest.raises(ValueError, match=r"CRATE: expected images of shape \(B, C, H, W\)"):
        model(torch.randn(2, 3, 9, 6))
    with pytest.raises(ValueError, match="CRATE: expected at most 6 patches, got 8"):
        model(torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="dtype"):
        model(images())  # float64 images, float32 parameters


class OtherSequential(nn.Sequential):
    pass


def channels_outermost():
    layers = pytest.importorskip("einops.layers.torch")
    return layers.Rearrange("b c (h p1) (w p2) -> b (h w) (c p1 p2)", p1=PATCH[0], p2=PATCH[1])


def replaced_forward():
    patches = Patches(*PATCH)
    patches.forward = lambda img: img
    return patches


class OtherPatches(Patches):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: stem(channels_outermost()), "its patches are not in the published order"),
        (lambda: stem(OtherPatches(*PATCH)), "neither einops' Rearrange nor Patches"),
        (lambda: stem(replaced_forward()), "hooks or a replaced forward"),
        (lambda: OtherSequential(*stem()), "OtherSequential is a subclass of Sequential"),
        (lambda: stem(Patches(5, 5)), r"its projection of 24 features"),
        (
            lambda: nn.Sequential(*list(stem())[:3], nn.LayerNorm(DIM, eps=1e-6)),
            "the eps of its norms are not one > 0",
        ),
        (
            lambda: nn.Sequential(*list(stem())[:3], nn.LayerNorm(DIM, elementwise_affine=False)),
            "module 3 has no weight and bias",
        ),
    ],
)
def test_lookalikes_are_left_alone(make, reason):
    module = make()
    kind = type(module)
    report = fuse(module)
    assert not report and type(module) is kind
    assert reason in report.skipped[0].reason


def test_a_child_that_changes_after_fuse_is_run():
    model = stem()
    fuse(model)
    model[3] = nn.LayerNorm(DIM, bias=False).double()
    want = nn.Sequential(*model)(images())
    torch.testing.assert_close(model(images()), want)
    assert calls(model, images()) == []


def test_compiles_into_one_graph():
    model = crate()
    fuse(model)
    x = images(torch.float32)
    want = with_gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, x), want, strict=True):
        torch.testing.assert_close(a, b)
