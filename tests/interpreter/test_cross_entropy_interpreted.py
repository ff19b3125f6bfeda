"""cross_entropy in Triton's interpreter: as close as plain PyTorch, fresh memory is NaN."""

from __future__ import annotations

import pytest
import torch
from cross_entropies import (
    cross_entropy_inputs,
    exactly,
    loss_and_gradient,
    published_cross_entropy,
)
from helpers import assert_as_close_as_plain

from crate_kernels import cross_entropy
from crate_kernels.cross_entropy import triton_kernels

SHAPES = [((1,), 1), ((5,), 7), ((2, 3), 1000), ((3,), 4096), ((2,), 4097), ((2,), 9000)]


def ours(*args, **options):
    return cross_entropy(*args, backend="triton", **options)


def check(logits, labels, **options):
    got = loss_and_gradient(ours, logits, labels, **options)
    plain = loss_and_gradient(published_cross_entropy, logits, labels, **options)
    what = (tuple(logits.shape), logits.dtype, options)
    # The interpreter cuts off what it should round to bfloat16.
    unit = 2**-7 if logits.dtype == torch.bfloat16 else None
    assert got["dlogits"].is_contiguous()
    assert_as_close_as_plain(got, plain, exactly(logits, labels, **options), what, unit)
    again = loss_and_gradient(ours, logits, labels, **options)
    assert all(torch.equal(again[name], t) for name, t in got.items())
    if not options.get("with_bias"):
        check(logits, labels, with_bias=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "v"), SHAPES, ids=str)
def test_as_close_as_plain(rows, v, dtype):
    for ignore_index, label_dtype, mean in ((-100, torch.int64, 0.0), (1, torch.int32, 30.0)):
        logits, labels = cross_entropy_inputs(*rows, v=v, ignore_index=ignore_index, mean=mean)
        if ignore_index == 1 and v == 1:
            labels.zero_()
        check(logits.to(dtype), labels.to(label_dtype), ignore_index=ignore_index)


@pytest.mark.parametrize("rows", [127, 300])
def test_columns_summed_by_several_programs(rows):
    logits, labels = cross_entropy_inputs(rows, v=40)
    check(logits.float(), labels)
    without = loss_and_gradient(ours, logits.float(), labels)
    summed = loss_and_gradient(ours, logits.float(), labels, with_bias=True)
    assert torch.equal(summed["dlogits"], without["dlogits"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("v", [7, 1001, 4095])
def test_padded_and_narrowed(v, dtype):
    logits, labels = cross_entropy_inputs(2, 3, v=v)
    for padding in (1, 3, 5000):
        past = torch.full((2, 3, padding), float("nan"), dtype=torch.float64)
        wide = torch.cat((logits, past), -1).to(dtype)
        want = loss_and_gradient(ours, logits.to(dtype), labels, with_bias=True)
        for given, options in ((wide, {"vocab_size": v}), (wide[..., :v], {})):
            got = loss_and_gradient(ours, given, labels, with_bias=True, **options)
            assert torch.equal(got["y"], want["y"]) and torch.equal(got["dbias"], want["dbias"])
            assert torch.equal(got["dlogits"][..., :v], want["dlogits"])
            assert got["dlogits"].shape == given.shape and not got["dlogits"][..., v:].any()


def test_labels_that_count_for_nothing_and_labels_that_are_none():
    logits, labels = cross_entropy_inputs(6, v=9, ignored=0.0)
    logits = logits.float()
    labels[3] = -100
    want = loss_and_gradient(ours, logits, labels, with_bias=True)
    logits[3] = float("nan")
    got = loss_and_gradient(ours, logits, labels, with_bias=True)
    assert all(torch.equal(got[name], t) for name, t in want.items())
    assert not got["dlogits"][3].any()
    for label in (9, -1, 2**40):
        labels[3] = label
        got = loss_and_gradient(ours, logits.nan_to_num(), labels)
        assert got["y"].isnan() and got["dlogits"].isnan().all(-1).sum() == 1
        assert got["dlogits"][3].isnan().all()
    got = loss_and_gradient(ours, logits, torch.full_like(labels, -100))
    assert got["y"].isnan() and not got["dlogits"].any()
    got = loss_and_gradient(ours, logits[:0], labels[:0])
    assert got["y"].isnan() and got["dlogits"].shape == (0, 9)


def test_logits_that_are_not_finite():
    logits, labels = cross_entropy_inputs(4, v=5000, ignored=0.0)
    logits = logits.float()
    hidden = (labels[0] + 1 + torch.arange(4990)) % 5000
    logits[0, hidden] = -float("inf")
    check(logits, labels)
    for value in (-float("inf"), float("inf"), float("nan")):
        logits[1] = value
        got = loss_and_gradient(ours, logits, labels)
        assert got["y"].isnan()
        assert got["dlogits"].isnan().all(-1).tolist() == [False, True, False, False]
    logits[1] = torch.finfo(torch.float32).min
    assert ours(logits[1:2], labels[1:2]).item() == pytest.approx(torch.tensor(5000.0).log())


def test_tiles_of_a_vocabulary():
    for v in (1, 7, 300, 50265, 50304):
        for size in (2, 4):
            config = triton_kernels.row_config(v, size)
            assert config.group * size == 16
            assert config.lanes * config.group <= 4096 and config.lanes >= 32 * config.num_warps
