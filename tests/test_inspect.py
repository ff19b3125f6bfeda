"""The inspect command: models by their checkpoints, images as validation takes them, errors."""

from __future__ import annotations

import csv
import re

import pytest
import torch
from PIL import Image

from crate_kernels import models
from crate_kernels.__main__ import main
from crate_kernels.train.data import MEAN, STD
from crate_kernels.whitebox import images, trace
from crate_kernels.whitebox.inspect import load_model

DIM, DEPTH, HEADS = 24, 3, 3


def small(**kwargs):
    torch.manual_seed(0)
    size = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": DIM, "depth": DEPTH}
    return models.CRATE(**{**size, "heads": HEADS, "dim_head": 8, **kwargs}).eval()


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    from sklearn.datasets import load_sample_image

    path = tmp_path_factory.mktemp("images") / "flower.png"
    Image.fromarray(load_sample_image("flower.jpg")).save(path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    """As DataParallel's training script writes it."""
    path = tmp_path / "published.pth.tar"
    state = {f"module.{key}": value for key, value in small().state_dict().items()}
    torch.save({"epoch": 3, "arch": "CRATE_none", "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of train on digits, with averaged weights."""
    out = tmp_path_factory.mktemp("run")
    options = "--data digits --dim 32 --depth 2 --heads 4 --steps 2 --optimizer adamw --ema 0.5"
    assert main(["train", *options.split(), "--out", str(out)]) == 0
    return out / "last.pt"


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_writes_the_table_the_layers_and_the_attention(checkpoint, photograph, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    argv = ["inspect", str(checkpoint), str(photograph), "--heads", "3", "--out", str(out)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    names = {"layers.csv", "layers.png", "attention-flower.png"}
    assert {path.name for path in out.iterdir()} == names
    assert all(f"wrote {out / name}" in printed for name in names)
    model = small()
    x, _ = images.load(photograph, 32, 3)
    with torch.no_grad(), trace(model, coherence=True) as t:
        model(x[None])
    rows = read(out / "layers.csv")
    assert [row["name"] for row in rows] == [f"transformer.layers.{i}" for i in range(DEPTH)]
    for row, want in zip(rows, t.table().rows, strict=True):
        for column in ("coding_rate", "compressed_rate", "sparsity", "coherence_max"):
            assert float(row[column]) == pytest.approx(getattr(want, column), rel=1e-4)
    with Image.open(out / "attention-flower.png") as picture:
        assert picture.size[0] > 300


def test_several_images_and_a_layer(checkpoint, photograph, tmp_path, capsys):
    other = tmp_path / "flower.jpg"
    Image.new("L", (40, 90), 200).save(other)
    argv = ["inspect", str(checkpoint), str(photograph), str(other), str(photograph)]
    assert main([*argv, "--heads", "3", "--layer", "-1", "--out", str(tmp_path / "out")]) == 0
    drawn = sorted(path.name for path in (tmp_path / "out").glob("attention*"))
    assert drawn == [f"attention-flower-{i}.png" for i in range(3)]
    assert read(tmp_path / "out" / "layers.csv")[0]["samples"] == "3"


def test_a_checkpoint_of_train(trained, photograph, tmp_path):
    out = tmp_path / "out"
    for extra in ([], ["--ema"], ["--model", "crate_tiny"]):
        assert main(["inspect", str(trained), str(photograph), "--out", str(out), *extra]) == 0
        assert len(read(out / "layers.csv")) == 2
    content = torch.load(trained)
    model, averaged = load_model(trained), load_model(trained, ema=True)
    assert [layer[0].fn.heads for layer in model.transformer.layers] == [4, 4]
    for name in ("cls_token", "transformer.layers.1.1.fn.weight"):
        assert torch.equal(model.state_dict()[name], content["model"][name])
        assert torch.equal(averaged.state_dict()[name], content["ema"][name])
    assert not torch.equal(model.cls_token, averaged.cls_token)


def test_published_sizes_are_known_by_their_shapes(tmp_path):
    plain = models.crate_small(num_classes=3, depth=12, image_size=64)
    torch.save(plain.state_dict(), tmp_path / "small.pth")
    model = load_model(tmp_path / "small.pth")
    assert model.transformer.heads == 12 and model.transformer.depth == 12
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (64, 64), (32, 33)])
def test_images_are_fitted_as_validation_does(size, tmp_path):
    """Against torch's own antialiased resize; Pillow rounds to whole numbers on the way."""
    torch.manual_seed(0)
    data = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8)
    Image.fromarray(data.numpy()).save(tmp_path / "x.png")
    x, shown = images.load(tmp_path / "x.png", 32, 3)
    assert x.shape == shown.shape == (3, 32, 32)
    shorter = round(32 / 0.875)
    high, wide = (shorter if s == min(size) else shorter * s // min(size) for s in size[::-1])
    scaled = torch.nn.functional.interpolate(
        data.permute(2, 0, 1)[None].float(), (high, wide), mode="bilinear", antialias=True
    )[0]
    top, left = round((high - 32) / 2), round((wide - 32) / 2)
    want = scaled[:, top : top + 32, left : left + 32]
    assert (255 * shown - want).abs().max() < 1.5
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(x * std + mean, shown)


def test_an_image_that_fits_stays(tmp_path):
    data = torch.arange(3 * 16, dtype=torch.uint8).view(4, 4, 3)
    Image.fromarray(data.numpy()).save(tmp_path / "x.png")
    _, shown = images.load(tmp_path / "x.png", 4, 3)
    torch.testing.assert_close(shown, data.permute(2, 0, 1) / 255)
    grey, same = images.load(tmp_path / "x.png", 4, 1)
    assert grey.shape == (1, 4, 4) and torch.equal(grey, same)


def saver(folder):
    """content -> the path of a file of its own with it."""

    def save(content):
        path = folder / f"file-{len(list(folder.iterdir()))}.pth"
        torch.save(content, path)
        return path

    return save


def test_errors_name_the_file_and_what_is_wrong(checkpoint, photograph, tmp_path, capsys):
    state = small().state_dict()
    text = tmp_path / "text.txt"
    text.write_text("not an image")
    saved = saver(tmp_path)
    without = {key: value for key, value in state.items() if key != "cls_token"}
    gpt = {"model": {}, "config": {"model": "crate_gpt"}}
    oblong = {**state, "pos_embedding": torch.zeros(1, 1 + 15, DIM)}
    patches = {**state, "to_patch_embedding.2.weight": torch.zeros(DIM, 50)}
    heads = ["--heads", "3"]
    cases = [
        ([tmp_path / "none.pth", photograph], "none.pth: No such file or directory"),
        ([text, photograph], f"expected a checkpoint of torch.save .* got {text}"),
        ([saved([1, 2]), photograph], "expected a path, a state dict .* got list"),
        ([saved({"a": 1}), photograph], "weights of a CRATE image classifier"),
        ([saved(gpt), photograph], "expected one of .*crate_tiny.* got crate_gpt"),
        ([saved(without), photograph, *heads], "missing .*cls_token"),
        ([saved(oblong), photograph, *heads], "a square image, got 15 patches"),
        ([saved(patches), photograph, *heads], "square patches .* got 50 values"),
        ([checkpoint, photograph], "expected --heads .* width 24 and depth 3"),
        ([checkpoint, photograph, "--heads", "5"], "heads that divide the projected width 24"),
        (
            [checkpoint, photograph, "--model", "crate_base"],
            "width 768 .* got width 24 and depth 3",
        ),
        ([checkpoint, photograph, "--ema", *heads], "averaged weights for --ema"),
        ([checkpoint, text, *heads], f"expected an image, got {text}"),
        ([checkpoint, tmp_path / "none.png", *heads], "expected an image, got .*No such file"),
        (
            [checkpoint, photograph, *heads, "--layer", "3"],
            "layers among the 3 of the model, got 3",
        ),
        ([checkpoint, photograph, *heads, "--out", text], "File exists"),
    ]
    for argv, words in cases:
        assert main(["inspect", *map(str, argv)]) == 2, words
        printed = capsys.readouterr()
        assert re.search(words, printed.err), (words, printed.err)
        assert printed.out == ""
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(checkpoint), str(photograph), "--model", "crate_huge"])
    assert ended.value.code == 2 and "crate_huge" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("matplotlib", "matplotlib"), ("PIL", "Pillow")])
def test_missing_packages_are_named(module, package, checkpoint, photograph, monkeypatch, capsys):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == module else object()
    )
    assert main(["inspect", str(checkpoint), str(photograph)]) == 2
    assert f"needs {package}; pip install {package}" in capsys.readouterr().err
