"""A convolution by whole patches as one GEMM, and when fuse makes one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from crate_kernels import fuse, models, unfuse
from crate_kernels.nn import PatchProjection


def convolution(channels=3, dim=10, patch=(4, 2), **options):
    torch.manual_seed(0)
    return nn.Conv2d(channels, dim, patch, patch, dtype=torch.float64, **options)


def swapped(conv):
    ours = copy.deepcopy(conv)
    ours.__class__ = PatchProjection
    return ours


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_the_convolution(channels, bias):
    conv = convolution(channels, bias=bias)
    ours = swapped(conv)
    img = torch.randn(2, channels, 12, 6, dtype=torch.float64)
    for view in (img, img.to(memory_format=torch.channels_last), img[:, :, :8, 2:], img[:0]):
        a, b = (view.clone(memory_format=torch.preserve_format).requires_grad_() for _ in "ab")
        got, want = ours.project(a), conv(b)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want)
        dy = torch.randn_like(want)
        got.backward(dy)
        want.backward(dy)
        torch.testing.assert_close(a.grad, b.grad)
    for x, y in zip(ours.parameters(), conv.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad)
    assert ours.project(img).flatten(2).mT.is_contiguous()


def test_autocast_gives_the_dtypes_of_the_convolution():
    conv = convolution().float()
    img = torch.randn(2, 3, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = swapped(conv).project(img), conv(img)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-5)


def test_other_images_go_the_way_of_the_convolution():
    conv = convolution()
    for shape in ((1, 3, 9, 4), (3, 8, 4), (0, 3, 8, 4)):
        img = torch.randn(shape, dtype=torch.float64)
        assert torch.equal(swapped(conv)(img), conv(img))
    with pytest.raises(RuntimeError, match="channels"):
        swapped(conv)(torch.randn(1, 2, 8, 4, dtype=torch.float64))


def alpha(conv=None):
    size = {"image_size": 8, "patch_size": 4, "dim": 12, "depth": 1, "heads": 2, "dim_head": 6}
    model = models.CRATEAlpha(num_classes=5, **size)
    model.conv1 = conv or model.conv1
    return model


def test_fuse_and_unfuse():
    model = alpha()
    keys = model.state_dict().keys()
    assert "1 PatchProjection" in str(fuse(model)) and type(model.conv1) is PatchProjection
    assert model.state_dict().keys() == keys
    assert "fused already" in str(fuse(model))
    unfuse(model)
    assert type(model.conv1) is nn.Conv2d


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (Own(3, 12, 4, 4), "Own is a subclass of Conv2d"),
        (nn.Conv2d(3, 12, 4, 4, dilation=2), "padding or dilation"),
        (nn.Conv2d(3, 12, 4, 4, padding=2), "padding or dilation"),
    ],
)
def test_what_only_looks_like_one_is_left_alone_and_reported(conv, reason):
    model = alpha(conv)
    (skipped,) = (layer for layer in fuse(model).skipped if layer.name == "conv1")
    assert skipped.kind == "PatchProjection" and reason in skipped.reason
    assert type(model.conv1) is type(conv)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 12, 4, 2), nn.Conv2d(3, 12, 1), nn.Conv2d(3, 3, 4, 4, groups=3)]
)
def test_other_convolutions_are_none(conv):
    model = nn.Sequential(conv, alpha())
    fuse(model)
    assert type(model[0]) is nn.Conv2d


def test_a_model_without_our_layers_keeps_its_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 12, 4, 4))
    assert not fuse(model) and type(model[0]) is nn.Conv2d


def test_compiled_without_a_break():
    ours = swapped(convolution())
    img = torch.randn(1, 3, 8, 4, dtype=torch.float64)
    compiled = torch.compile(ours.project, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(img), ours(img))
