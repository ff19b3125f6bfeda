"""tied_embedding in Triton's interpreter: as close as plain PyTorch, fresh memory is NaN."""

from __future__ import annotations

import pytest
import torch
from embeddings import drawn_upstream, embedding_inputs, published_embedding, results
from helpers import assert_as_close_as_plain

from crate_kernels import tied_embedding
from crate_kernels.tied_embedding import torch_kernels, triton_kernels
from crate_kernels.tied_embedding.triton_kernels import PIECE

# A word has no token, a few, or so many that they are cut: into pieces.
SHAPES = [(1, 1, 1, 1), (2, 5, 7, 12), (2, 50, 4, 20), (3, 11, 60, 9)]


def ours(**inputs):
    return tied_embedding(**inputs, backend="triton")


def check(inputs, autocast, **options):
    inputs = {k: t.float() if t.is_floating_point() else t for k, t in inputs.items()}
    exact = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    upstream = drawn_upstream(inputs)
    got = results(ours, inputs, upstream, autocast, **options)
    plain = results(published_embedding, inputs, upstream, autocast, **options)
    # The interpreter cuts off what it should round to bfloat16.
    unit = 2**-7 if autocast == torch.bfloat16 else None
    wanted = results(published_embedding, exact, upstream, **options)
    assert_as_close_as_plain(got, plain, wanted, (autocast, options), unit)
    again = results(ours, inputs, upstream, autocast, **options)
    assert all(torch.equal(again[name], t) for name, t in got.items())
    return got, plain


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_close_as_plain(shape, autocast):
    for often in (0.0, 0.6):
        check(embedding_inputs(*shape, often=often), autocast)
        check(embedding_inputs(*shape, often=often, places=3), autocast, padding_idx=0)


@pytest.mark.parametrize("first", [0, 1, PIECE - 1, PIECE, PIECE + 1])
@pytest.mark.parametrize("count", [0, 1, PIECE, PIECE + 1, 5 * PIECE + 7])
def test_sums_of_whole_numbers_are_exact_wherever_a_row_begins(first, count):
    """``first`` tokens of row 0, then ``count`` of row 1, then some of row 2 and none of 3."""
    idx = torch.tensor([0] * first + [1] * count + [2] * 3)
    shuffled = torch.randperm(len(idx))
    dx, given = torch.randint(-8, 9, (len(idx), 5)).float(), torch.randint(-8, 9, (4, 5)).float()
    for add, skipped in ((None, -1), (given, 0), (given.half(), 1)):
        arguments = (dx[shuffled], idx[shuffled], add, 4, skipped, torch.float32)
        got, want = (kernels.add_rows(*arguments) for kernels in (triton_kernels, torch_kernels))
        assert torch.equal(got, want)


def test_indices_out_of_range_are_nan_and_add_to_no_gradient():
    inputs = embedding_inputs(2, 20, 6, 5, places=7)
    inputs = {k: t.float() if t.is_floating_point() else t for k, t in inputs.items()}
    upstream = drawn_upstream(inputs)
    for name, index in (("idx", -1), ("idx", 6), ("idx", 2**31 + 7), ("positions", 7)):
        given = {**inputs, name: inputs[name].clone()}
        given[name][1, 3] = index
        got = results(ours, given, upstream)
        nan = got["y"].isnan()
        assert nan[1, 3].all() and nan.sum() == 5
        kept = upstream[0].clone()
        kept[1, 3] = 0
        want = results(ours, inputs, (kept, upstream[1]))
        changed = "dweight" if name == "idx" else "dposition_weight"
        torch.testing.assert_close(got[changed], want[changed])


def test_nothing_for_no_tokens():
    inputs = embedding_inputs(0, 3, 5, 4)
    inputs = {k: t.float() if t.is_floating_point() else t for k, t in inputs.items()}
    upstream = drawn_upstream(inputs)
    got = results(ours, inputs, upstream, torch.float16)
    assert torch.equal(got["dweight"], upstream[1].float()) and not got["dposition_weight"].any()
