"""``python -m crate_kernels train``, killed, gone on with, and in several processes."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training import (
    STEPS,
    TINY,
    assert_same_state,
    batches_of,
    losses,
    one_thread,  # noqa: F401 - a fixture for all
    prepared,
    rows,
    run,
    saved,
)

from crate_kernels.train import checkpoint, log, loop

for module in ("tqdm", "sklearn"):
    pytest.importorskip(module)

ROOT = Path(__file__).parent.parent
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


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


def test_lion_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lion_pytorch")
    options = [*TINY, *STEPS, "--optimizer", "lion", "--lr", "1e-3"]
    train_step = loop.Run.train_step

    def stopped_after_eight(self: loop.Run, taken: Any) -> None:
        if self.step == 8:
            raise KeyboardInterrupt
        train_step(self, taken)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.Run, "train_step", stopped_after_eight)
        run(tmp_path / "stopped", *options)
    assert saved(tmp_path / "stopped")["step"] == 6
    assert run(tmp_path / "stopped", *options, "--resume") == 0
    assert run(tmp_path / "whole", *options) == 0
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    ends = [saved(tmp_path / name) for name in ("stopped", "whole")]
    assert_same_state(*({k: e[k] for k in ("model", "optimizer")} for e in ends))


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


def test_stops_where_half_precision_skips_every_step() -> None:
    it = prepared(*TINY, "--dtype", "float16", "--steps", "99")
    taken = batches_of(it)
    it.train_step(taken)
    assert it.healthy()
    next(it.net.parameters()).register_hook(lambda g: g * math.nan)
    for _ in range(5):
        it.train_step(taken)
    assert it.healthy()  # as an overflow or a few may be
    for _ in range(30):
        it.train_step(taken)
    assert not it.healthy()


def test_the_checkpoint_does_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, *TINY, *STEPS) == 0
    find, found = checkpoint.find, []
    monkeypatch.setattr(checkpoint, "find", lambda *a: found.append(find(*a)) or found[0])
    monkeypatch.setattr(loop, "_loop", lambda run, log: len(found[0]))
    assert run(tmp_path, *TINY, *STEPS, "--resume") == 0


# ---- several processes


def test_processes_that_see_other_files_do_not_begin(tmp_path: Path) -> None:
    """As on two machines without a common --out, one of which has a checkpoint."""
    assert run(tmp_path / "0", *TINY, *STEPS) == 0
    command = [sys.executable, "-m", "crate_kernels", "train", "--device", "cpu", *TINY, *STEPS]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {**ALONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [*command, "--resume", "--out", str(tmp_path / rank)],
            cwd=ROOT, env={**place, "RANK": rank, "LOCAL_RANK": "0"},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    for process, step in zip(processes, (12, 0), strict=True):
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2
        assert "every process to see the same --data and --out" in said
        assert f"and step {step} in process" in said
    assert not (tmp_path / "1").exists()


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
