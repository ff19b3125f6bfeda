"""The white-box measures against plain float64 formulas, and what a trace does to a model."""

from __future__ import annotations

import copy
import csv
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_close_as_plain, calls
from layers_of_others import Attn, like, stack
from layers_of_others import tokens as tokens_of_others
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from crate_kernels import fuse, models, whitebox
from crate_kernels.models.crate import Transformer
from crate_kernels.whitebox import trace

DIM, HEADS, DIM_HEAD, DEPTH = 12, 3, 4, 3


# ---- the formulas, written out


def plain_rate(z, eps=0.01, normalise=True):
    """1/2 logdet(I + d / (N eps) Z Z^T) of one sample (N, d), by eigenvalues in z's dtype."""
    n, d = z.shape
    if normalise:
        z = z / z.norm(dim=-1, keepdim=True)
    return (
        torch.linalg.eigvalsh(torch.eye(n, dtype=z.dtype) + d / (n * eps) * z @ z.T).log().sum() / 2
    )


def published_rate(w, eps=0.01):
    """As the published analysis has it, N x N and without Cholesky: (B, H, N, p) -> (B,)."""
    w = w / torch.norm(w, dim=-1, keepdim=True)
    n, p = w.shape[-2:]
    gram = torch.eye(n, dtype=w.dtype) + p / (n * eps) * (w @ w.mT)
    return torch.logdet(gram).sum(-1) / 2


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 17, 5), (2, 3, 5, 17), (1, 1, 1, 4), (2, 9, 1)])
def test_coding_rate_is_the_formula_on_either_side(shape, normalise):
    z = torch.randn(*shape, dtype=torch.float64)
    got = whitebox.coding_rate(z, normalise=normalise)
    want = torch.stack([plain_rate(s, normalise=normalise) for s in z.flatten(0, -3)])
    torch.testing.assert_close(got.flatten(), want, rtol=1e-9, atol=1e-9)
    assert got.shape == shape[:-2]


@pytest.mark.parametrize("eps", [0.01, 0.5])
def test_compressed_rate_is_the_published_one(eps):
    w = torch.randn(2, 3, 11, 4, dtype=torch.float64)
    want = published_rate(w, eps)
    torch.testing.assert_close(whitebox.compressed_rate(w, eps), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whitebox.coding_rate(w, eps).sum(-1), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rates_are_as_close_as_plain_pytorch(dtype):
    """Against float64 of the same rounded tokens; plain PyTorch as published, in float32."""
    w = torch.randn(4, 6, 50, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):  # measures are their own business
        got = whitebox.compressed_rate(w)
    plain, exact = published_rate(w.float()), published_rate(w.double())
    assert got.dtype == torch.float32
    assert_as_close_as_plain({"rate": got}, {"rate": plain}, {"rate": exact})


def test_rates_have_gradients():
    z = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(whitebox.coding_rate, z)
    assert torch.autograd.gradcheck(lambda t: whitebox.coding_rate(t, normalise=False), z.mT)


def test_rates_of_what_is_not_plain():
    z = torch.randn(3, 5, 4)
    z[0, 2] = 0
    without = torch.cat([z[:1, :2], z[:1, 3:]], dim=1)
    # One token fewer, but divided by N = 5.
    want = whitebox.coding_rate(without, 0.01 * 5 / 4)
    torch.testing.assert_close(whitebox.coding_rate(z[:1]), want)
    for value in (torch.nan, torch.inf):
        z[1, 0, 0] = value
        assert whitebox.coding_rate(z).isnan().tolist() == [False, True, False]
    assert whitebox.coding_rate(z[:0]).shape == (0,)
    assert whitebox.compressed_rate(torch.randn(0, 2, 5, 4)).shape == (0,)


def test_sparsity():
    z = torch.tensor([[[0.0, -0.0], [1.0, torch.nan]], [[1.0, 1e-45], [2.0, 3.0]]])
    assert whitebox.sparsity(z).tolist() == [0.5, 0.0]
    assert whitebox.sparsity(z.bfloat16()).tolist() == [0.5, 0.25]  # 1e-45 rounds to zero there
    with pytest.raises(ValueError, match="expected z of shape"):
        whitebox.sparsity(z[:, :0])


def test_subspace_coherence():
    u = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    heads = torch.stack([u[:2], u[2:4], torch.randn(2, 2, dtype=torch.float64) @ u[:2]])
    want = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(whitebox.subspace_coherence(heads), want, rtol=1e-9, atol=1e-9)
    # A known angle between two lines.
    lines = torch.tensor([[[3.0, 0.0]], [[1.0, 1.0]]])
    torch.testing.assert_close(whitebox.subspace_coherence(lines)[0, 1].item(), 0.5**0.5)
    whole = whitebox.subspace_coherence(torch.randn(2, 5, 3))  # both heads are all of the space
    torch.testing.assert_close(whole, torch.ones(2, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_rows_are_rows_of_the_map(causal):
    w = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    scores = 0.3 * w @ w.mT
    if causal:
        scores += torch.full((7, 7), -torch.inf, dtype=w.dtype).triu(1)
    want = scores.softmax(-1)
    got = whitebox.attention_rows(w, [0, 5, -1], scale=0.3, causal=causal)
    torch.testing.assert_close(got, want[:, :, [0, 5, -1]])
    plain = whitebox.attention_rows(w, [2])
    torch.testing.assert_close(plain, (0.5 * w[:, :, 2:3] @ w.mT).softmax(-1))


BAD_CALLS = [
    (lambda: whitebox.coding_rate(torch.randn(4)), ValueError, "z of shape"),
    (lambda: whitebox.coding_rate(torch.randn(2, 0, 4)), ValueError, "N > 0"),
    (lambda: whitebox.coding_rate(torch.ones(2, 4, dtype=torch.int)), TypeError, "floating"),
    (lambda: whitebox.coding_rate([1.0]), TypeError, "floating"),
    (lambda: whitebox.coding_rate(torch.randn(2, 4), 0.0), ValueError, "eps to be finite and > 0"),
    (lambda: whitebox.compressed_rate(torch.randn(2, 4)), ValueError, "w of shape"),
    (lambda: whitebox.subspace_coherence(torch.randn(2, 4)), ValueError, "u of shape"),
    (lambda: whitebox.attention_rows(torch.randn(2, 4, 3), [0]), ValueError, "w of shape"),
    (lambda: whitebox.attention_rows(torch.randn(1, 1, 3, 2), [3]), ValueError, "the 3 tokens"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD_CALLS)
def test_measures_refuse(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---- a trace


def transformer(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return Transformer(DIM, DEPTH, HEADS, DIM_HEAD, **kwargs).to(dtype)


def tokens(batch=4, n=7, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, n, DIM, dtype=dtype)


def state_of(model):
    """All that a module holds, hooks included, by the identity of what is held."""
    kept = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            kept[name, key] = (id(value), list(value.items()) if isinstance(value, dict) else None)
    return kept


def by_published_hooks(model, x):
    """R^c, zeros and the class token's attention, by hooks on qkv and on the ISTA step."""
    rates, zeros, maps, tokens_in = [], [], [], []
    for attn, ff in model.layers:

        def see(module, args, w, scale=attn.fn.scale):
            w = w.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            rates.append(published_rate(w.double()))
            maps.append((scale * w @ w.mT).softmax(-1))
            tokens_in.append(args[0])

        attn.fn.qkv.register_forward_hook(see)
        ff.register_forward_hook(
            lambda module, args, y: zeros.append((y == 0).double().mean((1, 2)))
        )
    model(x)
    return rates, zeros, maps, tokens_in


@pytest.mark.parametrize("how", ["unfused", "fused", "layers fused apart"])
def test_numbers_are_those_of_the_published_hooks(how):
    model = transformer()
    x = tokens()
    rates, zeros, maps, tokens_in = by_published_hooks(copy.deepcopy(model), x)
    if how == "fused":
        assert len(fuse(model)) == 1 + 2 * DEPTH
    elif how == "layers fused apart":
        model.forward = model.forward  # of this instance: fuse leaves the encoder alone
        assert len(fuse(model)) == 2 * DEPTH
    with trace(model, attention={"queries": [0, -1], "heads": [2, 0]}) as t:
        _, count = calls(model, x)
    wanted = {"unfused": {}, "fused": {"crate_block": DEPTH}}
    assert count == wanted.get(how, {"tied_attention": DEPTH, "ista": DEPTH})
    for layer in range(DEPTH):
        torch.testing.assert_close(t.values("compressed_rate", layer), rates[layer])
        torch.testing.assert_close(t.values("sparsity", layer), zeros[layer])
        torch.testing.assert_close(t.attention(layer), maps[layer][:, [2, 0]][:, :, [0, -1]])
        z = torch.stack([plain_rate(s) for s in tokens_in[layer]])
        torch.testing.assert_close(t.values("coding_rate", layer), z)
        difference = t.values("rate_reduction", layer)
        torch.testing.assert_close(difference, z - rates[layer])
        row = t.table().rows[layer]
        assert (row.layer, row.name, row.samples) == (layer, f"layers.{layer}", 4)
        assert row.compressed_rate == pytest.approx(rates[layer].mean().item())
        assert row.compressed_rate_std == pytest.approx(rates[layer].std().item())
        assert row.nonzeros == pytest.approx(1 - zeros[layer].mean().item())
    assert not t.skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_and_unfused_agree_under_autocast(dtype):
    """The rates of the fused layers are as close to float64 as those of the published ones."""
    exact = transformer()
    plain = transformer().float()
    fused = copy.deepcopy(plain)
    fuse(fused)
    found = []
    for model in (fused, plain, exact):
        x = tokens(dtype=torch.float64 if model is exact else torch.float32)
        enabled = dtype == torch.bfloat16 and model is not exact
        with trace(model) as t, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(x)
        values = [t.values("compressed_rates", i) for i in range(DEPTH)]
        found.append({"rates": torch.stack(values).float()})
    # Per-sample rates of a few tokens: their rounding is that of w, one in the last place.
    assert_as_close_as_plain(*found, unit=torch.finfo(dtype).eps)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(fused, fails):
    model = transformer()
    if fused:
        fuse(model)
    model.layers[0][0].register_forward_hook(lambda *args: None)
    before, want = state_of(model), model(tokens())
    try:
        with trace(model, coherence=True, attention=True) as t:
            assert state_of(model) != before
            assert torch.equal(model(tokens()), want)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert state_of(model) == before
    assert torch.equal(model(tokens()), want)
    assert len(t.table().rows) == DEPTH


def test_a_failed_entry_leaves_nothing_behind(monkeypatch):
    model = transformer()
    fuse(model)
    before = state_of(model)
    monkeypatch.setattr("crate_kernels.whitebox.measures.subspace_coherence", lambda u: 1 / 0)
    with pytest.raises(ZeroDivisionError), trace(model, coherence=True):
        pass
    assert state_of(model) == before


def test_traces_nest_and_go_on():
    model = transformer()
    fuse(model)
    with trace(model) as outer:
        model(tokens())
        with trace(model) as inner, pytest.raises(ValueError, match="not active"), outer:
            pass
        with inner:
            model(tokens())
    with inner:
        model(tokens())
    assert outer.table().rows[0].samples == inner.table().rows[0].samples == 8
    assert "_observers" not in vars(model)


def test_a_model_may_be_fused_between_blocks():
    model = transformer()
    with trace(model) as t:
        model(tokens())
    fuse(model)
    with t:
        assert calls(model, tokens())[1] == {"crate_block": DEPTH}
    first, second = t.values("compressed_rate", 1).chunk(2)
    torch.testing.assert_close(first, second)
    del model.layers[0]
    with pytest.raises(ValueError, match="expected the model as it was, with layers"), t:
        pass


def test_batches_add_up_and_samples_are_the_first():
    model = transformer()
    fuse(model)
    x = tokens(5)
    with trace(model, samples=3, attention=True) as t:
        model(x)
        model(x[3:])
        model(x[:0])
    with trace(model, samples=None, attention=True) as every:
        model(x)
    for measure in ("coding_rate", "compressed_rates", "sparsity"):
        torch.testing.assert_close(t.values(measure, -1), every.values(measure, -1))
    torch.testing.assert_close(t.attention(0), every.attention(0))
    assert t.table().rows[0].samples == 5
    assert every.values("compressed_rates", 0).shape == (5, HEADS)


def test_determinants_are_taken_together(monkeypatch):
    """One call for each size, at the latest when they fill their share of the memory."""
    sizes = []
    half_logdet = whitebox.measures.half_logdet
    monkeypatch.setattr(
        whitebox.measures,
        "half_logdet",
        lambda m, factor: sizes.append(tuple(m.shape)) or half_logdet(m, factor),
    )
    model = transformer()
    with trace(model) as t:
        model(tokens(2))
        assert sizes == []
        t.table()
    assert sorted(sizes) == [(2 * DEPTH, 7, 7), (2 * DEPTH * HEADS, 4, 4)]
    with trace(model) as t:
        monkeypatch.setattr("crate_kernels.whitebox.tracing.PENDING", 0)
        sizes.clear()
        model(tokens(2))
        assert len(sizes) == 2 * DEPTH


def test_gradients_and_modes_pass_through():
    model = transformer()
    fuse(model)
    x = tokens().requires_grad_()
    model(x).sum().backward()
    want, x.grad = x.grad, None
    with trace(model) as t:
        y = model(x)
        with torch.inference_mode():
            model(x.detach())
    y.sum().backward()
    torch.testing.assert_close(x.grad, want)
    assert not t.values("coding_rate", 0).requires_grad
    assert t.table().rows[0].samples == 8


def test_recomputation_is_not_measured_again():
    model = transformer()
    with trace(model) as t:
        checkpoint(model, tokens().requires_grad_(), use_reentrant=False).sum().backward()
        model.zero_grad()
        checkpoint(model, tokens().requires_grad_(), use_reentrant=True).sum().backward()
    assert t.table().rows[0].samples == 8


def test_only_what_is_asked_for():
    model = transformer()
    fuse(model)
    with trace(model, rate=False, sparsity=False, coherence=True, attention={"layers": [-1]}) as t:
        model(tokens())
    assert t.attention(2).shape == (4, HEADS, 1, 7)
    assert t.coherence(0).shape == (HEADS, HEADS)
    u = model.layers[1][0].fn.qkv.weight.detach().view(HEADS, DIM_HEAD, DIM)
    torch.testing.assert_close(t.coherence(1), whitebox.subspace_coherence(u))
    (row,) = t.table().rows
    assert row.layer == 2 and row.coding_rate is None and row.coherence_max > row.coherence_mean > 0
    for call in (lambda: t.attention(0), lambda: t.values("sparsity", 2), lambda: t.values("x", 0)):
        with pytest.raises(ValueError, match="expected"):
            call()
    with trace(model, rate=False) as t:
        model(tokens())
    assert t.table().rows[0].sparsity > 0
    with pytest.raises(ValueError, match="coherence=True"):
        t.coherence(0)


# ---- models


def test_layers_of_others():
    model = stack()
    x = tokens_of_others()
    with trace(model) as before:
        model(x)
    assert before.layers == ["0", "1"]
    assert len(fuse(model)) == 4
    with trace(model) as after:
        _, count = calls(model, x)
    assert count == {"tied_attention": 2, "ista": 2}
    for measure in ("coding_rate", "compressed_rates", "sparsity"):
        torch.testing.assert_close(after.values(measure, 1), before.values(measure, 1))


def test_mae_encoder_and_what_only_looks_like_a_layer():
    """A stack of encoder blocks, then one as the decoder has it: linear, then attention."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.step_size, self.lambd = nn.Parameter(torch.eye(DIM)), 0.1, 5.0

        def forward(self, x):
            return F.linear(x, self.weight)

    torch.manual_seed(0)
    blocks = [models.MAEEncoderBlock(DIM, HEADS, DIM_HEAD) for _ in range(2)]
    model = nn.Sequential(*blocks, Linear(), Attn()).double()
    for fused in (False, True):
        if fused:
            assert len(fuse(model)) == 2 * 3 + 1
        with trace(model) as t:
            model(tokens())
        rows = t.table().rows
        assert [row.name for row in rows] == ["0.layers.0", "1.layers.0", "3"]
        assert rows[2].sparsity is None and rows[2].compressed_rate is not None
        assert [layer.name for layer in t.skipped] == ["2"]
        assert "not measured: 1 ISTA: its forward" in str(t.table())


def test_gpt_is_causal():
    torch.manual_seed(0)
    model = models.CRATEGPT(vocab_size=11, context=9, dim=DIM, depth=2, heads=HEADS).eval()
    idx = torch.randint(11, (3, 9))
    with trace(model, attention={"queries": [0, 4]}) as t:
        model(idx)
        model(idx[:, :6])
    assert [row.name for row in t.table().rows] == ["transformer.h.0", "transformer.h.1"]
    assert t.values("compressed_rate", 1).shape == (6,)
    with pytest.raises(ValueError, match="batches of one N"):
        t.attention(0)
    block = model.transformer["h"][0]
    x = model.transformer["wte"](idx) + model.transformer["wpe"].weight[:9]
    w = block.attn.c_attn(block.prenorm_1(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    with trace(model, attention={"queries": [0, 4]}) as t:
        model(idx)
    scores = (w @ w.mT * DIM_HEAD**-0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(t.attention(0), scores.softmax(-1)[:, :, [0, 4]].detach())
    assert (t.attention(0)[:, :, 0, 1:] == 0).all()


@pytest.mark.parametrize("fused", [False, True])
def test_layers_that_share_weights_are_told_apart(fused):
    torch.manual_seed(0)
    shared = models.MAEEncoderBlock(DIM, HEADS, DIM_HEAD).double()
    model, plain = nn.Sequential(shared, shared), nn.Sequential(*[copy.deepcopy(shared)] * 1)
    if fused:
        fuse(model)
    with trace(model) as t:
        y = plain(tokens())
        model(tokens())
        model(tokens())
    with trace(plain) as one:
        plain(tokens())
        plain(y)
    first, second = one.values("compressed_rate", 0).chunk(2)
    assert t.layers == ["0.layers.0", "1.layers.0"]
    torch.testing.assert_close(t.values("compressed_rate", 0), torch.cat([first, first]))
    torch.testing.assert_close(t.values("compressed_rate", 1), torch.cat([second, second]))


@pytest.mark.parametrize("wrap", ["DataParallel", "compile", "compiled in place"])
def test_wrapped_models(wrap):
    model = transformer()
    fuse(model)
    x = tokens()
    with trace(model) as want:
        model(x)
    if wrap == "DataParallel":
        wrapped = nn.DataParallel(model)
    elif wrap == "compile":
        wrapped = torch.compile(model, backend="eager", fullgraph=True)
        wrapped(x)
    else:
        wrapped = model
        model.compile(backend="eager", fullgraph=True)
        model(x)
    with trace(wrapped) as t:
        wrapped(x)
    torch.testing.assert_close(t.values("compressed_rate", 2), want.values("compressed_rate", 2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        wrapped(x)


def test_replicas_as_data_parallel_makes_them():
    """Hooks and observers of a replica find the replica's weights, and each batch its place."""
    model = transformer()
    fuse(model)
    x = tokens()
    with trace(model) as t:
        replica = model._replicate_for_data_parallel()
        layers = model.layers._replicate_for_data_parallel()
        replica._modules = {"layers": layers}
        layers._modules = copy.deepcopy(model.layers._modules)
        layers[0][0].fn.qkv.weight.data.mul_(2)
        replica(x)
    other = transformer()
    other.layers[0][0].fn.qkv.weight.data.mul_(2)
    with trace(other) as want:
        other(x)
    for layer in range(DEPTH):
        got = t.values("compressed_rate", layer)
        torch.testing.assert_close(got, want.values("compressed_rate", layer))


def test_several_devices_come_in_the_order_of_the_batch():
    model = transformer()
    t = trace(model)
    parts = {1: [[2.0], [5.0]], 10: [[3.0]], 0: [[0.0, 1.0], [4.0]]}
    for index, values in parts.items():
        store = t._stores.setdefault(torch.device("cuda", index), whitebox.tracing._Store())
        for value in values:
            store.add(0, "sparsity", torch.tensor(value))
    assert t.values("sparsity", 0).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_distributed_model(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = transformer()
        fuse(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        with trace(wrapped) as t:
            wrapped(tokens()).sum().backward()
        assert t.layers == [f"module.layers.{i}" for i in range(DEPTH)]
        assert t.table().rows[0].samples == 4
        sharded = fully_shard(transformer(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"norm.weight in shards \(FSDP\)"):
            trace(sharded).__enter__()
    finally:
        torch.distributed.destroy_process_group()


# ---- refusals


BAD_TRACES = [
    (lambda: trace("model"), TypeError, "model to be a torch.nn.Module, got str"),
    (lambda: trace(nn.Linear(2, 2)), ValueError, "layers that fuse recognises, got none"),
    (
        lambda: trace(nn.Sequential(like(Attn, helper=1)())),
        ValueError,
        r"got 0 \(MSSA\): Lookalike defines more than a layer: helper",
    ),
    (lambda: trace(transformer(), samples=0), ValueError, "samples to be an int > 0"),
    (lambda: trace(transformer(), eps=-1.0), ValueError, "eps to be finite and > 0"),
    (lambda: trace(transformer(), rate=False, sparsity=False), ValueError, "got nothing"),
    (lambda: trace(transformer(), attention={"head": [0]}), ValueError, "attention to be True"),
    (lambda: trace(transformer(), attention=3), ValueError, "attention to be True .* got int"),
    (lambda: trace(transformer(), attention={"heads": 0}), ValueError, "heads to be a list of"),
    (lambda: trace(transformer(), attention={"queries": []}), ValueError, "queries to be a list"),
    (lambda: trace(transformer(), attention={"queries": None}), ValueError, "queries to be a list"),
    (lambda: trace(transformer(), attention={"heads": [3]}), ValueError, "heads among 3, got 3"),
    (lambda: trace(transformer(), attention={"layers": [3]}), ValueError, "among the 3 of the"),
    (lambda: trace(transformer(device="meta")).__enter__(), ValueError, "norm.weight on meta"),
    (lambda: trace(transformer()).table(), ValueError, "a forward pass of the model inside"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD_TRACES)
def test_trace_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_query_that_is_no_token():
    model = transformer()
    fuse(model)
    before = state_of(model)
    with pytest.raises(ValueError, match="queries among the 7 tokens, got 7"):  # noqa: SIM117
        with trace(model, attention={"queries": [7]}):
            model(tokens())
    assert state_of(model) == before


# ---- what it says


def test_table_csv_and_plot(tmp_path):
    model = transformer()
    with trace(model, coherence=True) as t:
        model(tokens())
    lines = str(t.table()).splitlines()
    assert lines[0].split()[:5] == ["layer", "name", "samples", "R", "R^c"]
    assert len(lines) == 1 + DEPTH and "layers.2" in lines[3]
    assert repr(t.table()) == str(t.table())
    t.write_csv(tmp_path / "layers.csv")
    with open(tmp_path / "layers.csv") as file:
        rows = list(csv.DictReader(file))
    for row, want in zip(rows, t.table().rows, strict=True):
        for column, text in row.items():
            value = getattr(want, column)
            assert text == value if isinstance(value, str) else float(text) == value
    t.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_one_sample_has_no_deviation(tmp_path):
    model = transformer()
    with trace(model, rate=False) as t:
        model(tokens(1))
    t.write_csv(tmp_path / "layers.csv")
    first = (tmp_path / "layers.csv").read_text().splitlines()[1]
    assert "nan" not in first and first.startswith("0,layers.0,1,,")
    assert "nan" not in str(t.table())
    t.plot(tmp_path / "layers.pdf")
    with trace(model, rate=False, sparsity=False, attention=True) as t:
        model(tokens(1))
    with pytest.raises(ValueError, match="rates or sparsity"):
        t.plot(tmp_path / "none.png")


def test_matplotlib_is_asked_for_by_name(monkeypatch):
    model = transformer()
    with trace(model) as t:
        model(tokens())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="plot: needs matplotlib; pip install matplotlib"):
        t.plot("layers.png")


def test_importing_brings_no_plotting():
    code = (
        "import sys, crate_kernels.whitebox.inspect; "
        "print({'matplotlib', 'PIL', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
