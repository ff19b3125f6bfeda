"""masked_tokens and masked_loss on a GPU: as close as plain PyTorch, repeatable."""

from __future__ import annotations

import pytest
import torch
from helpers import HALVES, assert_as_close_as_plain
from maskeds import cast, loss_inputs, tokens_inputs, with_gradients

from crate_kernels.masked.op import masked_loss, masked_tokens
from crate_kernels.masked.reference import masked_loss_reference, masked_tokens_reference

pytest.importorskip("crate_kernels.masked.triton_kernels")

REPEATS = 20


def on_gpu(inputs):
    return {k: t.cuda() for k, t in inputs.items()}


def check(function, published, inputs, dy, what, **options):
    got = with_gradients(function, inputs, dy, backend="triton", **options)
    for _ in range(REPEATS):
        again = with_gradients(function, inputs, dy, backend="triton", **options)
        assert all(torch.equal(again[k], t) for k, t in got.items())
    dtype = options.pop("dtype", None)
    plain = with_gradients(published, inputs, dy, **options)
    if dtype is not None:
        plain["y"] = plain["y"].to(dtype)
    exact = {k: t.double() for k, t in inputs.items()}
    assert_as_close_as_plain(got, plain, with_gradients(published, exact, dy, **options), what)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(256, 196, 768), (3, 196, 576), (1, 1, 8), (7, 5, 1100)])
def test_tokens(shape, dtype):
    batch, n, d = shape
    wide = dict.fromkeys(("mask_token", "cls_token", "positions"), torch.float32)
    inputs = on_gpu(cast(tokens_inputs(*shape), x=dtype, **wide))
    inputs["mask_token"] = inputs["mask_token"].to(dtype).float()
    dy = torch.randn(batch, 1 + n, d, device="cuda").to(dtype)
    check(masked_tokens, masked_tokens_reference, inputs, dy, shape, dtype=dtype)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 3, (14, 14), 16), (3, 1, (2, 5), 4), (2, 3, (3, 2), 8)], ids=str
)
def test_loss(shape, dtype, norm_pix):
    wide = {"img": torch.float32, "mask": torch.float32}
    inputs = on_gpu(cast(loss_inputs(*shape), predicted=dtype, **wide))
    dy = torch.tensor(-1.75, device="cuda")
    options = {"patch_size": shape[3], "norm_pix": norm_pix}
    check(masked_loss, masked_loss_reference, inputs, dy, shape, **options)
    last = {**inputs, "img": inputs["img"].to(memory_format=torch.channels_last)}
    check(masked_loss, masked_loss_reference, last, dy, shape, **options)
