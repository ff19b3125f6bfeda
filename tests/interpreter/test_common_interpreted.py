"""What all Triton kernels share."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from crate_kernels.triton_common import _for_tf32


@triton.jit
def _rounding_kernel(X, OUT, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(OUT + at, _for_tf32(tl.load(X + at), PRECISION))


def rounded(x, precision):
    out = torch.empty_like(x)
    _rounding_kernel[(1,)](x, out, N=x.numel(), PRECISION=precision)
    return out


def test_float32_is_rounded_to_the_nearest_tf32():
    x = torch.randn(1024) * 10.0 ** torch.randint(-30, 30, (1024,))
    got = rounded(x, "tf32")
    assert not (got.view(torch.int32) & 0x1FFF).any(), "TF32 has 10 bits after the point"
    assert ((got.double() - x.double()).abs() <= 2.0**-11 * x.double().abs()).all()
    assert 0.4 < (got.abs() > x.abs()).float().mean() < 0.6, "up as often as down"
    assert torch.equal(rounded(got, "tf32"), got)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1])
def test_nan_stays(bits):
    x = torch.full((16,), bits, dtype=torch.int32).view(torch.float32)
    assert x.isnan().all() and rounded(x, "tf32").isnan().all()


def test_inf_zero_and_other_precisions_stay():
    x = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])
    assert torch.equal(rounded(x, "tf32").view(torch.int32), x.view(torch.int32))
    x = torch.randn(64)
    assert torch.equal(rounded(x, "ieee"), x)
    assert torch.equal(rounded(x.half(), "tf32"), x.half())
