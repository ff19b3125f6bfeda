"""CRATE-BERT on a GPU: its layers and loss are as close to float64 as the published model's."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from cross_entropies import published_cross_entropy
from helpers import HALVES, calls

from crate_kernels import models
from crate_kernels.library import autocast_dtype

WORDS, BATCH, LENGTH = 1003, 8, 64  # an odd vocabulary: the head pads it


def built():
    torch.manual_seed(0)
    size = {"positions": LENGTH + 2, "dim": 192, "depth": 3, "heads": 3, "dropout": 0.0}
    return models.CRATEBERT(vocab_size=WORDS, **size).cuda()


def published(model, narrow):
    """Layers module by module; ``narrow``: tokens in autocast's dtype, as in fused layers."""
    plain = copy.deepcopy(model)

    def hook(module, args, y):
        return y.to(autocast_dtype(y)) if narrow else y

    for layer in plain.crate["encoder"]["layer"]:
        for part in (layer.attention["self"].prenorm, layer.output.prenorm, layer.output):
            part.register_forward_hook(hook)
    plain.crate["embeddings"].word_embeddings.register_forward_hook(lambda *_: None)
    for norm in (plain.crate["embeddings"].LayerNorm, plain.lm_head.layer_norm):
        norm.register_forward_hook(hook)
    return plain


def drawn():
    idx = torch.randint(2, WORDS, (BATCH, LENGTH), device="cuda")
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH,), device="cuda")
    padding = torch.arange(LENGTH, device="cuda") >= lengths[:, None]
    return idx, torch.randint_like(idx, WORDS).masked_fill(padding, -100), lengths


def of_model(model, idx, labels, lengths, autocast=None, loss_function=None):
    model.zero_grad()
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        logits, loss = model(idx, labels, lengths=lengths)
        if loss_function is not None:
            loss = loss_function(logits, labels)
    (loss * BATCH * LENGTH).backward()  # so that float16 has its gradients in range
    grads = {f"d{k}": p.grad for k, p in model.named_parameters()}
    return {"y": logits.detach().masked_fill((labels == -100)[..., None], 0), **grads}


@pytest.mark.parametrize("autocast", [*HALVES, None], ids=str)
def test_as_close_as_published(autocast):
    """By the mean square and the median over batches, since a single code on its relu's other side
    may outweigh all rounding."""
    model = built()
    plain, exact = published(model, autocast is not None), published(model, False).double()
    ratios = {}
    for _ in range(7):
        batch = drawn()
        got = of_model(model, *batch, autocast)
        theirs = of_model(plain, *batch, autocast, published_cross_entropy)
        for name, want in of_model(exact, *batch, None, published_cross_entropy).items():
            assert got[name].dtype == theirs[name].dtype
            error, of_plain = ((t[name].double() - want).norm() for t in (got, theirs))
            floor = 2 * torch.finfo(torch.float32).eps * want.norm()
            ratios.setdefault(name, []).append((error / torch.maximum(of_plain, floor)).item())
    for name, several in ratios.items():
        assert statistics.median(several) <= (3 if name.startswith("d") else 2), (name, several)


def test_is_fused_and_repeatable():
    model, batch = built(), drawn()
    with torch.autocast("cuda", torch.bfloat16):
        _, count = calls(lambda idx: model(idx, *batch[1:2], lengths=batch[2]), batch[0])
    assert count["residual_norm"] == 8
    assert count["cross_entropy"] == count["tied_embedding"] == 1
    first, again = (of_model(model, *batch, torch.bfloat16) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, again[name]), name


def test_with_dropout():
    """On embeddings and projections: either way it draws the same."""
    model = built()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    plain, batch, found = published(model, False), drawn(), []
    for m in (model, plain):
        torch.manual_seed(5)
        found.append(of_model(m, *batch)["y"])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
