"""The stem on a GPU: every size of patch and token that models have, repeatable."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    patch_embedding_inputs,
    published_patch_embedding,
    results,
    without_class_token,
)

from crate_kernels import fuse, models, patch_embedding
from crate_kernels.nn import PatchProjection

REPEATS = 20
# batch, channels, patches up and across, patch_size, width
SHAPES = [
    (16, 3, (14, 14), (16, 16), 384),
    (9, 3, (14, 14), (16, 16), 576),
    (16, 3, (14, 14), (16, 16), 768),
    (5, 3, (16, 16), (14, 14), 1024),
    (8, 3, (28, 28), (8, 8), 768),
    (3, 1, (3, 2), (32, 16), 44),
    (1, 1, (1, 1), (1, 1), 16),
]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_close_as_plain_and_repeatable(shape, dtype):
    inputs = {k: t.to("cuda", dtype) for k, t in patch_embedding_inputs(*shape).items()}
    options = {"patch_size": shape[3]}
    for given in (inputs, without_class_token(inputs)):
        dx = torch.randn_like(published_patch_embedding(**given, **options))
        plain = results(published_patch_embedding, given, dx, **options)
        exact = results(published_patch_embedding, given, dx, torch.float64, **options)
        got = results(patch_embedding, given, dx, backend="triton", **options)
        assert_as_close_as_plain(got, plain, exact, shape)
        for _ in range(REPEATS):
            again = results(patch_embedding, given, dx, backend="triton", **options)
            assert all(torch.equal(again[name], got[name]) for name in got)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_under_autocast(memory_format):
    """Images and parameters in float32, the projection in bfloat16; dtypes as published."""
    shape = SHAPES[0]
    inputs = {k: t.to("cuda", torch.float32) for k, t in patch_embedding_inputs(*shape).items()}
    inputs["img"] = inputs["img"].to(memory_format=memory_format)
    dx = torch.randn(shape[0], 197, shape[-1], device="cuda")
    options = {"patch_size": shape[3]}
    exact = results(published_patch_embedding, inputs, dx, torch.float64, **options)
    with torch.autocast("cuda", torch.bfloat16):
        plain = results(published_patch_embedding, inputs, dx, **options)
        got = results(patch_embedding, inputs, dx, out_dtype=torch.float32, **options)
        narrow = results(patch_embedding, inputs, dx, **options)
    assert_as_close_as_plain(got, plain, exact, memory_format)
    assert narrow.pop("y").dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in narrow.values())


def test_model_under_autocast_gives_the_published_dtypes():
    model = models.crate_tiny(num_classes=7, depth=2, image_size=64).cuda()
    fused = copy.deepcopy(model)
    assert "1 PatchEmbedding" in str(fuse(fused))
    img = torch.randn(4, 3, 64, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        for run in (lambda m: m.to_patch_embedding(img), lambda m: m.forward_features(img)):
            assert run(fused).dtype == run(model).dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(
                run(fused).flatten(), run(model).flatten(), 0
            ) > 0.999  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("channels", "patch", "dim"), [(3, 16, 768), (1, 14, 200)])
def test_convolution_by_whole_patches(channels, patch, dim, dtype):
    """Under autocast, as cuDNN's: outputs and gradients, dtypes."""
    conv = torch.nn.Conv2d(channels, dim, patch, patch).cuda()
    ours = copy.deepcopy(conv)
    ours.__class__ = PatchProjection
    img = torch.randn(5, channels, 4 * patch, 3 * patch, device="cuda")
    dy = torch.randn(5, dim, 4, 3, device="cuda").to(dtype)
    found = []
    wide = copy.deepcopy(conv).double()
    for module, given in ((ours, img), (conv, img), (wide, img.double())):
        with torch.autocast("cuda", dtype, enabled=given is img):
            y = module(given)
        grads = torch.autograd.grad(y, tuple(module.parameters()), dy.to(y.dtype))
        found.append(dict(zip(("y", "weight", "bias"), (y, *grads), strict=True)))
    got, plain, exact = found
    assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in plain.items()}
    assert_as_close_as_plain(got, plain, exact, (channels, patch, dim))
