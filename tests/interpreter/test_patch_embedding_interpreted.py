"""The stem's kernels in Triton's interpreter."""

from __future__ import annotations

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

from crate_kernels import patch_embedding
from crate_kernels.patch_embedding import torch_kernels, triton_kernels

# batch, channels, patches up and across, patch_size, width
SHAPES = [
    (5, 3, (2, 3), (4, 4), 24),
    (1, 1, (1, 1), (3, 5), 8),
    (4, 2, (3, 2), (5, 2), 33),
]


@pytest.mark.parametrize("programs", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_close_as_plain(dtype, programs, monkeypatch):
    monkeypatch.setattr(triton_kernels, "multiprocessors", lambda t: programs)
    for shape in SHAPES:
        inputs = {k: t.to(dtype) for k, t in patch_embedding_inputs(*shape).items()}
        for given in (inputs, without_class_token(inputs)):
            options = {"patch_size": shape[3]}
            dx = torch.randn_like(published_patch_embedding(**given, **options))
            got = results(patch_embedding, given, dx, backend="triton", **options)
            plain = results(published_patch_embedding, given, dx, **options)
            exact = results(published_patch_embedding, given, dx, torch.float64, **options)
            assert_as_close_as_plain(got, plain, exact, shape)
            again = results(patch_embedding, given, dx, backend="triton", **options)
            assert all(torch.equal(again[name], got[name]) for name in got)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_patches_of_images_with_any_strides(dtype):
    img = torch.randn(2, 3, 8, 12)
    views = (img.to(memory_format=torch.channels_last), img.flip(0), img[:, :1], img.mT.mT)
    for view in (*views, torch.randn(2, 3, 16, 24)[:, :, ::2, ::2], img[:1].expand(3, 3, 8, 12)):
        got, want = (
            kernels.normalise_patches(view, (4, 6), 1e-5, torch.float32)
            for kernels in (triton_kernels, torch_kernels)
        )
        torch.testing.assert_close(got, want)
    assert triton_kernels.normalise_patches(img, (4, 6), 1e-5, dtype).dtype == dtype


def test_nan_stays_in_its_patch():
    inputs = {k: t.float() for k, t in patch_embedding_inputs(2, 3, (2, 3), (4, 4), 8).items()}
    inputs["img"][1, 0, 5, 2] = float("nan")
    x = patch_embedding(**inputs, patch_size=(4, 4), backend="triton")
    assert x[1, 4].isnan().all() and x.isnan().sum() == 8
