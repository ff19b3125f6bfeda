"""Learned and signed thresholds of ISTA in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_as_close_as_plain,
    off_the_threshold,
    published_thresholds,
    results,
    threshold_inputs,
)

from crate_kernels import ista

# Rows >= D go through A, fewer through the weight itself; more rows than one part of a sum has.
SHAPES = [(150, 33), (2, 20, 16), (10, 24), (3, 1)]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kinds", [("channel", "scalar"), ("one", "channel"), (None, "channel")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_close_as_plain(dtype, kinds, signed):
    for shape in SHAPES:
        inputs = {k: t.to(dtype) for k, t in threshold_inputs(*shape, kinds=kinds).items()}
        dy = off_the_threshold(torch.randn(shape).to(dtype), inputs, signed)
        got = results(ista, inputs, dy, signed=signed, backend="triton")
        plain = results(published_thresholds, inputs, dy, signed=signed)
        exact = results(published_thresholds, inputs, dy, torch.float64, signed=signed)
        assert_as_close_as_plain(got, plain, exact, (shape, kinds))
        with torch.no_grad():
            y = {"y": ista(**inputs, signed=signed, backend="triton")}
        assert_as_close_as_plain(y, {"y": plain["y"]}, {"y": exact["y"]}, (shape, "inference"))


def test_nan_is_kept():
    inputs = {k: t.float() for k, t in threshold_inputs(40, 16).items()}
    inputs["x"][3] = float("nan")
    for signed in (False, True):
        got = results(ista, inputs, torch.ones(40, 16), signed=signed, backend="triton")
        assert got["y"][3].isnan().all() and got["y"][:3].isfinite().all()
        assert all(got[f"d{name}"].isnan().all() for name in ("weight", "step_size"))
