"""masked_tokens and masked_loss in Triton's interpreter, against torch's kernels."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_close_as_plain
from maskeds import cast, loss_inputs, tokens_inputs, with_gradients

from crate_kernels.masked import triton_kernels
from crate_kernels.masked.op import masked_loss, masked_tokens

WIDE = {"mask_token": torch.float32, "positions": torch.float32}


def check(function, inputs, dy, what, **options):
    """As close to float64 as torch's kernels, and repeatable."""
    got = with_gradients(function, inputs, dy, backend="triton", **options)
    plain = with_gradients(function, inputs, dy, backend="reference", **options)
    exact = {k: t.double() for k, t in inputs.items()}
    options.pop("dtype", None)
    exact = with_gradients(function, exact, dy, backend="reference", **options)
    # The interpreter cuts off what it should round to bfloat16.
    unit = 2**-7 if plain["y"].dtype == torch.bfloat16 else None
    assert_as_close_as_plain(got, plain, exact, what, unit)
    again = with_gradients(function, inputs, dy, backend="triton", **options)
    assert all(torch.equal(again[k], t) for k, t in got.items() if again[k].dtype == t.dtype)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens(dtype, programs, monkeypatch):
    monkeypatch.setattr(triton_kernels, "multiprocessors", lambda t: programs)
    for batch, n, d in [(5, 3, 24), (1, 1, 8), (23, 2, 100)]:
        named = {"x": dtype, "cls_token": torch.float32, **WIDE}
        inputs = cast(tokens_inputs(batch, n, d), **named)
        inputs["mask_token"] = inputs["mask_token"].to(dtype).float()
        dy = torch.randn(batch, 1 + n, d, dtype=torch.float64).to(dtype).double()
        check(masked_tokens, inputs, dy, (batch, n, d), dtype=dtype)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loss(dtype, norm_pix):
    for shape in [(3, 3, (2, 4), 2), (1, 1, (3, 1), 4), (2, 4, (1, 2), 9)]:
        inputs = cast(loss_inputs(*shape), predicted=dtype, img=torch.float32, mask=torch.float32)
        dy = torch.tensor(-1.75)
        check(masked_loss, inputs, dy, shape, patch_size=shape[3], norm_pix=norm_pix)
        turned = {k: t.mT.contiguous().mT for k, t in inputs.items()}
        check(masked_loss, turned, dy, shape, patch_size=shape[3], norm_pix=norm_pix)
    predicted, img, mask = (t.to(dtype) for t in loss_inputs(2, 3, (1, 2), 2).values())
    nowhere = masked_loss(predicted, img, 0 * mask, patch_size=2, backend="triton")
    assert nowhere.isnan()


def test_nan_where_nothing_is_counted():
    inputs = {k: t.float() for k, t in loss_inputs(3, 3, (2, 4), 2).items()}
    want = with_gradients(masked_loss, inputs, torch.tensor(2.0), patch_size=2, backend="triton")
    none = inputs["mask"] == 0
    inputs["predicted"] = inputs["predicted"].masked_fill(none[..., None], float("nan"))
    got = with_gradients(masked_loss, inputs, torch.tensor(2.0), patch_size=2, backend="triton")
    assert none.any() and all(torch.equal(got[k], t) for k, t in want.items())
