"""masked_tokens and masked_loss against the published forms, on torch's CPU kernels."""

from __future__ import annotations

import pytest
import torch
from helpers import HALVES, assert_as_close_as_plain, assert_equal_results
from maskeds import cast, loss_inputs, tokens_inputs, with_gradients

from crate_kernels.masked.op import masked_loss, masked_tokens
from crate_kernels.masked.reference import masked_loss_reference, masked_tokens_reference

IMAGES = [(3, 3, (2, 4), 2), (1, 1, (3, 1), 4), (2, 4, (1, 1), 3)]


@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 1, 3), (4, 2, 16)], ids=str)
def test_tokens_equal_the_published_form(shape):
    inputs = tokens_inputs(*shape)
    dy = torch.randn(shape[0], 1 + shape[1], shape[2], dtype=torch.float64)
    want = with_gradients(masked_tokens_reference, inputs, dy)
    assert_equal_results(with_gradients(masked_tokens, inputs, dy), want, shape)
    for mask in (inputs["mask"] > 0, inputs["mask"].int(), inputs["mask"] - 0.5):
        given = {**inputs, "mask": mask}
        assert_equal_results(with_gradients(masked_tokens, given, dy), want, mask.dtype)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_loss_equals_the_published_form(shape, norm_pix):
    inputs, dy = loss_inputs(*shape), torch.tensor(-1.75)
    want = with_gradients(masked_loss_reference, inputs, dy, norm_pix=norm_pix, patch_size=shape[3])
    got = with_gradients(masked_loss, inputs, dy, norm_pix=norm_pix, patch_size=shape[3])
    assert_equal_results(got, want, (shape, norm_pix))
    assert got["dpredicted"].is_contiguous()
    turned = {k: t.mT.contiguous().mT for k, t in inputs.items()}
    again = with_gradients(masked_loss, turned, dy, norm_pix=norm_pix, patch_size=shape[3])
    assert_equal_results(again, want, "other strides")
    counted = {**inputs, "mask": inputs["mask"] > 0}
    want = with_gradients(masked_loss_reference, counted, dy, patch_size=shape[3])
    assert_equal_results(with_gradients(masked_loss, counted, dy, patch_size=shape[3]), want, "")


def test_gradcheck():
    x, mask, *given, positions = tokens_inputs(2, 3, 4).values()
    leaves = [t.requires_grad_() for t in (x, *given)]
    assert torch.autograd.gradcheck(lambda x, *t: masked_tokens(x, mask, *t, positions), leaves)
    predicted, img, mask = loss_inputs(2, 3, (1, 2), 2).values()

    def loss(p):
        return masked_loss(p, img, mask, patch_size=2, norm_pix=True)

    assert torch.autograd.gradcheck(loss, [predicted.requires_grad_()])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_as_close_as_plain_pytorch(dtype):
    """Patches and predictions in ``dtype``, all else in float32, as under autocast on a GPU."""
    dy = torch.randn(8, 10, 16, dtype=torch.float64)
    exact = tokens_inputs(8, 9, 16)
    wide = dict.fromkeys(exact, torch.float32)
    exact = {k: t.double() for k, t in cast(exact, **{**wide, "x": dtype}).items()}
    inputs = cast(exact, **{**wide, "x": dtype})
    exact["mask_token"] = exact["mask_token"].to(dtype).double()
    want = with_gradients(masked_tokens_reference, exact, dy)
    plain = with_gradients(masked_tokens_reference, inputs, dy)
    got = with_gradients(masked_tokens, inputs, dy)
    assert_as_close_as_plain(got, plain, want)
    narrow = with_gradients(masked_tokens, inputs, dy.to(dtype), dtype=dtype)
    assert narrow["y"].dtype == dtype
    assert torch.equal(narrow["y"], got["y"].to(dtype))
    exact = loss_inputs(4, 3, (2, 4), 2)
    inputs = cast(exact, predicted=dtype, img=torch.float32, mask=torch.float32)
    exact = {k: t.double() for k, t in inputs.items()}
    options = {"patch_size": 2, "norm_pix": True}
    one = torch.tensor(1.0)
    want = with_gradients(masked_loss_reference, exact, one, **options)
    plain = with_gradients(masked_loss_reference, inputs, one, **options)
    got = with_gradients(masked_loss, inputs, one, **options)
    assert_as_close_as_plain(got, plain, want)


def test_what_is_not_counted_is_not_looked_at():
    inputs = loss_inputs(3, 3, (2, 4), 2)
    want = with_gradients(masked_loss, inputs, torch.tensor(2.0), patch_size=2)
    none = inputs["mask"] == 0
    assert none.any()
    whole = inputs["predicted"].masked_fill(none[..., None], float("nan"))
    given = {**inputs, "predicted": whole}
    got = with_gradients(masked_loss, given, torch.tensor(2.0), patch_size=2)
    assert_equal_results(got, want, "nan")
    tokens = tokens_inputs(3, 5, 8)
    hidden = {**tokens, "x": tokens["x"].masked_fill(tokens["mask"][..., None] > 0, float("nan"))}
    assert torch.equal(masked_tokens(**hidden), masked_tokens(**tokens))


def test_a_prediction_written_to_before_the_backward_pass_is_noticed():
    inputs = loss_inputs(1, 1, (1, 2), 2)
    leaf = inputs["predicted"].clone().requires_grad_()
    predicted = leaf * 1
    loss = masked_loss(predicted, inputs["img"], inputs["mask"], patch_size=2)
    with torch.no_grad():
        predicted.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_input():
    tokens, loss = tokens_inputs(2, 3, 4), loss_inputs(2, 1, (1, 2), 2)
    for name, words in {
        "x": r"mask of shape \(1, 3\)", "mask": r"mask of shape \(2, 3\)",
        "mask_token": r"mask_token of shape \(1, 1, 4\)",
        "cls_token": r"cls_token of shape \(1, 1, 4\)",
        "positions": r"positions of shape \(1, 4, 4\)",
    }.items():  # fmt: skip
        t = tokens[name]
        wrong = t[:1] if t.shape[0] > 1 else t[..., 1:]
        with pytest.raises(ValueError, match=f"masked_tokens: expected {words}"):
            masked_tokens(**{**tokens, name: wrong})
    with pytest.raises(ValueError, match=r"masked_loss: expected img .* of whole patches of 3"):
        masked_loss(**loss, patch_size=3)
    with pytest.raises(ValueError, match=r"masked_loss: expected predicted of shape \(2, 8, 1\)"):
        masked_loss(**loss, patch_size=1)
    with pytest.raises(ValueError, match=r"masked_loss: expected mask of shape \(2, 2\)"):
        masked_loss(**{**loss, "mask": loss["mask"][:1]}, patch_size=2)
    with pytest.raises(TypeError, match="masked_loss: expected tensors of dtype"):
        masked_loss(**{**loss, "predicted": loss["predicted"].int()}, patch_size=2)
