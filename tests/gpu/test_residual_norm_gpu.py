"""residual_norm on a GPU: every configuration and width of the models, repeatable; CRATE-alpha."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from helpers import HALVES, assert_as_close_as_plain, calls
from residuals import FORMS, both, cast, exactly, published_residual_norm, residual_inputs

from crate_kernels import explain, fuse, models, residual_norm

pytest.importorskip("crate_kernels.residual_norm.triton_kernels")

REPEATS = 20
WIDTHS = [192, 384, 576, 768, 1024, 1280]
# Of x, of y, and autocast's.
DTYPES = [(d, d, None) for d in (*HALVES, torch.float32)]
DTYPES += [(torch.float32, y, c) for c in HALVES for y in (c, torch.float32)]


def inputs_on_gpu(shape, form, x_dtype, y_dtype, mean=0.5):
    inputs = {k: t.cuda() for k, t in residual_inputs(*shape, form=form, mean=mean).items()}
    return cast(inputs, x_dtype, y_dtype)


def check(shape, form, x_dtype, y_dtype, autocast, mean=0.5, **options):
    inputs = inputs_on_gpu(shape, form, x_dtype, y_dtype, mean)
    # The upstream gradients in the dtypes of z and h.
    dz = torch.randn(shape, device="cuda").to(x_dtype)
    dh = torch.randn(shape, device="cuda").to(autocast or x_dtype)
    got = both(residual_norm, inputs, dz, dh, autocast, backend="triton", **options)
    plain = both(published_residual_norm, inputs, dz, dh, autocast, **options)
    exact = exactly(inputs, dz, dh, **options)
    assert_as_close_as_plain(got, plain, exact, (shape, form, mean, options))
    for _ in range(REPEATS):
        again = both(residual_norm, inputs, dz, dh, autocast, backend="triton", **options)
        assert all(torch.equal(again[name], t) for name, t in got.items())


@pytest.mark.parametrize(("x_dtype", "y_dtype", "autocast"), DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("d", WIDTHS)
def test_as_close_as_plain_and_repeatable(d, form, x_dtype, y_dtype, autocast):
    for rows in ((1,), (3, 197)):
        check((*rows, d), form, x_dtype, y_dtype, autocast)


# As between the layers of CRATE-MAE's decoder, whose stream is in autocast's dtype.
@pytest.mark.parametrize(
    ("x_dtype", "y_dtype", "autocast"), [*DTYPES, *((c, c, c) for c in HALVES)], ids=str
)
@pytest.mark.parametrize("scale", [-1, -1.0, 0.25, 1])
@pytest.mark.parametrize("d", [100, 768])
def test_a_scale_that_is_a_number(d, scale, x_dtype, y_dtype, autocast):
    for rows in ((1,), (3, 197)):
        check((*rows, d), "residual", x_dtype, y_dtype, autocast, scale=scale)


def test_many_differences():
    check((256 * 197, 768), "residual", *[torch.bfloat16] * 3, scale=-1.0)


@pytest.mark.parametrize("d", [1, 8, 20, 100, 1000, 1536, 4096])
def test_other_widths(d):
    if d == 1:  # no row of one element has a variance
        inputs = inputs_on_gpu((5, 1), "scaled", *[torch.float32] * 2)
        z, h = residual_norm(**inputs, backend="triton")
        assert torch.equal(h, inputs["bias"].expand(5, 1)) and z.isfinite().all()
        return
    for form in FORMS:
        check((700, d), form, torch.float32, torch.bfloat16, torch.bfloat16)


def test_many_rows_and_a_mean_far_from_zero():
    check((128 * 197, 768), "scaled", torch.float32, torch.bfloat16, torch.bfloat16)
    check((591, 768), "residual", torch.float32, torch.bfloat16, torch.bfloat16, mean=30.0)


@pytest.mark.parametrize("used", ["z", "h"])
def test_one_result_may_stay_unused(used):
    inputs = inputs_on_gpu((2, 197, 768), "scaled", *[torch.float32] * 2)
    g = torch.randn(2, 197, 768, device="cuda")
    given = (g, None) if used == "z" else (None, g)
    got = both(residual_norm, inputs, *given, backend="triton")
    plain = both(published_residual_norm, inputs, *given)
    assert_as_close_as_plain(got, plain, exactly(inputs, *given), used)


def test_strides_and_expanded_gradients():
    inputs = inputs_on_gpu((4, 33, 64), "scaled", *[torch.float32] * 2)
    turned = {k: t.mT.contiguous().mT if t.dim() > 1 else t for k, t in inputs.items()}
    dz = torch.randn(1, 1, 64, device="cuda").expand(4, 33, 64)
    dh = torch.randn(4, 1, 1, device="cuda").expand(4, 33, 64)
    got = both(residual_norm, turned, dz, dh, backend="triton")
    plain = both(published_residual_norm, inputs, dz, dh)
    assert_as_close_as_plain(got, plain, exactly(inputs, dz, dh))


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(form):
    inputs = inputs_on_gpu((0, 197, 768), form, torch.float32, torch.float32)
    empty = torch.empty(0, 197, 768, device="cuda")
    got = both(residual_norm, inputs, empty, empty)
    assert got["z"].shape == got["h"].shape == (0, 197, 768)
    assert not any(got[f"d{name}"].any() for name in inputs)


def test_auto_takes_triton():
    inputs = inputs_on_gpu((5, 64), "scaled", *[torch.bfloat16] * 2)
    found = explain("residual_norm", **inputs)
    assert found.chosen == "triton"
    assert "residual_norm: no CUDA kernels are built for it" in found.reasons["cuda"]


# ---- CRATE-alpha


def of_model(model, img, autocast):
    """The head on every token, and every gradient."""
    model.zero_grad()
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        y = model.mlp_head(model.forward_features(img))
    (y.double() * torch.arange(y.numel(), device="cuda").view(y.shape).cos()).sum().backward()
    return {"y": y.detach(), **{f"d{k}": p.grad for k, p in model.named_parameters()}}


@pytest.mark.parametrize("autocast", [*HALVES, None], ids=str)
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_encoder(layer_scale, autocast):
    """A fused model is as close to float64 as the published one: by the mean square and the median
    over batches, since a single code on its relu's other side may outweigh all rounding."""
    torch.manual_seed(0)
    size = {"image_size": 64, "patch_size": 8, "dim": 192, "depth": 3, "heads": 3}
    plain = models.CRATEAlpha(num_classes=10, layer_scale=layer_scale, **size).cuda()
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    assert "1 AlphaEncoder" in str(fuse(fused))
    ratios = {}
    for _ in range(7):
        img = torch.randn(8, 3, 64, 64, device="cuda")
        got, published = (of_model(m, img, autocast) for m in (fused, plain))
        for name, want in of_model(exact, img.double(), None).items():
            assert got[name].dtype == published[name].dtype
            error, of_plain = ((t[name].double() - want).norm() for t in (got, published))
            floor = 2 * torch.finfo(torch.float32).eps * want.norm()
            ratios.setdefault(name, []).append((error / torch.maximum(of_plain, floor)).item())
    for name, several in ratios.items():
        assert statistics.median(several) <= (3 if name.startswith("d") else 2), (name, several)


def test_encoder_runs_fused():
    model = models.crate_alpha_tiny(depth=2).cuda()
    fuse(model)
    img = torch.randn(2, 3, 224, 224, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        x = model.transformer(torch.randn(2, 197, 192, device="cuda"))
        _, count = calls(model, img)
    assert x.dtype == torch.float32
    assert count["residual_norm"] == 4 and count["overcomplete_ista"] == 2
