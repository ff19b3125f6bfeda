"""crate_block against the published layer, on torch's CPU kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    HALVES,
    OF_A_CHAIN,
    assert_as_close_as_plain,
    assert_equal_results,
    block_inputs,
    off_the_blocks_kink,
    published_block,
    results,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import crate_kernels
from crate_kernels import crate_block, crate_block_reference, crate_block_reference_backward
from crate_kernels.block.of_few import LayerOfFew, encoder_of_few
from crate_kernels.block.op import PARAMETERS, chained_block
from crate_kernels.ista import gram_cache

SHAPES = [(2, 5, 2, 3, 4), (1, 1, 1, 4, 4), (3, 7, 1, 5, 5), (2, 33, 3, 4, 12)]
OPTIONS = [{}, {"causal": True, "eps": 1e-3}, {"scale": 0.7, "step_size": 0.3, "lambd": 0.5}]
MEMORY = ["default", "low"]


def named(function):
    """``function`` by name alone: w_out and b_out may be left out."""

    def run(**inputs):
        return function(**{"w_out": None, "b_out": None, **inputs})

    return run


def cases():
    for (b, n, h, hd, width), options in itertools.product(SHAPES, OPTIONS):
        for out in (True, False) if h * hd == width else (True,):
            inputs = block_inputs(b, n, h, hd, width, out=out)
            yield (b, n, h, hd, width, options, out), inputs, {"heads": h, **options}


def test_reference_and_its_gradients_equal_the_published_layer():
    for what, inputs, options in cases():
        dy = torch.randn_like(inputs["x"])
        want = results(published_block, inputs, dy, **options)
        got = results(named(crate_block_reference), inputs, dy, **options)
        assert_equal_results(got, want, what)
        by_hand = named(crate_block_reference_backward)(dy=dy, **inputs, **options)
        names = [f"d{name}" for name in ("x", *PARAMETERS)]
        got = {name: d for name, d in zip(names, by_hand, strict=True) if d is not None}
        assert_equal_results({"y": want["y"], **got}, want, what)


@pytest.mark.parametrize("memory", MEMORY)
def test_float64_op_equals_the_published_layer(memory):
    for what, inputs, options in cases():
        dy = torch.randn_like(inputs["x"])
        got = results(named(crate_block), inputs, dy, memory=memory, **options)
        assert_equal_results(got, results(published_block, inputs, dy, **options), what)
        with torch.no_grad():
            y = named(crate_block)(**inputs, **options)
        torch.testing.assert_close(y, got["y"])


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_as_close_as_plain_pytorch(dtype, memory):
    for b, n, h, hd in [(2, 50, 3, 16), (3, 17, 1, 20)]:
        inputs = {k: t.to(dtype) for k, t in block_inputs(b, n, h, hd).items()}
        dy = off_the_blocks_kink(torch.randn_like(inputs["x"]), inputs, heads=h)
        got = results(crate_block, inputs, dy, heads=h, memory=memory)
        plain = results(published_block, inputs, dy, heads=h)
        exact = results(published_block, inputs, dy, torch.float64, heads=h)
        assert_as_close_as_plain(got, plain, exact, (b, n, h, hd))


def test_under_autocast_parameters_keep_their_dtype():
    inputs = {k: t.float() for k, t in block_inputs(2, 9, 2, 8).items()}
    dy = torch.randn_like(inputs["x"]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = results(crate_block, inputs, dy, heads=2)
    exact = results(published_block, inputs, dy, torch.float64, heads=2)
    assert got.pop("y").dtype == torch.bfloat16
    for name, d in got.items():
        assert d.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(d.flatten(), exact[name].flatten(), 0) > 0.99


def test_low_memory_keeps_less_and_gives_the_same():
    inputs = {k: t.float() for k, t in block_inputs(2, 40, 2, 8).items()}
    dy, size = torch.randn_like(inputs["x"]), inputs["x"].numel()
    kept, got = {}, {}
    for memory in MEMORY:
        saved = {}

        def pack(t, saved=saved):
            saved[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            got[memory] = results(crate_block, inputs, dy, heads=2, memory=memory)
        kept[memory] = sum(t.numel() == size for t in saved.values())
    assert kept == {"default": 5, "low": 4}  # y among them, which the next layer keeps as its x
    for name, t in got["low"].items():
        torch.testing.assert_close(t, got["default"][name])


@pytest.mark.parametrize("memory", MEMORY)
def test_any_subset_of_gradients(memory):
    inputs = block_inputs(2, 5, 2, 4)
    dy = torch.randn_like(inputs["x"])
    want = results(published_block, inputs, dy, heads=2)
    for name in inputs:
        leaves = {k: t.clone().requires_grad_(k == name) for k, t in inputs.items()}
        crate_block(**leaves, heads=2, memory=memory).backward(dy)
        torch.testing.assert_close(leaves[name].grad, want[f"d{name}"])
        assert all(t.grad is None for k, t in leaves.items() if k != name)


def test_strides_of_any_kind():
    inputs = block_inputs(2, 5, 2, 4)
    dy = torch.ones(1, dtype=torch.float64).expand(2, 5, 8)
    want = results(published_block, inputs, dy, heads=2)
    leaves = {k: torch.stack((t, t), -1)[..., 0].requires_grad_() for k, t in inputs.items()}
    y = crate_block(**leaves, heads=2)
    y.backward(dy)
    assert y.is_contiguous()
    got = {"y": y.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}}
    assert_equal_results({k: t.contiguous() for k, t in got.items()}, want, "strided")


@pytest.mark.parametrize("memory", MEMORY)
def test_gradients_are_as_compiled_code_expects_them(memory):
    """Contiguous, in each parameter's own dtype, whatever the others' and its strides are."""
    inputs = {k: t.float() for k, t in block_inputs(2, 9, 2, 8).items()}
    for k in ("b_out", "norm1_weight", "norm2_bias", "w_qkv"):
        inputs[k] = inputs[k].bfloat16()
    for k in ("w_qkv", "w_out", "weight"):
        inputs[k] = inputs[k].t().contiguous().t()
    leaves = [inputs[name] for name in ("x", *PARAMETERS)]
    ops, options, places = torch.ops.crate_kernels, (2, 8**-0.5, False, 1e-5, 0.1), (False, False)
    rest = (*places, memory, "reference", "reference")
    given = (*leaves, None, None, [], [], torch.bfloat16, *options, 0.1)
    y, _, xc, *kept, _ = ops.crate_block(*given, *rest)
    given = (torch.ones_like(y), xc, *kept, y, *leaves[1:], [True] * 9, *options)
    found = ops.crate_block_backward(*given, *rest)
    assert [g.dtype for g in found] == [y.dtype, *(t.dtype for t in leaves[1:])]
    assert all(g.is_contiguous() for g in found)


def test_two_layers_may_share_a_mask():
    """dx with zeros where x has them changes no gradient of the layer before, which masks less."""
    options = {**OF_A_CHAIN, "heads": 2}
    first, second = (block_inputs(2, 9, 2, 8) for _ in range(2))
    second.pop("x")
    found = []
    for chained in (False, True):
        leaves = [{k: t.clone().requires_grad_() for k, t in p.items()} for p in (first, second)]
        x, *rest = (leaves[0][name] for name in ("x", *PARAMETERS))
        y, moments = chained_block(x, None, *rest, follows=False, precedes=chained, **options)
        seen = []
        y.register_hook(seen.append)
        rest = [leaves[1][name] for name in PARAMETERS]
        out, _ = chained_block(y, moments, *rest, follows=chained, precedes=False, **options)
        out.square().sum().backward()
        assert torch.equal(seen[0] == 0, y == 0) == chained
        found.append([t.grad for p in leaves for t in p.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_graph_captured_without_gradients_can_be_trained():
    inputs = block_inputs(2, 5, 2, 4)
    names = list(inputs)

    def run(*tensors):
        return crate_block(**dict(zip(names, tensors, strict=True)), heads=2)

    with torch.no_grad():
        graph = make_fx(run)(*inputs.values())
    dy = torch.randn_like(inputs["x"])
    got = results(lambda **given: graph(*given.values()), inputs, dy)
    assert_equal_results(got, results(published_block, inputs, dy, heads=2), "captured")


@pytest.mark.parametrize("selective", [False, True])
def test_checkpoint(selective):
    inputs = block_inputs(2, 5, 2, 4)
    dy = torch.randn_like(inputs["x"])

    def policy(ctx, op, *args, **kwargs):
        ours = op == torch.ops.crate_kernels.crate_block.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def run(**leaves):
        options = {"use_reentrant": False}
        if selective:
            options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)
        return checkpoint(lambda: crate_block(**leaves, heads=2), **options)

    want = results(published_block, inputs, dy, heads=2)
    assert_equal_results(results(run, inputs, dy), want, selective)


def test_inference_keeps_the_gram_matrix():
    inputs = block_inputs(2, 5, 2, 4)
    with torch.no_grad():
        first = crate_block(**inputs, heads=2)
        assert inputs["weight"] in gram_cache._entries
        inputs["weight"].data.mul_(1.5)
        second = crate_block(**inputs, heads=2)
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, published_block(**inputs, heads=2))


def test_empty_batch():
    inputs = block_inputs(0, 5, 2, 4)
    got = results(crate_block, inputs, torch.empty(0, 5, 8), heads=2)
    assert got["y"].shape == (0, 5, 8)
    assert torch.equal(got["dw_qkv"], torch.zeros(8, 8, dtype=torch.float64))


@pytest.mark.parametrize("memory", MEMORY)
def test_gradcheck(memory):
    inputs = [t.requires_grad_() for t in block_inputs(1, 3, 1, 4).values()]
    names = list(block_inputs(1, 3, 1, 4))

    def run(*tensors):
        return crate_block(**dict(zip(names, tensors, strict=True)), heads=1, memory=memory)

    assert torch.autograd.gradcheck(run, inputs)


def test_double_backward_is_refused():
    x = {k: t.requires_grad_() for k, t in block_inputs(1, 3, 1, 4).items()}
    y = crate_block(**x, heads=1)
    (dx,) = torch.autograd.grad(y.sum(), x["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="crate_block: double backward is not implemented"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.randn(5, 8).double()}, ValueError, r"x of shape \(B, N, D\)"),
        ({"norm1_bias": torch.randn(7).double()}, ValueError, r"norm1_bias of shape \(8,\), got"),
        ({"weight": torch.randn(8, 7).double()}, ValueError, r"weight of shape \(8, 8\)"),
        ({"w_out": None}, ValueError, "b_out only together with w_out"),
        ({"w_out": torch.randn(8, 9).double()}, ValueError, r"w_out of shape \(8, 8\)"),
        ({"heads": 3}, ValueError, "heads to divide the projected width 8"),
        ({"memory": "none"}, ValueError, r"memory to be one of \('default', 'low'\), got 'none'"),
        ({"eps": 0.0}, ValueError, "eps to be finite and > 0"),
        ({"lambd": -1.0}, ValueError, "lambd to be finite and >= 0"),
        ({"backend": "cuda"}, ValueError, "crate_block: expected arguments that backend='cuda'"),
        ({"norm2_weight": torch.ones(8)}, TypeError, "norm2_weight of the dtype of x"),
    ],
)
def test_bad_input(change, error, says):
    with pytest.raises(error, match=says):
        crate_block(**{**block_inputs(2, 5, 2, 4), "heads": 2, **change})


def test_explain():
    inputs = block_inputs(2, 5, 2, 4)
    found = crate_kernels.explain("crate_block", **inputs, heads=2)
    assert found.chosen == "reference"
    assert found.reasons["triton"] and "cuda" in found.reasons
    wide = {k: t.bfloat16() for k, t in block_inputs(1, 3, 2, 50).items()}
    found = crate_kernels.explain("crate_block", **wide, heads=2)
    assert any("D = 100" in reason for reason in found.reasons["cuda"])  # ISTA's


def test_layers_of_few_rows():
    """With the norms folded into its products by hand, the op makes the layers."""
    x = y = block_inputs(2, 7, 3, 4)["x"]
    layers, thresholds = [], []
    eps, step_size = 1e-5, 0.1
    for lambd in (0.2, 0.1):
        inputs = {**block_inputs(2, 7, 3, 4), "x": y}
        y = crate_block_reference(**inputs, heads=3, scale=0.5, step_size=step_size, lambd=lambd)
        u, w = inputs["w_qkv"] * inputs["norm1_weight"], inputs["weight"]
        towards = torch.eye(12, dtype=torch.float64) + step_size * (w - w.mT @ w)
        scales = 1 + torch.rand(12, dtype=torch.float64)
        g = (inputs["norm2_weight"][:, None] * towards).mT / scales[:, None]
        layers.append(
            LayerOfFew(
                *(u, u.sum(1), inputs["w_qkv"] @ inputs["norm1_bias"]),
                *(inputs["w_out"], inputs["b_out"]),
                *(g, scales, g.sum(1), inputs["norm2_bias"] @ towards),
            )
        )
        thresholds.append(step_size * lambd)
    got = encoder_of_few(x, layers, thresholds, heads=3, scale=0.5, eps=eps)
    torch.testing.assert_close(got, y)
