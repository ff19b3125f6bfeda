"""patch_embedding against the published stem, on torch's CPU kernels."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    assert_equal_results,
    patch_embedding_inputs,
    published_patch_embedding,
    results,
    without_class_token,
)

import crate_kernels
from crate_kernels import (
    patch_embedding,
    patch_embedding_reference,
    patch_embedding_reference_backward,
)

# batch, channels, patches up and across, patch_size, width
SHAPES = [
    (2, 3, (2, 3), (4, 4), 8),
    (1, 1, (1, 1), (2, 3), 5),
    (3, 2, (3, 1), (3, 2), 7),
]


def cases():
    for shape in SHAPES:
        inputs = patch_embedding_inputs(*shape)
        for eps in (1e-5, 1e-2):
            options = {"patch_size": shape[3], "eps": eps}
            yield (shape, eps, "cls"), inputs, options
            yield (shape, eps), without_class_token(inputs), options


def upstream(inputs, options):
    return torch.randn_like(published_patch_embedding(**inputs, **options))


def test_reference_and_its_gradients_equal_the_published_stem():
    for what, inputs, options in cases():
        dx = upstream(inputs, options)
        want = results(published_patch_embedding, inputs, dx, **options)
        got = results(patch_embedding_reference, inputs, dx, **options)
        assert_equal_results(got, want, what)
        by_hand = patch_embedding_reference_backward(dx, **inputs, **options)
        names = [f"d{name}" for name in inputs]
        got = dict(zip(names, [d for d in by_hand if d is not None], strict=True))
        assert_equal_results({"y": want["y"], **got}, want, what)


def test_float64_op_equals_the_published_stem():
    for what, inputs, options in cases():
        dx = upstream(inputs, options)
        got = results(patch_embedding, inputs, dx, **options)
        assert_equal_results(got, results(published_patch_embedding, inputs, dx, **options), what)
        with torch.no_grad():
            torch.testing.assert_close(patch_embedding(**inputs, **options), got["y"])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_as_close_as_plain_pytorch(dtype):
    inputs = patch_embedding_inputs(4, 3, (5, 4), (8, 8), 96)
    for given in (inputs, without_class_token(inputs)):
        given = {k: t.to(dtype) for k, t in given.items()}
        dx = upstream(given, {"patch_size": (8, 8)})
        got = results(patch_embedding, given, dx, patch_size=(8, 8))
        plain = results(published_patch_embedding, given, dx, patch_size=(8, 8))
        exact = results(published_patch_embedding, given, dx, torch.float64, patch_size=(8, 8))
        assert_as_close_as_plain(got, plain, exact, dtype)


def test_under_autocast_parameters_keep_their_dtype():
    inputs = {k: t.float() for k, t in patch_embedding_inputs(2, 3, (2, 3), (4, 4), 16).items()}
    for out_dtype in (None, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            got = results(
                patch_embedding, inputs, torch.ones(2, 7, 16), patch_size=(4, 4),
                out_dtype=out_dtype,
            )  # fmt: skip
        assert got.pop("y").dtype == (out_dtype or torch.bfloat16)
        assert all(d.dtype == torch.float32 for d in got.values())


def test_any_subset_of_gradients():
    inputs = patch_embedding_inputs(2, 3, (2, 3), (4, 4), 8)
    dx = torch.randn(2, 7, 8, dtype=torch.float64)
    want = results(published_patch_embedding, inputs, dx, patch_size=(4, 4))
    for name in inputs:
        leaves = {k: t.clone().requires_grad_(k == name) for k, t in inputs.items()}
        patch_embedding(**leaves, patch_size=(4, 4)).backward(dx)
        torch.testing.assert_close(leaves[name].grad, want[f"d{name}"])
        assert all(t.grad is None for k, t in leaves.items() if k != name)


def test_strides_of_any_kind():
    inputs = patch_embedding_inputs(2, 3, (2, 3), (4, 4), 8)
    dx = torch.ones(1, dtype=torch.float64).expand(2, 7, 8)
    want = results(published_patch_embedding, inputs, dx, patch_size=(4, 4))
    leaves = {k: torch.stack((t, t), -1)[..., 0].requires_grad_() for k, t in inputs.items()}
    leaves["img"] = inputs["img"].to(memory_format=torch.channels_last).requires_grad_()
    x = patch_embedding(**leaves, patch_size=(4, 4))
    x.backward(dx)
    assert x.is_contiguous()
    got = {"y": x.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}}
    assert_equal_results({k: t.contiguous() for k, t in got.items()}, want, "strided")


@pytest.mark.parametrize("keeps", [False, True])
def test_what_the_op_promises_is_what_it_gives(keeps):
    """torch.compile trusts the shapes, dtypes and strides of the fake implementations."""
    inputs = {k: t.float() for k, t in patch_embedding_inputs(2, 3, (2, 3), (4, 4), 8).items()}
    for name in ("bias", "norm1_weight", "cls_token"):
        inputs[name] = inputs[name].bfloat16()
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    ops, leaves = torch.ops.crate_kernels, list(inputs.values())
    options = ([4, 4], 1e-5)
    forward = (*leaves, *options, torch.bfloat16, torch.float32, keeps, "reference")
    x, *kept = found = ops.patch_embedding(*forward)
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in forward]
    promised = ops.patch_embedding(*meta)
    for a, b in zip(found, promised, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    if keeps:
        given = (torch.ones_like(x), *kept, *leaves, *options, [True] * 9, "reference")
        gradients = ops.patch_embedding_backward(*given)
        assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
        assert [g.shape for g in gradients] == [t.shape for t in leaves]
        assert all(g.is_contiguous() for g in gradients)


def test_compiles_into_one_graph():
    inputs = patch_embedding_inputs(2, 3, (2, 3), (4, 4), 8)
    dx = torch.randn(2, 7, 8, dtype=torch.float64)
    compiled = torch.compile(patch_embedding, fullgraph=True, backend="aot_eager")
    got = results(compiled, inputs, dx, patch_size=(4, 4))
    assert_equal_results(got, results(patch_embedding, inputs, dx, patch_size=(4, 4)), "compiled")


def test_only_a_wanted_gradient_of_the_image_keeps_it():
    inputs = patch_embedding_inputs(2, 3, (2, 3), (4, 4), 8)
    for wanted in (False, True):
        kept = []

        def pack(t, kept=kept):
            kept.append(t.data_ptr())
            return t

        leaves = {k: t.detach().requires_grad_(k != "img" or wanted) for k, t in inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            patch_embedding(**leaves, patch_size=(4, 4))
        assert (inputs["img"].data_ptr() in kept) == wanted


def test_empty_batch():
    inputs = patch_embedding_inputs(0, 3, (2, 3), (4, 4), 8)
    got = results(patch_embedding, inputs, torch.empty(0, 7, 8), patch_size=(4, 4))
    assert got["y"].shape == (0, 7, 8)
    assert all(not got[f"d{name}"].any() for name in inputs)


def test_gradcheck():
    inputs = patch_embedding_inputs(2, 1, (1, 2), (2, 1), 3)
    names = list(inputs)

    def run(*tensors):
        return patch_embedding(**dict(zip(names, tensors, strict=True)), patch_size=(2, 1))

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs.values()])


def test_double_backward_is_refused():
    inputs = patch_embedding_inputs(1, 1, (1, 2), (2, 2), 3)
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    x = patch_embedding(**leaves, patch_size=(2, 2))
    (dimg,) = torch.autograd.grad(x.square().sum(), leaves["img"], create_graph=True)
    with pytest.raises(RuntimeError, match="patch_embedding: double backward is not implemented"):
        dimg.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            {"img": torch.randn(3, 8, 12).double()},
            ValueError,
            r"img of shape \(B, C, H, W\) with H",
        ),
        ({"img": torch.randn(2, 3, 8, 10).double()}, ValueError, "a multiple of 4 and W of 4"),
        ({"patch_size": 4}, ValueError, "patch_size to be two ints > 0, got 4"),
        ({"patch_size": (4, 0)}, ValueError, "patch_size to be two ints > 0"),
        ({"weight": torch.randn(8, 47).double()}, ValueError, r"weight of shape \(8, 48\)"),
        ({"norm1_bias": torch.randn(8).double()}, ValueError, r"norm1_bias of shape \(48,\)"),
        ({"cls_token": None}, ValueError, "cls_token and pos_embedding together, got one"),
        ({"pos_embedding": torch.randn(1, 6, 8).double()}, ValueError, r"of shape \(1, 7, 8\)"),
        ({"eps": 0.0}, ValueError, "eps to be finite and > 0"),
        ({"bias": torch.randn(8)}, TypeError, "bias of the dtype of img"),
        ({"backend": "cuda"}, ValueError, "patch_embedding: expected arguments that backend"),
    ],
)
def test_bad_input(change, error, says):
    inputs = {**patch_embedding_inputs(2, 3, (2, 3), (4, 4), 8), "patch_size": (4, 4)}
    with pytest.raises(error, match=says):
        patch_embedding(**{**inputs, **change})


def test_explain():
    inputs = patch_embedding_inputs(2, 3, (2, 3), (4, 4), 8)
    found = crate_kernels.explain("patch_embedding", **inputs, patch_size=(4, 4))
    assert found.chosen == "reference" and found.reasons["triton"] and found.reasons["cuda"]
