"""tied_rotary in Triton's interpreter: widths that are no power of two, strides, row ends."""

from __future__ import annotations

import pytest
import torch
from helpers import HALVES, angles, assert_as_close_as_plain, published_rotary, results

from crate_kernels.rotary import triton_kernels


def op(w, cos, sin, *, heads, norm_eps=None):
    return torch.ops.crate_kernels.tied_rotary(w, cos, sin, heads, norm_eps, "triton")[0]


def check(shape, heads, dtype, change=lambda t: t, table=torch.float32, dy=None, **options):
    w = torch.randn(shape).to(dtype)
    dy = torch.randn(shape).to(dtype) if dy is None else dy
    cos, sin = (t.to(table) for t in angles(shape[-2], shape[-1] // heads))

    def run(function):
        return lambda w: function(w, cos, sin, heads=heads, **options)

    plain = results(run(published_rotary), {"w": w}, dy)
    exact = results(run(published_rotary), {"w": w}, dy, torch.float64)
    leaf = change(w).detach().requires_grad_()
    y = run(op)(leaf)
    assert y.is_contiguous()
    y.backward(change(dy))
    assert_as_close_as_plain({"y": y.detach(), "dw": leaf.grad}, plain, exact, (shape, options))


@pytest.mark.parametrize("options", [{}, {"norm_eps": 1e-6}])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_shapes(dtype, options, monkeypatch):
    monkeypatch.setattr(triton_kernels, "TILE", 32)
    for shape, heads in [((2, 5, 48), 2), ((1, 1, 2), 1), ((9, 40), 2), ((3, 7, 96), 3)]:
        check(shape, heads, dtype, table=torch.bfloat16, **options)


def test_as_chosen():
    check((2, 21, 128), 2, torch.float32, norm_eps=1e-6)


@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_strides_and_expanded_gradients(norm_eps):
    for change in (
        lambda t: t.mT.contiguous().mT,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        check((2, 5, 16), 2, torch.float32, change, norm_eps=norm_eps)
    for shape in ((1, 1, 1), (2, 1, 16), (1, 5, 16)):
        dy = torch.randn(shape).expand(2, 5, 16)
        check((2, 5, 16), 2, torch.float32, dy=dy, norm_eps=norm_eps)


def test_nan_stays_in_its_head_and_row():
    w = torch.randn(2, 5, 16)
    w[1, 2, 3] = float("nan")
    got = results(
        lambda w: op(w, *(t.float() for t in angles(5, 8)), heads=2, norm_eps=0.1),
        {"w": w},
        torch.ones_like(w),
    )
    for t in got.values():
        assert t[1, 2, :8].isnan().all()
        t[1, 2, :8] = 0
        assert t.isfinite().all()


def test_opcheck():
    w, cos, sin = torch.randn(2, 5, 16), *torch.randn(2, 5, 4)
    ops = torch.ops.crate_kernels
    for norm_eps in (None, 1e-6):
        leaf = w.clone().requires_grad_()
        torch.library.opcheck(ops.tied_rotary, (leaf, cos, sin, 2, norm_eps, "triton"))
        y, rstd = ops.tied_rotary(w, cos, sin, 2, norm_eps, "triton")
        saved = (w, None if norm_eps is None else y, rstd, cos, sin, 2, "triton")
        torch.library.opcheck(ops.tied_rotary_backward, saved)
    assert ops.tied_rotary(w[:0], cos, sin, 2, 0.1, "triton")[0].shape == (0, 5, 16)
