"""residual_norm in Triton's interpreter: against torch's kernels, and as close as plain PyTorch."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from helpers import HALVES, assert_as_close_as_plain
from residuals import FORMS, both, cast, exactly, published_residual_norm, residual_inputs

from crate_kernels import residual_norm
from crate_kernels.residual_norm import torch_kernels, triton_kernels

SHAPES = [(7, 24), (33, 100), (1, 8), (26, 16), (2, 3, 5), (3, 1280)]
# Of x, of y, of the GEMMs.
DTYPES = [(d, d, d) for d in (torch.float32, *HALVES)] + [(torch.float32, d, d) for d in HALVES]
DTYPES += [(torch.float32, torch.float16, torch.bfloat16)]
DTYPES += [(torch.bfloat16, torch.float32, torch.bfloat16)]


def close(got, want):
    """One rounding of each output (which the interpreter cuts off), or sums of float32."""
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            unit = torch.finfo(a.dtype).eps
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2 * unit, atol=1e-5)


@pytest.mark.parametrize(("x_dtype", "y_dtype", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_passes(form, x_dtype, y_dtype, dtype, monkeypatch):
    config = triton_kernels.backward_config
    monkeypatch.setattr(  # so that one program has rows more than once
        triton_kernels, "backward_config", lambda d: dataclasses.replace(config(d), programs=2)
    )
    for shape in SHAPES if x_dtype == y_dtype == dtype else [(7, 24), (2, 3, 5)]:
        inputs = cast(residual_inputs(*shape, form=form), x_dtype, y_dtype)
        x, gamma, beta = (inputs[name] for name in ("x", "weight", "bias"))
        y, scale = (inputs.get(name) for name in ("y", "scale"))
        z_dtype = torch.promote_types(x_dtype, y_dtype) if y is not None else x_dtype
        given = (x, y, scale, gamma, beta, 1e-5, z_dtype, dtype)
        got, want = (k.forward(*given) for k in (triton_kernels, torch_kernels))
        close(got, want)
        z, _, stats = want
        z = x if z is None else z
        dz, dh = torch.randn(shape).to(z_dtype), torch.randn(shape).to(dtype)
        rows = z.numel() // z.shape[-1]
        for skip, wants_y, wants_scale in itertools.product((None, dz), *[(False, True)] * 2):
            if (wants_y and y is None) or (wants_scale and scale is None):
                continue
            added = (y if wants_scale else None, scale, x_dtype, y_dtype if wants_y else None)
            both = [
                k.backward(skip, dh, z, stats, gamma, *added)
                for k in (triton_kernels, torch_kernels)
            ]
            sums = [[None if s is None else s / rows for s in r[2:]] for r in both]
            close(both[0][:2], both[1][:2])
            close(*sums)


@pytest.mark.parametrize(("x_dtype", "y_dtype", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-1, 0.25])
def test_passes_with_a_number(scale, x_dtype, y_dtype, dtype):
    factor = float(scale)
    for shape in [(7, 24), (2, 3, 5)]:
        inputs = cast(residual_inputs(*shape, form="residual"), x_dtype, y_dtype)
        x, gamma, beta, y = inputs.values()
        given = (x, y, None, gamma, beta, 1e-5, torch.promote_types(x_dtype, y_dtype), dtype)
        got, want = (k.forward(*given, factor) for k in (triton_kernels, torch_kernels))
        close(got, want)
        z, _, stats = want
        dz, dh = torch.randn(shape).to(z), torch.randn(shape).to(dtype)
        given = (dz, dh, z, stats, gamma, None, None, x_dtype, y_dtype)
        close(*(k.backward(*given, factor) for k in (triton_kernels, torch_kernels)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_difference_is_as_close_as_plain(dtype):
    for shape in [(2, 9, 40), (3, 768)]:
        inputs = cast(residual_inputs(*shape, form="residual"), dtype, dtype)
        dz, dh = torch.randn(2, *shape).to(dtype)
        got = both(residual_norm, inputs, dz, dh, backend="triton", scale=-1)
        plain = both(published_residual_norm, inputs, dz, dh, scale=-1)
        assert_as_close_as_plain(got, plain, exactly(inputs, dz, dh, scale=-1), shape)
        assert torch.equal(got["z"], inputs["x"] - inputs["y"])


@pytest.mark.parametrize(("x_dtype", "c_dtype"), [(torch.float32,) * 2, (torch.float16,) * 2])
@pytest.mark.parametrize("form", FORMS)
def test_as_close_as_plain(form, x_dtype, c_dtype):
    """Not in bfloat16, where the interpreter cuts off what it should round."""
    for shape in [(2, 9, 40), (65, 96), (3, 768)]:
        inputs = cast(residual_inputs(*shape, form=form), x_dtype, c_dtype)
        dz, dh = torch.randn(2, *shape).to(x_dtype)
        got = both(residual_norm, inputs, dz, dh, backend="triton")
        plain = both(published_residual_norm, inputs, dz, dh)
        assert_as_close_as_plain(got, plain, exactly(inputs, dz, dh), (shape, form))
        again = both(residual_norm, inputs, dz, dh, backend="triton")
        assert all(torch.equal(again[name], t) for name, t in got.items())


def test_strides_expanded_gradients_and_no_rows():
    inputs = {k: t.float() for k, t in residual_inputs(2, 5, 16).items()}
    turned = {k: t.mT.contiguous().mT if t.dim() > 1 else t for k, t in inputs.items()}
    dz, dh = torch.randn(1, 1, 16).expand(2, 5, 16), torch.randn(2, 1, 1).expand(2, 5, 16)
    got = both(residual_norm, turned, dz, dh, backend="triton")
    plain = both(published_residual_norm, inputs, dz, dh)
    assert got["z"].is_contiguous() and got["h"].is_contiguous()
    assert_as_close_as_plain(got, plain, exactly(inputs, dz, dh))
    none = {k: t[:0] if t.dim() > 1 else t for k, t in inputs.items()}
    got = both(residual_norm, none, dz[:0], dh[:0], backend="triton")
    assert all(not got[f"d{name}"].any() for name in inputs)


def test_nan_stays_in_its_row():
    inputs = {k: t.float() for k, t in residual_inputs(3, 5, 24).items()}
    inputs["y"][1, 2, 3] = float("nan")
    got = both(residual_norm, inputs, *torch.randn(2, 3, 5, 24), backend="triton")
    for name in ("h", "dx", "dy"):
        assert got[name].isfinite().all(-1).sum() == 14 and got[name][1, 2].isnan().all(), name
