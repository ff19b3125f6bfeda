"""CRATE in timm's registry. Needs timm, and with it a torchvision that goes with this torch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from crate_kernels import models
from crate_kernels import timm as command
from crate_kernels.nn import ISTA, MSSA

try:
    import timm
    from timm.optim import create_optimizer_v2
except (ImportError, RuntimeError) as error:  # RuntimeError: of torchvision, for another torch
    pytest.skip(f"timm does not import: {error}", allow_module_level=True)

from crate_kernels.models import timm_models

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def create(name: str = "crate_tiny_patch16_224", **options: object) -> timm_models.TimmCRATE:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options})


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_sizes_have_the_published_keys_and_shapes(size: str) -> None:
    with torch.device("meta"):
        ours = timm.create_model(f"crate_{size}_patch16_224")
        published = getattr(models, f"crate_{size}")()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, published)]
    assert shapes[0] == shapes[1]
    assert f"crate_{size}_patch16_224" in timm.list_models("crate_*")
    assert ours.default_cfg["input_size"] == (3, 224, 224)


def test_is_fused_unless_asked_not_to_be_and_computes_the_same() -> None:
    fused, plain = create(), create(fused=False)
    kinds = [type(m) for m in fused.modules()]
    assert kinds.count(MSSA) == kinds.count(ISTA) == 2
    assert not any(isinstance(m, (MSSA, ISTA)) for m in plain.modules())
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(
        fused.double()(images), plain.double()(images), rtol=1e-10, atol=1e-10
    )


def test_features_head_and_classifier() -> None:
    model = create(num_classes=7, in_chans=1).eval()
    images = torch.randn(2, 1, 16, 16)
    features = model.forward_features(images)
    assert features.shape == (2, 17, model.num_features)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, 24)
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(3, "avg")
    assert model(images).shape == (2, 3)
    assert model.pool == "mean"
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(features, pre_logits=True))
    with pytest.raises(ValueError, match="expected global_pool to be one of"):
        model.reset_classifier(3, "max")


def test_drop_rate_is_before_the_classifier() -> None:
    model = create(drop_rate=0.5, num_classes=0)
    features = model.forward_features(torch.randn(2, 3, 16, 16))
    dropped = model.forward_head(features) == 0
    assert 0 < dropped.float().mean() < 1
    assert not model.eval().forward_head(features).eq(0).any()


def test_what_has_no_weight_decay_and_layer_wise_rates() -> None:
    model = create()
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    layers = model.transformer.layers
    order = [model.cls_token, layers[0][0].fn.qkv.weight, layers[1][1].fn.weight]
    order.append(model.mlp_head[1].weight)
    rates = [scale[id(p)] for p in order]
    assert rates == sorted(set(rates))
    assert decay[id(model.pos_embedding)] == decay[id(model.cls_token)] == 0
    assert decay[id(layers[0][1].fn.weight)] == 0.1


def test_weights_of_ones_own_load_and_others_are_refused(tmp_path: Path) -> None:
    source = create()
    state = {f"module.{k}": v for k, v in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "crate.pt")
    own = {"file": str(tmp_path / "crate.pt")}
    loaded = create(pretrained=True, pretrained_cfg_overlay=own)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), source(images))
    other = create(pretrained=True, pretrained_cfg_overlay=own, num_classes=5)
    assert other(images).shape == (2, 5)
    assert torch.equal(other.pos_embedding, source.pos_embedding)
    with pytest.raises(ValueError, match="there are no weights to download"):
        create(pretrained=True)
    with pytest.raises(ValueError, match="expected no gradient checkpointing"):
        create().set_grad_checkpointing()


def test_copies_as_timm_averages_weights() -> None:
    model = create()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(copy.deepcopy(model)(images), model(images))


def test_runs_a_script_with_the_models_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from crate_kernels.__main__ import main

    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], timm.is_model('crate_tiny_patch16_224'))\n"
    )
    monkeypatch.setattr("sys.argv", ["before"])
    assert main(["timm", str(script), "--model", "x"]) == 0
    assert capsys.readouterr().out == "['--model', 'x'] True\n"
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["timm", str(script)]) == 2
    assert "pip install timm" in capsys.readouterr().err
