"""The language model: published keys and values, and the maths against a plain forward."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_results, calls

import crate_kernels
from crate_kernels import crate_block, models
from crate_kernels.models import gpt
from crate_kernels.nn.layers import log_once

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


# ---- a layer as one op


def test_layers_run_as_one_op_each_unless_something_would_be_passed_over(monkeypatch):
    idx, targets = tokens()
    model, blocks = tiny(), []
    monkeypatch.setattr(
        gpt, "crate_block", lambda *a, **k: blocks.append(1) or crate_block(*a, **k)
    )
    want = model(idx, targets)[1]
    assert len(blocks) == len(model.transformer["h"]) == 2
    block = model.transformer["h"][0]
    seen = []
    for module in (block.prenorm_1, block.attn, block.attn.c_proj, block.ista):
        blocks.clear()
        hook = module.register_forward_hook(lambda m, *_: seen.append(m))
        torch.testing.assert_close(model(idx, targets)[1], want)
        hook.remove()
        assert seen[-1] is module and len(blocks) == 1  # the other layer as before
    blocks.clear()
    block.attn.c_proj = torch.nn.Sequential(block.attn.c_proj)  # as an adapter would
    torch.testing.assert_close(model(idx, targets)[1], want)
    assert len(blocks) == 1


def test_embeddings_run_as_one_op_unless_something_would_be_passed_over(caplog):
    model, (idx, targets) = tiny(), tokens()

    def found():
        (_, loss), count = calls(lambda idx: model(idx, targets), idx)
        grads = torch.autograd.grad(loss, tuple(model.parameters()))
        return count.get("tied_embedding", 0), (loss, *grads)

    count, want = found()
    assert count == 1 and "tied_embedding" not in calls(model, idx)[1]
    words, head, seen = model.transformer["wte"], model.lm_head, []
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "crate_kernels"):
        for module in (words, head):
            hook = module.register_forward_hook(lambda m, *_: seen.append(m))
            count, got = found()
            hook.remove()
            assert count == 0 and seen == [module]
            torch.testing.assert_close(got, want)
            seen.clear()
        words.scale_grad_by_freq = True
        assert found()[0] == found()[0] == 0
    words.scale_grad_by_freq = False
    reasons = [r.message.removeprefix("the embeddings of CRATEGPT run unfused: ")
               for r in caplog.records]  # fmt: skip
    assert reasons == [
        "wte has hooks",
        "lm_head has hooks",
        "wte has max_norm, scale_grad_by_freq or sparse set",
    ]
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # tied no more
    assert found()[0] == 0


def test_layers_of_one_op_keep_the_accuracy_of_autocast():
    model, (idx, targets) = tiny().float(), tokens()

    def results(model):
        logits, loss = model(idx, targets)
        loss.backward()
        grads = {f"d{n}": p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        return {"y": logits.detach(), **grads}

    exact = results(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        got = results(model)
        blocks = [block.attn for block in model.transformer["h"]]
        for module in (*blocks, model.transformer["wte"]):
            module.register_forward_hook(lambda *_: None)
        plain = results(model)
    assert got["y"].dtype == plain["y"].dtype == torch.bfloat16
    # An ISTA value that rounds to the other side of its threshold outweighs all rounding.
    medians = [
        {name: (t.double() - exact[name]).abs().median().reshape(1) for name, t in found.items()}
        for found in (got, plain)
    ]
    for name in exact:
        assert medians[0][name] <= 3 * medians[1][name] + 1e-4, name


def test_is_compiled_whole():
    torch.compiler.reset()
    model, (idx, targets) = tiny(), tokens()
    want = model(idx, targets)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(idx, targets), want
    )


# ---- generation


def without_cache(model, idx, n, temperature=0.0, top_k=None, generator=None):
    """The published loop."""
    for _ in range(n):
        logits = model(idx[:, -model.context :])[0][:, -1]
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k is not None:
                least = torch.topk(logits, min(top_k, logits.shape[-1]))[0][:, [-1]]
                logits[logits < least] = -float("inf")
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        idx = torch.cat((idx, new), dim=1)
    return idx


@pytest.mark.parametrize("length", [1, 4, 9, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("final_norm", [False, True])
def test_generation_is_that_without_a_cache(length, dtype, final_norm):
    """And past the context, where the tokens are cropped."""
    model = tiny(final_norm=final_norm).to(dtype)
    idx = torch.randint(11, (3, length))
    with torch.no_grad():
        want = without_cache(model, idx, 12)
        drawn = without_cache(model, idx, 12, 0.7, 4, torch.Generator().manual_seed(2))
    assert torch.equal(model.generate(idx, 12, temperature=0), want)
    generator = torch.Generator().manual_seed(2)
    got = model.generate(idx, 12, temperature=0.7, top_k=4, generator=generator)
    assert torch.equal(got, drawn)
    assert len(set(want[:, length:].flatten().tolist())) > 1  # not one token for ever


def test_steps_read_the_prompt_once(monkeypatch):
    model, widths = tiny(), []
    block = model.transformer["h"][1]
    block.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    model.generate(torch.randint(11, (2, 3)), 8, temperature=0)
    assert widths == [3, 1, 1, 1, 1, 1, 1, 9]


def test_a_cache_takes_prompts_of_several_lengths_and_several_tokens_at_once():
    model = tiny()
    idx, _ = tokens()
    cache = model.new_cache(2, 8)
    assert cache.layers.shape == (2, 2, 8, 12) and cache.layers.dtype == torch.float64
    model.prefill(idx[:, :5], cache)
    cache.lengths[1] = 3  # its last two were padding
    got = model.step(torch.stack((idx[0, 5:8], idx[1, 3:6])), cache)
    assert cache.lengths.tolist() == [8, 6]
    for b, start in ((0, 5), (1, 3)):
        for t in range(3):
            alone, _ = model(idx[b : b + 1, : start + t + 1])
            torch.testing.assert_close(got[b, t], alone[0, 0])
    more = model.step(idx[:, 8:], cache)
    assert more[0].isnan().all() and more[1].isfinite().all()  # item 0 is full


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, idx: m.generate(idx, 1, temperature=-1.0), "temperature to be finite and >= 0"),
        (lambda m, idx: m.generate(idx, 1, top_k=0), "top_k of at least 1, or None, got 0"),
        (lambda m, idx: m.generate(idx[0], 1), r"tokens of shape \(B, T\) with T > 0"),
        (lambda m, idx: m.generate(idx[:, :0], 1), r"got \(2, 0\)"),
        (lambda m, idx: m.new_cache(2, 10), "capacity from 1 to 9, got 10"),
        (lambda m, idx: m.new_cache(2, 0), "capacity from 1 to 9, got 0"),
        (lambda m, idx: m.prefill(idx, m.new_cache(2, 8)), r"\(2, T\) with T <= 8"),
        (lambda m, idx: m.prefill(idx, m.new_cache(1)), r"tokens of shape \(1, T\)"),
        (lambda m, idx: m.step(idx[:, :0], m.new_cache(2)), r"0 < T <= 9"),
    ],
)
def test_what_generation_refuses(call, message):
    with pytest.raises(ValueError, match=f"CRATEGPT.*{message}"):
        call(tiny(), tokens()[0])


def test_nothing_is_generated_for_no_tokens():
    idx, _ = tokens()
    assert torch.equal(tiny().generate(idx, 0), idx)
