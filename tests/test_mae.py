"""CRATE-MAE: published keys, values and arithmetic; its decoder; that it learns."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_results, calls
from torch import nn

import crate_kernels
from crate_kernels import models
from crate_kernels.models import patches
from crate_kernels.nn import encoder

SIZE = {
    "image_size": 8, "patch_size": 2, "dim": 12, "depth": 2, "heads": 3,
    "decoder_depth": 2, "decoder_heads": 2,
}  # fmt: skip


def tiny(**options):
    torch.manual_seed(0)
    return models.MaskedAutoencoder(**{**SIZE, **options}).double()


def images(*shape):
    torch.manual_seed(1)
    return torch.randn(*(shape or (3, 3, 8, 8)), dtype=torch.float64)


def by_hand(state, img, mask, norm_pix_loss, p=2, eta=0.1, lambd=0.5):
    """The published forward, from the state dict and the mask."""

    def norm(x, key, eps=1e-5):
        return F.layer_norm(x, (12,), state[f"{key}.weight"], state[f"{key}.bias"], eps)

    def linear(x, key):
        return F.linear(x, state[f"{key}.weight"], state[f"{key}.bias"])

    def mssa(x, key, heads):
        w = x @ state[f"{key}.qkv.weight"].T
        s = w.shape[-1] // heads
        o = [torch.softmax(wh @ wh.mT * s**-0.5, -1) @ wh for wh in w.chunk(heads, -1)]
        return F.linear(
            torch.cat(o, -1), *(state[f"{key}.to_out.0.{n}"] for n in ("weight", "bias"))
        )

    n = img.shape[2] // p
    parts = torch.stack(
        [
            img[:, :, r * p : r * p + p, c * p : c * p + p].movedim(1, -1).flatten(1)
            for r, c in itertools.product(range(n), repeat=2)
        ],
        dim=1,
    )
    kernel = state["patch_embed.proj.weight"].movedim(1, -1).flatten(1)
    x = F.linear(parts, kernel, state["patch_embed.proj.bias"])
    x = x * (1 - mask[..., None]) + state["mask_token"] * mask[..., None]
    x = torch.cat((state["cls_token"].expand(len(x), -1, -1), x), 1) + state["decoder_pos_embed"]
    for i in range(2):
        at = f"blocks.{i}.layers.0"
        x = norm(x + mssa(norm(x, f"{at}.0.norm"), f"{at}.0.fn", 3), f"{at}.1.norm")
        d = state[f"{at}.1.fn.weight"]
        x = F.relu(x + eta * (x @ d - x @ d.T @ d) - eta * lambd)
    x = norm(x, "norm", 1e-6)
    for i in range(2):
        at = f"decoder_blocks.{i}.layers.0"
        h = norm(x, f"{at}.0.norm") @ state[f"{at}.0.fn.weight"].T
        x = h - mssa(norm(h, f"{at}.1.norm"), f"{at}.1.fn", 2)
    x = norm(x, "decoder_norm", 1e-6)
    predicted = linear(x, "decoder_pred")[:, 1:]
    if norm_pix_loss:
        parts = (parts - parts.mean(-1, True)) / (parts.var(-1, keepdim=True) + 1e-6) ** 0.5
    return ((predicted - parts) ** 2).mean(-1)[mask > 0].mean(), predicted


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_prediction_and_gradients_are_those_of_the_plain_forward(norm_pix_loss, fused):
    model, img = tiny(norm_pix_loss=norm_pix_loss), images()
    if fused:
        crate_kernels.fuse(model)
    loss, predicted, mask = model(img, 0.6)
    loss.backward()
    assert mask.sum(1).tolist() == [10] * 3  # int(16 * 0.4) = 6 are kept
    named = dict(model.named_parameters())
    got = {n: p.grad for n, p in named.items() if p.grad is not None}
    leaves = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in named.items()}
    want_loss, want = by_hand(leaves, img, mask.double(), norm_pix_loss)
    want_loss.backward()
    grads = {n: p.grad for n, p in leaves.items() if p.grad is not None}
    assert named.keys() - got.keys() == {
        *("pos_embed", "decoder_pos_embed", "decoder_embed.weight", "decoder_embed.bias")
    }
    assert_equal_results(
        {"loss": loss, "predicted": predicted, **got},
        {"loss": want_loss, "predicted": want, **grads},
        (norm_pix_loss, fused),
    )


def test_keys_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in tiny(depth=1, decoder_depth=1).state_dict().items()}
    norm = {"weight": (12,), "bias": (12,)}
    attention = {"qkv.weight": (12, 12), "to_out.0.weight": (12, 12), "to_out.0.bias": (12,)}
    assert shapes == {
        "cls_token": (1, 1, 12),
        "pos_embed": (1, 17, 12),
        "mask_token": (1, 1, 12),
        "decoder_pos_embed": (1, 17, 12),
        "patch_embed.proj.weight": (12, 3, 2, 2),
        "patch_embed.proj.bias": (12,),
        **{f"blocks.0.layers.0.0.norm.{k}": v for k, v in norm.items()},
        **{f"blocks.0.layers.0.0.fn.{k}": v for k, v in attention.items()},
        **{f"blocks.0.layers.0.1.norm.{k}": v for k, v in norm.items()},
        "blocks.0.layers.0.1.fn.weight": (12, 12),
        **{f"norm.{k}": v for k, v in norm.items()},
        "decoder_embed.weight": (12, 12),
        "decoder_embed.bias": (12,),
        **{f"decoder_blocks.0.layers.0.0.norm.{k}": v for k, v in norm.items()},
        "decoder_blocks.0.layers.0.0.fn.weight": (12, 12),
        **{f"decoder_blocks.0.layers.0.1.norm.{k}": v for k, v in norm.items()},
        **{f"decoder_blocks.0.layers.0.1.fn.{k}": v for k, v in attention.items()},
        **{f"decoder_norm.{k}": v for k, v in norm.items()},
        "decoder_pred.weight": (12, 12),
        "decoder_pred.bias": (12,),
    }


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("tiny", 11_555_328), ("small", 25_405_824), ("base", 44_638_464), ("large", 154_274_560)],
)
def test_published_sizes(size, parameters):
    model = getattr(models, f"crate_mae_{size}")(device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())


def test_initial_values_and_masks_are_of_one_seed():
    model = tiny()
    torch.manual_seed(0)
    nn.Conv2d(3, 12, 2)
    for _ in range(2):
        nn.Linear(12, 12, bias=False), nn.Linear(12, 12)
        encoder = nn.init.kaiming_uniform_(torch.empty(12, 12))
    nn.Linear(12, 12)
    for _ in range(2):
        decoder = nn.init.kaiming_uniform_(torch.empty(12, 12))
        nn.Linear(12, 12, bias=False), nn.Linear(12, 12)
    nn.Linear(12, 12)
    patch = nn.init.xavier_uniform_(torch.empty(12, 12))
    cls_token = torch.empty(1, 1, 12).normal_(std=0.02)
    assert torch.equal(model.blocks[1].layers[0][1].fn.weight.float(), encoder)
    assert torch.equal(model.decoder_blocks[1].layers[0][0].fn.weight.float(), decoder)
    assert torch.equal(model.patch_embed.proj.weight.float().flatten(1), patch)
    assert torch.equal(model.cls_token.float(), cls_token)
    assert not model.decoder_pred.bias.any()
    generator, img = torch.Generator().manual_seed(5), images()
    first, second = (model(img, generator=generator)[2] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(model(img, generator=generator.manual_seed(5))[2], first)
    assert torch.equal(model(img, mask=second)[2], second)
    torch.manual_seed(5)
    assert torch.equal(model(img)[2], first)


def test_positions():
    grid, dim = 3, 8
    positions = patches.sincos_positions(dim, grid)
    assert positions.shape == (1, 10, 8) and not positions[0, 0].any()
    for row, column, k in itertools.product(range(grid), range(grid), range(2)):
        frequency = 1 / 10000 ** (k / 2)
        at = positions[0, 1 + row * grid + column]
        angles = torch.tensor([column, column, row, row]) * frequency
        want = torch.where(torch.tensor([True, False] * 2), angles.sin(), angles.cos())
        torch.testing.assert_close(at[k::2], want)
    assert patches.interpolate_positions(positions, 3, 3) is positions
    wider = patches.interpolate_positions(positions, 6, 7)
    assert wider.shape == (1, 43, 8) and torch.equal(wider[:, 0], positions[:, 0])
    # Along the rows the column's half stays as it is, but for the tenth of a patch.
    taller = patches.interpolate_positions(positions, 7, 3)[0, 1:].view(7, 3, 8)
    assert (taller[:, :, :4] - taller[:1, :, :4]).abs().max() < 1e-5


def test_patchify_and_back():
    model, img = tiny(), images()
    parts = model.patchify(img)
    assert parts.shape == (3, 16, 12)
    assert torch.equal(parts[0, 5].view(2, 2, 3), img[0, :, 2:4, 2:4].movedim(0, -1))
    assert torch.equal(model.unpatchify(parts), img)


def test_what_analyses_look_at():
    model = tiny()
    for shape in ((2, 3, 8, 8), (2, 3, 12, 4)):
        img = images(*shape)
        n = 1 + shape[2] * shape[3] // 4
        attention = model.get_selfattention_enc(img, layer=1)
        assert attention.shape == (2, 3, n, n)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, n, dtype=img.dtype))
        keys = model.get_last_key_enc(img, layer=0)
        attn = model.blocks[0].layers[0][0]
        assert torch.equal(keys, attn.fn.qkv(attn.norm(model.prepare_tokens(img))))
    with pytest.raises(ValueError, match="layer from 0 to 1, got 2"):
        model.get_last_key_enc(img, layer=2)


def test_fuse_takes_encoder_and_decoder():
    model = tiny()
    before = [type(m) for m in model.modules()]
    report = crate_kernels.fuse(model)
    kinds = "1 PatchProjection, 2 Encoder, 2 Decoder, 4 MSSA, 2 ISTA"
    assert str(report) == f"replaced {kinds}; skipped 0"
    crate_kernels.unfuse(model)
    assert [type(m) for m in model.modules()] == before


def fused(**options):
    model = tiny(**options)
    crate_kernels.fuse(model)
    return model


def test_what_is_around_fused_blocks_is_ops():
    model, img = fused(), images()
    want = model(img, mask=torch.ones(3, 16))[1]
    _, count = calls(model, img)
    around = {"masked_tokens": 1, "residual_norm": 2, "masked_loss": 1}
    assert count == {"crate_block": 2, "decoder_block": 2, **around}
    seen = []
    model.norm.register_forward_hook(lambda *args: seen.append(args[2]))
    y, count = calls(lambda img: model(img, mask=torch.ones(3, 16))[1], img)
    assert len(seen) == 1 and count["residual_norm"] == 1
    torch.testing.assert_close(y, want)
    model.decoder_norm = nn.RMSNorm(12).double()
    assert "residual_norm" not in calls(model, img)[1]
    crate_kernels.unfuse(model)
    assert calls(model, img)[1] == {}


def test_gradients_that_the_ops_do_not_have_are_pytorchs():
    model, mask = fused(), (torch.rand(3, 16) < 0.5).double()
    plain = tiny()
    found = []
    for m in (plain, model):
        m.decoder_pos_embed.requires_grad_()
        img, weights = images().requires_grad_(), mask.clone().requires_grad_()
        loss = m(img, mask=weights)[0]
        found.append(torch.autograd.grad(loss, [img, weights, m.decoder_pos_embed]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("blocks", [3, 5])
def test_fused_blocks_hand_over_what_they_know_where_nobody_looks(blocks, monkeypatch):
    model, img, places = fused(depth=blocks), images(), []
    want = model(img, mask=torch.ones(3, 16))[1]

    def chained_block(*args, follows, precedes, **kwargs):
        places.append((follows, precedes))
        return run(*args, follows=follows, precedes=precedes, **kwargs)

    run = encoder.chained_block
    monkeypatch.setattr(encoder, "chained_block", chained_block)

    def between():
        places.clear()
        y = model(img, mask=torch.ones(3, 16))[1]
        torch.testing.assert_close(y, want)
        assert [a for a, _ in places[1:]] == [b for _, b in places[:-1]]
        assert not places[0][0] and not places[-1][1]
        return [b for _, b in places[:-1]]

    assert between() == [True] * (blocks - 1)
    seen = []
    with model.blocks[1].observed(lambda *args: seen.append(args)):
        assert between() == [False, False, True, True][: blocks - 1]
    assert len(seen) == 1
    handle = model.blocks[1].register_forward_hook(lambda *args: seen.append(args))
    assert between() == [False, False, True, True][: blocks - 1] and len(seen) == 2
    handle.remove()
    # A step run module by module is a layer less in the row.
    model.blocks[1].layers[0][0].register_forward_hook(lambda *args: seen.append(args))
    assert len(between()) == blocks - 2 and len(seen) == 3
    crate_kernels.unfuse(model.blocks[1])
    assert len(between()) == blocks - 2


@pytest.mark.parametrize("autocast", [torch.bfloat16, None])
def test_codes_are_in_the_dtype_of_the_unfused_model(autocast):
    model, img = tiny().float(), images().float()
    seen = []
    model.blocks[1].register_forward_hook(lambda m, args, y: seen.append((args[0].dtype, y.dtype)))
    found = []
    for _ in range(2):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            codes, _ = model.forward_encoder(img, 0.5)
            _, predicted, _ = model(img)
        found.append((codes.dtype, predicted.dtype, seen.pop(), seen.pop()))
        crate_kernels.fuse(model)
    assert found[0] == found[1]


def test_compiles_into_one_graph():
    torch.compiler.reset()
    model, img, mask = fused(depth=3), images(), torch.ones(3, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (compiled(img, mask=mask)[0]).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(img, mask=mask)[0].backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal_results(got, want, "compiled")
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tiny(image_size=9), "multiple of patch_size 2, got 9"),
        (lambda: tiny(decoder_heads=5), "decoder_heads to divide dim = 12, got 5"),
        (lambda: tiny(dim=6), "multiple of 4, got 6"),
        (lambda: tiny()(images(1, 3, 8, 4)), r"images of 16 patches of 2, got \(1, 3, 8, 4\)"),
        (lambda: tiny()(images(1, 3, 8, 7)), r"multiples of 2, got \(1, 3, 8, 7\)"),
        (lambda: tiny()(images(), 0.0), r"mask_ratio in \(0, 1\] that hides a patch, got 0.0"),
        (lambda: tiny()(images(), 1.5), "got 1.5"),
        (lambda: tiny()(images(), mask=torch.ones(3, 15)), r"mask of shape \(3, 16\), got"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_learns_to_complete_digits():
    data = torch.tensor(pytest.importorskip("sklearn.datasets").load_digits().images)
    digits = ((data - data.mean()) / data.std()).float()[:, None]
    torch.manual_seed(0)
    model = models.MaskedAutoencoder(
        image_size=8, patch_size=2, channels=1, dim=32, depth=2, heads=2, decoder_depth=2,
        decoder_heads=2,
    )  # fmt: skip
    assert crate_kernels.fuse(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        loss, _, _ = model(digits[torch.randint(len(digits), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # One grey for every hidden pixel leaves a loss of 1.
    assert losses[0] > 1 and sum(losses[-10:]) / 10 < 0.7
