"""CRATE-BERT: published keys and arithmetic, padding, masking, and that it learns."""

from __future__ import annotations

import argparse
import copy
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_results, calls, published_ista, published_mssa

from crate_kernels import models
from crate_kernels.models import bert
from crate_kernels.nn.layers import log_once

SIZE = {"vocab_size": 11, "positions": 12, "dim": 12, "depth": 2, "heads": 3, "dropout": 0.0}
PAD = 1


def tiny(**options):
    torch.manual_seed(0)
    return models.CRATEBERT(**{**SIZE, **options}).double()


def tokens(lengths=(10, 7, 3)):
    """Tokens padded to 10, labels for about half of them, and the attention mask."""
    torch.manual_seed(1)
    idx = torch.randint(2, 11, (len(lengths), 10))
    mask = torch.arange(10) < torch.tensor(lengths)[:, None]
    labels = torch.randint(11, idx.shape).masked_fill(~mask | (torch.rand(idx.shape) < 0.5), -100)
    return idx.masked_fill(~mask, PAD), labels, mask


def by_hand(state, idx, labels, token_types):
    """The published forward, from the state dict alone, an item at a time without its padding."""

    def norm(x, name, eps=1e-5):
        return F.layer_norm(x, (12,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    logits, at = [], "crate.embeddings"
    for ids, types in zip(idx, token_types, strict=True):
        n = int((ids != PAD).sum())
        x = state[f"{at}.word_embeddings.weight"][ids[:n]]
        x = x + state[f"{at}.token_type_embeddings.weight"][types[:n]]
        x = x + state[f"{at}.position_embeddings.weight"][2 : 2 + n]
        x = norm(x, f"{at}.LayerNorm", 1e-12)[None]
        for i in range(2):
            layer = f"crate.encoder.layer.{i}"
            own = f"{layer}.attention.self"
            h = norm(x, f"{own}.prenorm")
            dense = state[f"{layer}.attention.output.dense.weight"]
            x = x + published_mssa(h, state[f"{own}.qkv.weight"], dense, heads=3)
            u = norm(x, f"{layer}.output.prenorm")
            x = published_ista(u, state[f"{layer}.output.weight"])
        x = norm(F.gelu(linear(x, "lm_head.dense")), "lm_head.layer_norm", 1e-12)
        logits.append(linear(x, "lm_head.decoder")[0])
    wanted = torch.cat([row[: len(t)] for row, t in zip(labels, logits, strict=True)])
    return logits, F.cross_entropy(torch.cat(logits), wanted, ignore_index=-100)


@pytest.mark.parametrize("how", ["attention_mask", "lengths", "none"])
def test_logits_loss_and_gradients_are_those_without_the_padding(how):
    model = tiny()
    idx, labels, mask = tokens((10, 10) if how == "none" else (10, 7, 3))
    token_types = torch.randint(2, idx.shape)
    options = {"attention_mask": mask, "lengths": mask.sum(1).int()}
    given = {how: options[how]} if how in options else {}
    logits, loss = model(idx, labels, token_types=token_types, **given)
    loss.backward()
    named = dict(model.named_parameters())
    leaves = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
    tied = {"lm_head.decoder.weight": "crate.embeddings.word_embeddings.weight"}
    tied |= {"lm_head.decoder.bias": "lm_head.bias"}
    state = {k: leaves[tied.get(k, k) if k not in leaves else k] for k in model.state_dict()}
    want, want_loss = by_hand(state, idx, labels, token_types)
    want_loss.backward()
    got = {f"{b}": logits[b, : len(t)] for b, t in enumerate(want)}
    grads = {n: p.grad for n, p in named.items()}
    want_grads = {n: p.grad for n, p in leaves.items()}
    assert_equal_results(
        {"loss": loss, **got, **grads},
        {"loss": want_loss, **{f"{b}": t for b, t in enumerate(want)}, **want_grads},
        how,
    )


def test_what_padding_holds_changes_nothing():
    model = tiny()
    idx, labels, mask = tokens()
    want, want_loss = model(idx, labels, lengths=mask.sum(1))
    other = idx.masked_fill(~mask, 5)
    got, loss = model(other, labels, lengths=mask.sum(1))
    torch.testing.assert_close(got[mask], want[mask])
    torch.testing.assert_close(loss, want_loss)
    assert not torch.allclose(model(other)[0][mask], want[mask])  # no mask: they are seen


def test_without_a_mask_the_attention_is_the_op(monkeypatch):
    model, calls = tiny(dropout=0.3), []
    op = bert.tied_attention
    monkeypatch.setattr(bert, "tied_attention", lambda *a, **k: calls.append(1) or op(*a, **k))
    idx, _, mask = tokens()
    model.eval()(idx)
    assert len(calls) == 2
    model(idx, attention_mask=mask)
    model.train()(idx)
    assert len(calls) == 2


def test_dropout_is_where_it_was_published():
    model = tiny(dropout=0.5)
    idx, _, mask = tokens()
    torch.manual_seed(0)
    first, second = (model(idx, attention_mask=mask)[0] for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    torch.testing.assert_close(
        model(idx, attention_mask=mask)[0], tiny()(idx, attention_mask=mask)[0]
    )
    w = torch.randn(2, 5, 12, dtype=torch.float64)
    many = torch.stack([bert.attend(w, 3, bert.ALL, 0.5) for _ in range(2000)])
    want, error = bert.attend(w, 3, bert.ALL, 0.0), many.std(0) / 2000**0.5
    assert ((many.mean(0) - want).abs() < 6 * error).all()


def test_keys_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in tiny(depth=1).state_dict().items()}
    norm = {"weight": (12,), "bias": (12,)}
    layer = "crate.encoder.layer.0"
    assert shapes == {
        "crate.embeddings.word_embeddings.weight": (11, 12),
        "crate.embeddings.position_embeddings.weight": (12, 12),
        "crate.embeddings.token_type_embeddings.weight": (2, 12),
        **{f"crate.embeddings.LayerNorm.{k}": v for k, v in norm.items()},
        **{f"{layer}.attention.self.prenorm.{k}": v for k, v in norm.items()},
        f"{layer}.attention.self.qkv.weight": (12, 12),
        f"{layer}.attention.output.dense.weight": (12, 12),
        f"{layer}.output.weight": (12, 12),
        **{f"{layer}.output.prenorm.{k}": v for k, v in norm.items()},
        "lm_head.bias": (11,),
        "lm_head.dense.weight": (12, 12),
        "lm_head.dense.bias": (12,),
        **{f"lm_head.layer_norm.{k}": v for k, v in norm.items()},
        "lm_head.decoder.weight": (11, 12),
        "lm_head.decoder.bias": (11,),
    }


def test_published_size_and_what_is_tied():
    model = models.crate_bert(device="meta")
    assert sum(p.numel() for p in model.parameters()) == 60_912_729
    assert model.context == 510 and all(p.is_meta for p in model.parameters())
    source, target = tiny(), tiny()
    with torch.no_grad():
        for p in source.parameters():
            p.normal_()
    models.load_checkpoint(target, {f"module.{k}": v for k, v in source.state_dict().items()})
    for model in (source, target):
        head, words = model.lm_head, model.crate["embeddings"].word_embeddings
        assert head.decoder.weight is words.weight and head.decoder.bias is head.bias
    idx, _, _ = tokens()
    assert torch.equal(source(idx)[0], target(idx)[0])


def test_initial_values():
    model = models.CRATEBERT(vocab_size=500, positions=130, dim=128, depth=1, heads=2)
    embeddings = model.crate["embeddings"]
    for weight in (
        embeddings.word_embeddings.weight,
        model.crate["encoder"]["layer"][0].attention["self"].qkv.weight,
        model.lm_head.dense.weight,
    ):
        # The standard error of a standard deviation is std / sqrt(2 n); five of them, and the row
        # of padding.
        assert abs(weight.std().item() / 0.02 - 1) < 5 * (2 * weight.numel()) ** -0.5 + 2e-3
    assert not embeddings.word_embeddings.weight[PAD].any()
    assert not embeddings.position_embeddings.weight[PAD].any()
    assert not model.lm_head.bias.any()


def test_masking():
    idx = torch.randint(3, 200, (400, 100), generator=torch.Generator().manual_seed(0))
    maskable = torch.rand(idx.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    generator = torch.Generator().manual_seed(2)
    inputs, labels = bert.mask_tokens(idx, 200, 2, maskable=maskable, generator=generator)
    asked = labels != -100
    assert torch.equal(labels[asked], idx[asked]) and not (asked & ~maskable).any()
    assert torch.equal(inputs[~asked], idx[~asked])
    count = int(asked.sum())

    def near(found, expected, of):
        return abs(found / of - expected) < 5 * (expected * (1 - expected) / of) ** 0.5

    assert near(count, 0.15, int(maskable.sum()))
    assert near(int((inputs[asked] == 2).sum()), 0.8, count)
    same = int((inputs[asked] == idx[asked]).sum())
    assert near(same, 0.1 + 0.1 / 200, count)
    again = bert.mask_tokens(idx, 200, 2, maskable=maskable, generator=generator.manual_seed(2))
    assert torch.equal(again[0], inputs) and torch.equal(again[1], labels)
    everywhere = bert.mask_tokens(idx, 200, 2, probability=1.0)[1]
    assert torch.equal(everywhere, idx)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tiny(heads=5), "expected heads to divide"),
        (lambda: tiny()(torch.ones(2, 11).long()), r"0 < T <= 10, got \(2, 11\)"),
        (lambda: tiny()(torch.ones(3).long()), r"tokens of shape \(B, T\)"),
        (
            lambda: tiny()(tokens()[0], attention_mask=torch.ones(3, 9)),
            r"attention_mask of shape \(3, 10\), got \(3, 9\)",
        ),
        (
            lambda: tiny()(tokens()[0], lengths=torch.ones(2)),
            r"lengths of shape \(3,\), got \(2,\)",
        ),
        (
            lambda: tiny()(tokens()[0], lengths=torch.ones(3), attention_mask=torch.ones(3, 10)),
            "attention_mask or lengths, got both",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=f"CRATEBERT: .*{words}"):
        call()


def test_learns_python():
    """Bytes of a module of the standard library, in windows of which some end early."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes())) + 3
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "positions": 66, "dim": 64, "depth": 2, "heads": 2}
    model = models.CRATEBERT(**sizes, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        start = torch.randint(len(text) - 64, (16, 1))
        idx = text[start + torch.arange(64)]
        lengths = torch.randint(32, 65, (16,))
        real = torch.arange(64) < lengths[:, None]
        idx = idx.masked_fill(~real, PAD)
        inputs, labels = bert.mask_tokens(idx, 259, 2, maskable=real)
        _, loss = model(inputs, labels, lengths=lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    frequencies = text.bincount().float() / len(text)
    entropy = -(frequencies * frequencies.clamp(min=1e-9).log()).sum().item()
    assert losses[0] > 5  # ln 259 = 5.6
    assert sum(losses[-20:]) / 20 < entropy  # better than what bytes there are


@pytest.mark.parametrize("vocabulary", [11, 16])
def test_the_decoder_in_whole_steps(vocabulary):
    """Zeros after the last word change neither logits nor gradients."""
    shapes = ((2, 3, 12), (vocabulary, 12), (vocabulary,))
    leaves = [torch.randn(*shape).double() for shape in shapes]
    dy = torch.randn(2, 3, vocabulary).double()
    found = []
    for linear in (F.linear, bert.linear_in_whole_steps):
        given = [t.clone().requires_grad_() for t in leaves]
        y = linear(*given)[..., :vocabulary]
        y.backward(dy)
        found.append([y.detach(), *(t.grad for t in given)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- the norms of a layer, fused


def unfused(model):
    """A hook on the output of each layer, whose modules then run one by one, and on the others that
    are not called."""
    outputs = [layer.output for layer in model.crate["encoder"]["layer"]]
    embeddings = model.crate["embeddings"]
    others = (embeddings.word_embeddings, embeddings.LayerNorm, model.lm_head.layer_norm)
    for module in (*outputs, *others):
        module.register_forward_hook(lambda *_: None)
    return model


def loss_and_gradients(model, idx, labels, **options):
    torch.manual_seed(0)  # of dropout
    logits, loss = model(idx, labels, **options)
    model.zero_grad()
    loss.backward()
    grads = {f"d{n}": p.grad for n, p in model.named_parameters()}
    return {"y": logits.detach(), "loss": loss.detach(), **grads}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("padding_is_seen", [False, True])
def test_fused_and_unfused_models_agree(dropout, padding_is_seen):
    model = tiny(dropout=dropout)
    idx, labels, mask = tokens()
    options = {} if padding_is_seen else {"lengths": mask.sum(1)}
    labels = labels.clamp(min=0) if padding_is_seen else labels
    other = unfused(copy.deepcopy(model))
    found = []
    for m, norms, embeddings in ((model, 6, 1), (other, 0, 0)):
        _, count = calls(lambda idx, m=m: m(idx, labels, **options), idx)
        assert count.get("residual_norm", 0) == norms
        assert count.get("tied_embedding", 0) == embeddings
        found.append(loss_and_gradients(m, idx, labels, **options))
    assert_equal_results(*found, dropout)


def test_embeddings_and_head_are_not_passed_over():
    model, (idx, labels, _) = tiny(), tokens()
    want = loss_and_gradients(model, idx, labels)
    embeddings, head, seen = model.crate["embeddings"], model.lm_head, []
    tables = [getattr(embeddings, f"{k}_embeddings") for k in ("word", "position")]
    for module in (embeddings, *tables, head, head.decoder):
        hook = module.register_forward_hook(lambda m, *_: seen.append(m))
        _, count = calls(lambda idx: model(idx, labels), idx)
        assert seen == [module] and "tied_embedding" not in count, type(module)
        assert_equal_results(loss_and_gradients(model, idx, labels), want, type(module))
        hook.remove()
        seen.clear()
    embeddings.word_embeddings.max_norm = 1e9
    _, count = calls(lambda idx: model(idx, labels), idx)
    assert "tied_embedding" not in count


def test_hooks_and_other_modules_are_not_passed_over(caplog):
    model, (idx, labels, _) = tiny(), tokens()
    want = loss_and_gradients(model, idx, labels)
    layer, seen = model.crate["encoder"]["layer"][0], []
    attention, projection = layer.attention["self"], layer.attention["output"]
    for module, fused in (
        (attention, 4),
        (attention.prenorm, 4),
        (projection, 4),
        (layer.output, 4),
        (layer.output.prenorm, 4),
        (model.crate["embeddings"].LayerNorm, 5),
        (model.lm_head.layer_norm, 5),
        (layer, 6),
        (attention.qkv, 6),  # called in any case
        (projection.dense, 6),
        (projection.dropout, 6),
    ):
        hook = module.register_forward_hook(lambda m, *_: seen.append(m))
        _, count = calls(model, idx)
        assert_equal_results(loss_and_gradients(model, idx, labels), want, type(module))
        hook.remove()
        assert seen[-1] is module and count["residual_norm"] == fused, type(module)
    log_once.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "crate_kernels"):
        attention.prenorm = torch.nn.Sequential(attention.prenorm)
        for _ in range(2):
            _, count = calls(model, idx)
            assert count["residual_norm"] == 4
        model.lm_head.layer_norm = torch.nn.Identity()
        for _ in range(2):
            _, count = calls(model, idx)
            assert count["residual_norm"] == 3
    assert [r.message for r in caplog.records] == [
        "a BERTLayer runs unfused: attention.self.prenorm is Sequential, not LayerNorm",
        "a norm of CRATEBERT runs unfused: lm_head.layer_norm is Identity, not LayerNorm",
    ]
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        _, count = calls(model, idx)
        assert "residual_norm" not in count
    finally:
        hook.remove()


def test_layers_of_several_dtypes_run_as_torch_has_them():
    model, (idx, _, _) = tiny().float(), tokens()
    for layer in model.crate["encoder"]["layer"]:
        layer.output.prenorm.double()
    with pytest.raises(RuntimeError, match="dtype"):  # torch's, of a norm
        model(idx)


def test_fused_layers_keep_the_accuracy_of_autocast():
    model, (idx, labels, mask) = tiny().float(), tokens()
    given = (idx, labels)
    exact = loss_and_gradients(copy.deepcopy(model).double(), *given, lengths=mask.sum(1))
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_gradients(model, *given, lengths=mask.sum(1))
        plain = loss_and_gradients(unfused(copy.deepcopy(model)), *given, lengths=mask.sum(1))
    assert got["y"].dtype == plain["y"].dtype == torch.bfloat16
    assert got["loss"].dtype == torch.float32
    # An ISTA value that rounds to the other side of its threshold outweighs all rounding.
    for name, want in exact.items():
        errors = [(t[name].double() - want).abs().median() for t in (got, plain)]
        # A loss is one number, whose error of either sign may be near 0 by chance.
        slack = 1e-4 if name == "loss" else 0
        assert errors[0] <= 3 * errors[1] + slack, (name, errors)


def test_is_compiled_whole():
    torch.compiler.reset()
    model, (idx, labels, mask) = tiny(), tokens()
    want = model(idx, labels, lengths=mask.sum(1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(idx, labels, lengths=mask.sum(1))
    torch.testing.assert_close(got, want)
    want[1].backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got[1].backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], grads)
    torch.compiler.reset()


# ---- the loss


@pytest.mark.parametrize("hooked", [False, True])
def test_a_padded_product_changes_neither_logits_nor_gradients(monkeypatch, hooked):
    """As on a GPU: the loss takes the product before it is narrowed, unless a hook would see it."""
    model, (idx, labels, _) = tiny(), tokens()
    want = loss_and_gradients(model, idx, labels)
    monkeypatch.setattr(bert, "needs_whole_steps", lambda x, n: True)
    shapes = []
    if hooked:
        model.lm_head.register_forward_hook(lambda m, args, y: shapes.append(y.shape))
    assert_equal_results(loss_and_gradients(model, idx, labels), want, hooked)
    assert shapes == ([(3, 10, 11)] if hooked else [])
    assert model(idx)[0].shape == (3, 10, 11)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_other_losses_of_the_logits(monkeypatch, padded):
    """Of the bias too, which the loss of the model has by itself."""
    model, (idx, labels, _) = tiny(), tokens()
    monkeypatch.setattr(bert, "needs_whole_steps", lambda x, n: padded)
    with torch.no_grad():
        model.lm_head.bias.normal_()
    want = F.cross_entropy(model(idx)[0].mT, labels)
    logits, loss = model(idx, labels)
    parameters = tuple(model.parameters())
    wanted = torch.autograd.grad(want, parameters)
    for found in (loss, F.cross_entropy(logits.mT, labels)):
        torch.testing.assert_close(found, want)
        grads = torch.autograd.grad(found, parameters, retain_graph=True)
        torch.testing.assert_close(grads, wanted)
    twice = torch.autograd.grad(loss + F.cross_entropy(logits.mT, labels), parameters)
    torch.testing.assert_close(twice, tuple(2 * t for t in wanted))


def test_another_head_is_called_as_it_is():
    model, (idx, labels, _) = tiny(), tokens()
    want = model(idx, labels)
    seen = []
    hook = model.lm_head.decoder.register_forward_hook(lambda m, *_: seen.append(m))
    torch.testing.assert_close(model(idx, labels), want)
    hook.remove()
    assert len(seen) == 1
    model.lm_head = torch.nn.Sequential(model.lm_head)
    torch.testing.assert_close(model(idx, labels), want)
