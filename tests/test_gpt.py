"""The language model: published keys and values, and the maths against a plain forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_results

import crate_kernels
from crate_kernels import models

SIZE = {"vocab_size": 11, "context": 9, "dim": 12, "depth": 2, "heads": 3}


def tiny(**options):
    torch.manual_seed(0)
    return models.CRATEGPT(**{**SIZE, **options}).double()


def tokens(batch=2, length=9):
    torch.manual_seed(1)
    return torch.randint(11, (batch, length)), torch.randint(11, (batch, length))


def by_hand(state, idx, targets, depth=2, heads=3, eta=0.1, lambd=0.1):
    """The published forward, from the state dict alone."""

    def norm(x, name):
        return F.layer_norm(x, (12,), state[f"{name}.weight"], state[f"{name}.bias"])

    t = idx.shape[1]
    x = state["transformer.wte.weight"][idx] + state["transformer.wpe.weight"][:t]
    hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
    for i in range(depth):
        at = f"transformer.h.{i}"
        w = norm(x, f"{at}.prenorm_1") @ state[f"{at}.attn.c_attn.weight"].T
        w = w.view(*w.shape[:2], heads, -1).transpose(1, 2)
        scores = (w @ w.mT / w.shape[-1] ** 0.5).masked_fill(hidden, float("-inf"))
        o = (scores.softmax(-1) @ w).transpose(1, 2).flatten(2)
        x = x + o @ state[f"{at}.attn.c_proj.weight"].T + state[f"{at}.attn.c_proj.bias"]
        x = norm(x, f"{at}.prenorm_2")
        d = state[f"{at}.ista.weight"]
        x = F.relu(x + eta * (x @ d - x @ d.T @ d) - eta * lambd)
    if "transformer.ln_f.weight" in state:
        x = norm(x, "transformer.ln_f")
    logits = x @ state["lm_head.weight"].T
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


@pytest.mark.parametrize("final_norm", [False, True])
def test_logits_loss_and_gradients_are_those_of_the_plain_forward(final_norm):
    model = tiny(final_norm=final_norm)
    idx, targets = tokens()
    targets[0, 3] = -1
    logits, loss = model(idx, targets)
    loss.backward()
    got = {"logits": logits, "loss": loss, **{n: p.grad for n, p in model.named_parameters()}}
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    state = {k: leaves.get(k, leaves["transformer.wte.weight"]) for k in model.state_dict()}
    logits, loss = by_hand(state, idx, targets)
    loss.backward()
    want = {"logits": logits, "loss": loss, **{n: t.grad for n, t in leaves.items()}}
    assert_equal_results(got, want, f"{final_norm=}")


def test_without_targets_only_the_last_token_has_logits():
    model = tiny()
    idx, targets = tokens()
    last, none = model(idx)
    assert none is None
    torch.testing.assert_close(last, model(idx, targets)[0][:, -1:], rtol=1e-12, atol=1e-12)


def test_no_token_sees_a_later_one():
    model = tiny()
    idx, targets = tokens()
    changed = idx.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    before, after = model(idx, targets)[0], model(changed, targets)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_keys_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in tiny(depth=1).state_dict().items()}
    assert shapes == {
        "transformer.wte.weight": (11, 12),
        "transformer.wpe.weight": (9, 12),
        "transformer.h.0.prenorm_1.weight": (12,),
        "transformer.h.0.prenorm_1.bias": (12,),
        "transformer.h.0.attn.c_attn.weight": (12, 12),
        "transformer.h.0.attn.c_proj.weight": (12, 12),
        "transformer.h.0.attn.c_proj.bias": (12,),
        "transformer.h.0.prenorm_2.weight": (12,),
        "transformer.h.0.prenorm_2.bias": (12,),
        "transformer.h.0.ista.weight": (12, 12),
        "lm_head.weight": (11, 12),
    }


def test_published_size():
    model = models.crate_gpt(device="meta")
    assert sum(p.numel() for p in model.parameters()) == 60_699_648
    assert all(p.is_meta for p in model.parameters())
    assert model.transformer["wte"].weight is model.lm_head.weight


def test_initial_values():
    model = models.CRATEGPT(vocab_size=512, context=64, dim=128, depth=8, heads=2)
    block = model.transformer["h"][-1]
    for weight, std in (
        (model.lm_head.weight, 0.02),
        (model.transformer["wpe"].weight, 0.02),
        (block.attn.c_attn.weight, 0.02),
        (block.attn.c_proj.weight, 0.02 / 4),
    ):
        # The standard error of a standard deviation is std / sqrt(2 n); five of them.
        assert abs(weight.std().item() - std) < 5 * std / (2 * weight.numel()) ** 0.5
    assert not block.attn.c_proj.bias.any()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_published_checkpoints_load_with_their_masks(prefix, tmp_path):
    source, target = tiny(), tiny()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    state = dict(source.state_dict())
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 9, 9).tril()
    torch.save({"model": {prefix + k: v for k, v in state.items()}}, tmp_path / "gpt.pt")
    models.load_checkpoint(target, tmp_path / "gpt.pt")
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())
    assert target.transformer["wte"].weight is target.lm_head.weight
    with pytest.raises(ValueError, match=r"unexpected \(1\): transformer.h.0.attn.mask"):
        models.load_checkpoint(target, {**state, "transformer.h.0.attn.mask": torch.ones(1)})


def test_is_fused_as_built():
    report = crate_kernels.fuse(tiny())
    assert not report.replaced
    assert {layer.reason for layer in report.skipped} == {"fused already"}


@pytest.mark.parametrize("idx", [torch.zeros(2, 10, dtype=torch.long), torch.zeros(2, 0), [0]])
def test_refuses_other_sequences(idx):
    idx = torch.as_tensor(idx)
    with pytest.raises(ValueError, match=r"expected tokens of shape \(B, T\) with 0 < T <= 9, got"):
        tiny()(idx)


def test_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="expected heads to divide"):
        tiny(heads=5)
