"""``python -m crate_kernels train``: what it learns, writes and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training import (
    STEPS,
    TINY,
    batches_of,
    losses,
    one_thread,  # noqa: F401 - a fixture for all
    prepared,
    rows,
    run,
    saved,
)

from crate_kernels import models, train
from crate_kernels.train import config, data, distributed, log, loop

for module in ("tqdm", "sklearn"):
    pytest.importorskip(module)

TEXT = Path(json.__file__).parent  # some 60 kB of Python


# ---- learning


def test_learns_digits_and_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--dim", "64", "--depth", "2", "--heads", "2"]
    out = tmp_path / "new" / "folder"
    assert run(out, *size, "--optimizer", "adamw", "--lr", "4e-3", "--epochs", "20") == 0
    accuracy = [float(r["accuracy"]) for r in rows(out, "val")]
    assert len(accuracy) == 20
    assert max(accuracy) > 0.85
    printed = capsys.readouterr()
    assert "fuse: replaced 1 PatchEmbedding, 1 Encoder, 2 MSSA, 2 ISTA" in printed.out
    assert f"accuracy {accuracy[-1]:.2%}" in printed.out
    assert len(printed.out.splitlines()) == 2 + 20  # and no bar where there is no terminal:
    assert printed.err == ""
    assert -saved(out)["best"] == max(accuracy)
    if log.importlib.util.find_spec("matplotlib"):
        assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = models.crate_tiny(10, channels=1, image_size=16, patch_size=4, dim=64, depth=2, heads=2)
    models.load_checkpoint(model, out / "best.pt")


def test_learns_text_beyond_the_frequencies_of_its_bytes(tmp_path: Path) -> None:
    options = ["--context", "32", "--batch-size", "32", "--steps", "150", "--lr", "1e-2"]
    assert run(tmp_path, "--model", "crate_gpt", "--data", TEXT, *TINY, *options) == 0
    text = b"\n".join(p.read_bytes() for p in sorted(TEXT.rglob("*.py")))
    counts = torch.tensor(list(text)).bincount().double()
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * frequencies.log()).sum().item()
    assert losses(tmp_path, "val")[-1] < entropy
    model = models.crate_gpt(256, context=32, dim=32, depth=2, heads=2)
    models.load_checkpoint(model, tmp_path / "best.pt")


def test_lion_takes_steps_of_the_size_of_the_rate() -> None:
    pytest.importorskip("lion_pytorch")
    options = ["--optimizer", "lion", "--lr", "1e-3", "--weight-decay", "0", "--warmup", "0"]
    it = prepared(*TINY, *options)
    before = [p.detach().clone() for p in it.net.parameters()]
    it.train_step(batches_of(it))
    for old, new in zip(before, it.net.parameters(), strict=True):
        moved = (new - old).abs()
        # The sign of the gradient, times the rate, to the rounding of a weight.
        slack = torch.finfo(torch.float32).eps * old.abs().max()
        assert ((moved == 0) | ((moved - 1e-3).abs() <= slack)).all()


def test_half_precision_scales_its_loss(tmp_path: Path) -> None:
    assert run(tmp_path, *TINY, *STEPS, "--dtype", "float16", "--lr", "4e-3") == 0
    scaler = saved(tmp_path)["scaler"]
    assert scaler["scale"] > 1
    assert scaler["_growth_tracker"] == 12  # every step was taken
    assert losses(tmp_path, "train")[-1] < losses(tmp_path, "train")[0]


def test_bfloat16_is_float32_to_its_rounding(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        assert run(tmp_path / dtype, *TINY, *STEPS, "--dtype", dtype) == 0
    a, b = losses(tmp_path / "float32", "train"), losses(tmp_path / "bfloat16", "train")
    assert a != b
    assert b == pytest.approx(a, rel=torch.finfo(torch.bfloat16).eps)


def test_averaged_weights(tmp_path: Path) -> None:
    it = prepared(*TINY, "--ema", "0.75", "--steps", "4")
    taken = batches_of(it)
    mean = None
    for _ in range(4):
        it.train_step(taken)
        now = [p.detach().clone() for p in it.net.parameters()]
        mean = now if mean is None else [m.lerp(n, 0.25) for m, n in zip(mean, now, strict=True)]
    torch.testing.assert_close([*it.ema.module.parameters()], mean)
    held_out = data.HeldOut(it.config, it.world, len(it.sets.validation))
    loader = data.batches(it.sets.validation, held_out, it.config, it.world)
    averaged = it.validate(loader)
    it.ema = None
    assert averaged != it.validate(loader)


def test_validation_counts_each_sample_once() -> None:
    it = prepared(*TINY, "--batch-size", "64")
    held_out = data.HeldOut(it.config, it.world, len(it.sets.validation))
    loss, accuracy = it.validate(data.batches(it.sets.validation, held_out, it.config, it.world))
    samples = it.sets.validation
    logits = it.net(samples.images)
    want = F.cross_entropy(logits, samples.labels).item()
    assert loss == pytest.approx(want, rel=1e-5)  # sums in another order
    assert accuracy == (logits.argmax(-1) == samples.labels).double().mean().item()


def test_accumulation_is_the_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.digits
    monkeypatch.setattr(data, "digits", lambda *to: [(x.double(), y) for x, y in digits(*to)])
    torch.set_default_dtype(torch.float64)
    try:
        results = []
        for accumulate in (1, 4):
            it = prepared(*TINY, "--accumulate", accumulate, "--ema", "0.5")
            taken = batches_of(it)
            for _ in range(3):
                it.train_step(taken)
            results.append([*it.net.parameters(), *it.ema.parameters(), it.norm])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_clips_the_gradient() -> None:
    it = prepared(*TINY, "--clip", "0.5", "--warmup", "0")
    it.optimizer = torch.optim.SGD(it.net.parameters(), lr=1.0)
    before = [p.detach().clone() for p in it.net.parameters()]
    it.train_step(batches_of(it))
    steps = [n - o for n, o in zip(it.net.parameters(), before, strict=True)]
    norm = torch.nn.utils.get_total_norm(steps).item()
    assert it.norm > 0.5
    assert norm == pytest.approx(0.5 * it.config.lr, rel=1e-4)  # weights round


def test_rate_rises_then_falls_to_nothing() -> None:
    rates = [loop.rate(step, 100, 0.2) for step in range(100)]
    assert rates[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert rates[20] == 1
    assert rates[60] == pytest.approx(0.5)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_mixup_mixes_images_and_labels_alike() -> None:
    x, y = torch.eye(4).view(4, 1, 2, 2), torch.arange(4)
    images, targets = loop.mixed(x, y, 0.5, 4)
    assert torch.equal(images.view(4, 4), targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_mixup_trains_and_stays_a_function_of_the_step(tmp_path: Path) -> None:
    options = [*TINY, *STEPS, "--mixup", "0.4"]
    assert run(tmp_path / "a", *options) == run(tmp_path / "b", *options) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


# ---- order and data


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_steps_take_the_same_samples_however_they_are_split(
    processes: int, accumulate: int
) -> None:
    chosen = config.Config(batch_size=8, accumulate=accumulate, seed=3)
    worlds = [distributed.World(r, processes, r, torch.device("cpu")) for r in range(processes)]
    keys = [list(data.Order(chosen, world, 21, 0, 6)) for world in worlds]
    single = distributed.World(0, 1, 0, torch.device("cpu"))
    alone = list(data.Order(config.Config(batch_size=8, seed=3), single, 21, 0, 6))
    for step in range(6):
        passes = slice(step * accumulate, (step + 1) * accumulate)
        taken = [key for of_process in keys for batch in of_process[passes] for key in batch]
        assert sorted(taken) == sorted(alone[step])
    for epoch in range(3):
        seen = [key for step in alone[2 * epoch : 2 * epoch + 2] for key in step]
        assert len(set(seen)) == 16
        assert {e for e, _ in seen} == {epoch}
    assert list(data.Order(chosen, worlds[0], 21, 4, 6)) == keys[0][4 * accumulate :]


def test_samples_are_a_function_of_seed_epoch_and_index() -> None:
    sets = data.load(config.Config().resolved(1, "cpu"))
    first, again, other = (sets.train[key][0] for key in ((0, 5), (0, 5), (1, 5)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sets.validation[0, -1][1].item() == -1


def test_windows_of_text_give_the_next_byte() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    windows = data.Text(text, 8, 0, moved=True)
    for epoch in range(5):
        starts = [windows.sample(i, epoch)[0][0].item() for i in range(len(windows))]
        assert starts == list(range(starts[0], starts[0] + 8 * len(windows), 8))
        assert starts[0] < 8
        assert all(torch.equal(x + 1, y) for x, y in (windows.sample(i, epoch) for i in range(11)))
    assert len(windows) == 11
    assert len(data.Text(text, 8, 0, moved=False)) == 12


def test_folders_of_images(tmp_path: Path) -> None:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import: {error}")
    from PIL import Image

    for part, count in (("train", 12), ("val", 5)):
        for label, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20 + i, 18), colour).save(tmp_path / part / label / f"{i}.png")
    size = ["--image-size", "16", "--patch-size", "8", "--batch-size", "8", "--lr", "1e-2"]
    options = [*TINY, *size, "--data", tmp_path, "--epochs", "6"]
    assert run(tmp_path / "0", *options, "--workers", "0") == 0
    assert run(tmp_path / "2", *options, "--workers", "2") == 0
    assert rows(tmp_path / "0") == rows(tmp_path / "2")
    assert float(rows(tmp_path / "0", "val")[-1]["accuracy"]) == 1
    (tmp_path / "val" / "green").mkdir()
    with pytest.raises(ValueError, match=r"same classes .* only in one: \['green'\]"):
        data.load(config.Config(data=str(tmp_path)).resolved(1, "cpu"))


# ---- refusals


def folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    return root


BAD = {
    "no folder": (["--data", "nowhere"], "a folder with train/ and val/, got no such folder"),
    "no val": (["--data", "{half}"], "a folder with train/ and val/, got one without val/"),
    "no classes": (["--data", "{empty}"], "a folder for each class in {empty}/train, got none"),
    "no text": (["--model", "crate_gpt", "--data", "nowhere"], "got no such file"),
    "no texts": (["--model", "crate_gpt", "--data", "{empty}"], "got a folder without any"),
    "short": (["--model", "crate_gpt", "--data", __file__, "--context", "9999"], "a text of more"),
    "batch": (["--batch-size", "66", "--accumulate", "4"], "to be a multiple of 4 (1 processes"),
    "large batch": (["--batch-size", "2000"], "at least --batch-size 2000 training samples"),
    "patches": (["--patch-size", "5"], "image_size to be a multiple of patch_size (5, 5)"),
    "heads": (["--model", "crate_gpt", "--data", __file__, "--context", "8", "--heads", "5"], "5"),
    "unfused": (["--model", "crate_gpt", "--no-fuse"], "which is built on the ops"),
    "memory": (["--memory", "low", "--no-fuse"], "a fused image model for --memory, got low"),
    "graph": (["--graph"], "one process on a CUDA device for --graph, got cpu"),
    "mixup": (["--model", "crate_gpt", "--mixup", "0.1"], "no --mixup with crate_gpt, got 0.1"),
    "context": (["--context", "8"], "no --context with crate_tiny, got 8"),
    "rate": (["--lr", "0"], "--lr above 0, got 0"),
    "decay": (["--ema", "1"], "--ema at least 0 and below 1, got 1.0"),
    "steps": (["--steps", "0"], "--steps of at least 1, got 0"),
    "resume": (["--resume", "nowhere.pt"], "nowhere.pt, which does not exist"),
    "not one": (
        ["--resume", "{text}"],
        "expected a checkpoint of train, got {text} (UnpicklingError)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_before_it_begins(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "check_packages", lambda chosen: None)
    folder(tmp_path, "half/train", "empty/train", "empty/val")
    (tmp_path / "text.pt").write_text("no checkpoint")
    places = {"half": tmp_path / "half", "empty": tmp_path / "empty", "text": tmp_path / "text.pt"}
    argv, expected = BAD[case]
    argv = [part.format(**places) for part in argv]
    assert run(tmp_path / "out", "--optimizer", "adamw", *argv) == 2
    printed = capsys.readouterr()
    assert expected.format(**places) in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_refuses_another_model_and_a_used_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, *TINY, *STEPS) == 0
    assert run(tmp_path, *TINY, *STEPS) == 2
    assert f"--resume to go on with {tmp_path / 'last.pt'}" in capsys.readouterr().err
    assert run(tmp_path, *TINY, *STEPS, "--resume", "--depth", "3") == 2
    assert "a checkpoint of this crate_tiny, with transformer.layers.2" in capsys.readouterr().err
    assert run(tmp_path, *TINY, *STEPS, "--resume", "--dim", "64") == 2
    assert "with cls_token of shape (1, 1, 64), got" in capsys.readouterr().err
    monkeypatch.setattr(train, "check_packages", lambda chosen: None)
    assert run(tmp_path, *TINY, *STEPS, "--resume", "--optimizer", "lion") == 2
    assert "a checkpoint with the state of lion, got adamw" in capsys.readouterr().err


def test_names_the_packages_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path, "--data", tmp_path) == 2
    printed = capsys.readouterr().err
    assert "pip install tqdm lion-pytorch torchvision (or install crate_kernels[train])" in printed
    assert "--optimizer adamw" in printed


def test_defaults_are_the_papers() -> None:
    chosen = config.Config(data="imagenet").resolved(8, "cuda")
    assert (chosen.optimizer, chosen.lr, chosen.weight_decay) == ("lion", 2.4e-4, 0.5)
    assert (chosen.batch_size, chosen.epochs, chosen.label_smoothing) == (2048, 150, 0.1)
    assert math.isclose(chosen.warmup * chosen.epochs, 5)
