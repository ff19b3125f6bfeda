"""``python -m crate_kernels train``: what it learns, writes, resumes and refuses."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from crate_kernels import models, train
from crate_kernels.train import checkpoint, config, data, distributed, log, loop

for module in ("tqdm", "sklearn"):
    pytest.importorskip(module)

ROOT = Path(__file__).parent.parent
TINY = ["--dim", "32", "--depth", "2", "--heads", "2", "--optimizer", "adamw"]
STEPS = ["--steps", "12", "--log-every", "3", "--validate-every", "6"]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
TEXT = Path(json.__file__).parent  # some 60 kB of Python


def arguments(*argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", *map(str, argv)])


def run(out: Path, *argv: object) -> int:
    return train.main(arguments("--out", out, *argv))


def rows(out: Path, split: str | None = None) -> list[dict[str, str]]:
    """metrics.csv but for the speed."""
    found = [{**r, "per_second": ""} for r in log.read(out / "metrics.csv")]
    return [r for r in found if split in (None, r["split"])]


def losses(out: Path, split: str) -> list[float]:
    return [float(r["loss"]) for r in rows(out, split)]


def saved(out: Path, name: str = "last.pt") -> dict[str, Any]:
    return torch.load(out / name, weights_only=True)


def assert_same_state(a: Any, b: Any) -> None:
    """Bit by bit, through nested dicts and sequences."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same_state(left, right)
    else:
        assert a == b


def prepared(*argv: object) -> loop.Run:
    """A run of one process, before its first step."""
    options = vars(arguments(*argv))
    chosen = config.Config(**options).resolved(1, "cpu")
    sets = data.load(chosen)
    world = distributed.World.from_environment("cpu")
    return loop.Run(chosen, world, sets, len(sets.train) // chosen.batch_size)


def batches_of(run: loop.Run) -> Any:
    order = data.Order(run.config, run.world, len(run.sets.train), 0, run.steps)
    return iter(data.batches(run.sets.train, order, run.config, run.world))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """As the processes that are started here have, so that sums come out alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


# ---- resuming


def test_goes_on_after_a_kill_as_if_there_had_been_none(tmp_path: Path) -> None:
    options = [*TINY, "--steps", "60", "--log-every", "7", "--validate-every", "30"]
    options += ["--save-every", "5", "--ema", "0.9", "--mixup", "0.2", "--dtype", "float16"]
    command = [sys.executable, "-m", "crate_kernels", "train", "--device", "cpu", *options]
    victim = subprocess.Popen(
        [*command, "--out", str(tmp_path / "killed")],
        cwd=ROOT, env=ALONE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while victim.poll() is None and len(rows(tmp_path / "killed")) < 2:
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL, "it was over before it could be killed"
    step = saved(tmp_path / "killed")["step"]
    assert 0 < step < 60
    assert run(tmp_path / "killed", *options, "--resume") == 0
    assert run(tmp_path / "whole", *options) == 0
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    for name in ("last.pt", "best.pt"):
        killed, whole = saved(tmp_path / "killed", name), saved(tmp_path / "whole", name)
        assert killed.pop("config") != whole.pop("config")  # --out and --resume
        assert_same_state(killed, whole)


def test_a_line_cut_by_a_kill_and_later_ones_are_written_again(tmp_path: Path) -> None:
    first = log.Log(tmp_path, 0, 9, "images", active=True)
    for step in (1, 2, 3):
        first.write(step=step, split="val", loss=step / 3, accuracy=0.5, epoch=step)
    first.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,4,val,0.12")
    again = log.Log(tmp_path, 2, 9, "images", active=True)
    again.write(step=3, split="val", loss=7.0, accuracy=0.5, epoch=3)
    again.close()
    found = rows(tmp_path)
    assert [(r["step"], float(r["loss"])) for r in found] == [("1", 1 / 3), ("2", 2 / 3), ("3", 7)]


def test_a_checkpoint_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.write(path, {"step": 1})

    def fail_half_way(content: object, file: Any) -> None:
        file.write(b"PK half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail_half_way)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_kill_between_the_best_and_the_last_file_costs_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TINY, *STEPS, "--lr", "1e-30"]  # the first validation stays the best
    written, write = [], checkpoint.write

    def killed_before_the_second(path: Path, content: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "write", killed_before_the_second)
        run(tmp_path / "killed", *options)
    assert run(tmp_path / "killed", *options, "--resume") == 0
    assert run(tmp_path / "whole", *options) == 0
    assert_same_state(*(saved(tmp_path / o, "best.pt")["model"] for o in ("killed", "whole")))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_goes_on_from_a_file_in_another_folder_and_says_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "a", *TINY, *STEPS) == 0
    more = [*TINY, *STEPS, "--steps", "15", "--resume", tmp_path / "a" / "last.pt"]
    assert run(tmp_path / "b", *more, "--ema", "0.5", "--dtype", "float16") == 0
    printed = capsys.readouterr().out
    assert "going on from step 12" in printed
    assert "not as the run was begun: steps 12 -> 15" in printed
    assert [r["step"] for r in rows(tmp_path / "b")] == ["15", "15"]
    assert run(tmp_path / "b", *more) == 2  # which would throw away what is there
    expected = f"--resume to go on with {tmp_path / 'b' / 'last.pt'}"
    assert expected in capsys.readouterr().err
    assert saved(tmp_path / "b")["step"] == 15
    own = ["--resume", tmp_path / "b" / "last.pt"]
    assert run(tmp_path / "b", *more[:-2], *own) == 0
    assert run(tmp_path / "b", *more[:-2], "--resume") == 0  # it has nothing to do
    assert len(rows(tmp_path / "b")) == 2


def test_options_of_the_optimizer_that_changed_count(tmp_path: Path) -> None:
    """The decay alone, with a gradient of zero, moves a weight by rate * decay of itself."""
    assert run(tmp_path, *TINY, *STEPS) == 0
    options = [*TINY, "--steps", "20", "--lr", "1e-3", "--warmup", "0", "--weight-decay", "0.5"]
    it = prepared(*options)
    checkpoint.restore(it, saved(tmp_path))
    for state in it.optimizer.state.values():
        state["exp_avg"].zero_()
    before = [p.detach().clone() for p in it.net.parameters()]
    for p in it.net.parameters():
        p.register_hook(torch.zeros_like)
    it.train_step(batches_of(it))
    shrunk = 1 - 0.5 * it.optimizer.param_groups[0]["lr"]
    for old, new in zip(before, it.net.parameters(), strict=True):
        torch.testing.assert_close(new, old * shrunk)


def test_resume_starts_a_run_where_there_is_none(tmp_path: Path) -> None:
    assert run(tmp_path, *TINY, *STEPS, "--resume") == 0
    assert len(rows(tmp_path)) == 6


def test_stops_before_a_checkpoint_of_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "--steps", "9", "--save-every", "1", "--warmup", "0.9"]
    assert run(tmp_path, *options, "--lr", "1e38") == 1
    assert "stopped, the loss or its gradient is not finite" in capsys.readouterr().out
    state = saved(tmp_path)["model"]
    assert all(value.isfinite().all() for value in state.values())


# ---- several processes


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one_with_twice_the_batch(parallel: str, tmp_path: Path) -> None:
    """DDP bit by bit, where the halves of each batch are summed as --accumulate 2 sums them.

    FSDP2 to rounding: its optimizer sees other pieces of each tensor, which vectorise otherwise.
    """
    options = [*TINY, *STEPS, "--clip", "0", "--ema", "0.9", "--batch-size", "60"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "crate_kernels", "train", "--device", "cpu", "--parallel", parallel]
    done = subprocess.run(
        [*command, *options, "--out", str(tmp_path / "two")],
        cwd=ROOT, env=ALONE, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert run(tmp_path / "one", *options, "--accumulate", "2") == 0
    sides = [saved(tmp_path / side) for side in ("one", "two")]
    one, two = ({k: s[k] for k in ("model", "ema", "optimizer", "step")} for s in sides)
    if parallel == "ddp":
        assert_same_state(one, two)
        assert losses(tmp_path / "one", "train") == losses(tmp_path / "two", "train")
    else:
        one["optimizer"], two["optimizer"] = (s["optimizer"]["state"] for s in sides)
        torch.testing.assert_close(one, two)
    # Validation, and the norm of FSDP2, are summed in another order.
    for name, split in (("loss", None), ("accuracy", "val"), ("gradient_norm", "train")):
        a, b = ([float(r[name]) for r in rows(tmp_path / side, split)] for side in ("one", "two"))
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b))
    # One process goes on from the checkpoint of two.
    assert run(tmp_path / "two", *options, "--steps", "14", "--resume") == 0
    assert saved(tmp_path / "two")["step"] == 14


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
