"""tied_rotary against the published rotation and norm, in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    HALVES,
    angles,
    assert_as_close_as_plain,
    assert_equal_results,
    published_attention,
    published_rotary,
    results,
)
from test_mssa import strided

from crate_kernels import (
    explain,
    tied_attention,
    tied_rotary,
    tied_rotary_reference,
    tied_rotary_reference_backward,
)

EPS = torch.finfo(torch.float32).eps  # F.rms_norm's
OPTIONS = [{}, {"norm_eps": EPS}, {"norm_eps": 0.1}]


def with_tables(function, n, head_dim, **options):
    """``function`` of w alone."""
    cos, sin = angles(n, head_dim)
    return lambda w: function(w, cos.to(w.dtype), sin.to(w.dtype), **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(2, 5, 12), (1, 1, 12), (7, 12), (0, 5, 12)])
def test_reference_op_and_gradients_equal_the_published_ones(shape, options):
    w = torch.randn(shape, dtype=torch.float64)
    dy, cos_sin = torch.randn_like(w), angles(shape[-2], 4)
    want, reference, op = (
        results(with_tables(f, shape[-2], 4, heads=3, **options), {"w": w}, dy)
        for f in (published_rotary, tied_rotary_reference, tied_rotary)
    )
    assert_equal_results({k: t.view(shape) for k, t in reference.items()}, want, "reference")
    assert_equal_results(op, want, "op")
    by_hand = tied_rotary_reference_backward(dy, w, *cos_sin, heads=3, **options)
    assert_equal_results({"y": want["y"], "dw": by_hand}, want, "by hand")


@pytest.mark.parametrize("function", [tied_rotary_reference, tied_rotary])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(function, options):
    w = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 3, 2, dtype=torch.float64)  # no rotation, which it need not be
    assert torch.autograd.gradcheck(lambda w: function(w, cos, sin, heads=2, **options), w)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("options", OPTIONS)
def test_as_close_as_plain_pytorch(dtype, options):
    w, dy = torch.randn(2, 3, 37, 128).to(dtype)
    cos, sin = (t.to(torch.bfloat16) for t in angles(37, 64))

    def run(function):
        return lambda w: function(w, cos, sin, heads=2, **options)

    got = results(run(tied_rotary), {"w": w}, dy)
    plain = results(run(published_rotary), {"w": w}, dy)
    exact = results(run(published_rotary), {"w": w}, dy, torch.float64)
    assert_as_close_as_plain(got, plain, exact)


def test_norm_and_rotation_commute_and_scores_know_distances_alone():
    """What the attention after it relies on: a token's length does not depend on its place."""
    w = torch.randn(1, 1, 16, dtype=torch.float64).expand(1, 9, 16)
    y = with_tables(tied_rotary, 9, 16, heads=1, norm_eps=0.0)(w)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(1, 9, dtype=torch.float64))
    scores = (y @ y.mT)[0]
    for k in range(9):
        diagonal = scores.diagonal(k)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_the_tied_attention_of_nanochat_crate():
    """Rotated and normed tokens are query, key and value: gradients go through both ops."""
    w, do = torch.randn(2, 2, 9, 16, dtype=torch.float64)
    rotary = {"heads": 2, "norm_eps": EPS}

    def ours(w):
        y = with_tables(tied_rotary, 9, 8, **rotary)(w)
        return tied_attention(y, heads=2, causal=True, window=4)

    def published(w):
        y = with_tables(published_rotary, 9, 8, **rotary)(w)
        return published_attention(y, heads=2, causal=True, window=4)

    got, want = (results(f, {"w": w}, do) for f in (ours, published))
    assert_equal_results(got, want, "rotary and attention")


def test_packed_tokens_take_the_angles_of_their_places():
    w = torch.randn(2, 5, 8, dtype=torch.float64)
    cos, sin = angles(5, 4)
    packed = tied_rotary(w.flatten(0, 1), cos.repeat(2, 1), sin.repeat(2, 1), heads=2)
    assert torch.equal(packed, tied_rotary(w, cos, sin, heads=2).flatten(0, 1))


def test_any_strides_and_expanded_gradients():
    w, do = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    for dy in (do, do[:1, :1].expand(2, 5, 8), torch.ones(1, dtype=w.dtype).expand(2, 5, 8)):
        want = results(with_tables(published_rotary, 5, 4, heads=2, norm_eps=0.1), {"w": w}, dy)
        leaf = strided(w).requires_grad_()
        y = with_tables(tied_rotary, 5, 4, heads=2, norm_eps=0.1)(leaf)
        assert y.is_contiguous()
        y.backward(dy)
        assert_equal_results({"y": y.detach(), "dw": leaf.grad}, want, dy.stride())


def test_w_is_not_kept_for_the_backward():
    w = torch.randn(1, 5, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = with_tables(tied_rotary, 5, 4, heads=2, norm_eps=0.1)(w)
    assert y.data_ptr() in {t.data_ptr() for t in kept}
    assert w.data_ptr() not in {t.data_ptr() for t in kept}


def test_double_backward_and_forward_mode_are_refused():
    w = torch.randn(1, 3, 4, requires_grad=True)
    run = with_tables(tied_rotary, 3, 2, heads=2, norm_eps=0.1)
    (grad,) = torch.autograd.grad(run(w).square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="tied_rotary: double backward is not implemented"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="forward-mode AD is not implemented"):
        torch.func.jvp(run, (w,), (w,))


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_fullgraph(options):
    w, dy = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    run = with_tables(tied_rotary, 5, 4, heads=2, **options)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_equal_results(results(compiled, {"w": w}, dy), results(run, {"w": w}, dy), options)


def test_cuda_does_not_have_it():
    found = explain("tied_rotary", torch.randn(1, 3, 4), *torch.randn(2, 3, 1), heads=2)
    assert found.chosen == "reference"
    assert "tied_rotary: the CUDA kernels do not have it" in found.reasons["cuda"]


REFUSED = {
    "rank": ({"w": torch.randn(1, 1, 3, 8)}, ValueError, r"w of shape \(B, N"),
    "heads": ({"heads": 3}, ValueError, "heads to divide"),
    "odd head_dim": ({"heads": 8}, ValueError, "an even head_dim, got 1"),
    "a longer table": ({"cos": torch.randn(4, 2)}, ValueError, r"= \(3, 2\), got \(4, 2\)"),
    "whole heads": ({"sin": torch.randn(3, 4)}, ValueError, r"sin of shape .* got \(3, 4\)"),
    "integers": ({"sin": torch.ones(3, 2).int()}, TypeError, "sin of a floating dtype"),
    "a number": ({"cos": 1.0}, TypeError, "cos to be a torch.Tensor"),
    "elsewhere": ({"cos": torch.ones(3, 2, device="meta")}, ValueError, "device of w, cpu"),
    "learned": ({"cos": torch.ones(3, 2, requires_grad=True)}, ValueError, "requires_grad"),
    "negative eps": ({"norm_eps": -1.0}, ValueError, "norm_eps to be finite and >= 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    change, error, match = REFUSED[case]
    given = {"w": torch.randn(1, 3, 8), "cos": torch.randn(3, 2), "sin": torch.randn(3, 2)}
    with pytest.raises(error, match=f"tied_rotary: expected.*{match}"):
        tied_rotary(**{**given, "heads": 2, **change})
