from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pytest
import torch

from crate_kernels import demo
from crate_kernels.models import CRATE
from crate_kernels.nn import fuse

for module in demo.NEEDS:
    pytest.importorskip(module)


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", *argv])


def test_trains_to_the_target_and_reports_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(arguments("--no-bench")) == 0
    printed = capsys.readouterr().out
    assert "replaced 1 PatchEmbedding, 1 Encoder, 4 MSSA, 4 ISTA" in printed
    assert "FAILED" not in printed
    assert "held-out accuracy 9" in printed


def test_says_so_when_the_target_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(arguments("--no-bench", "--epochs", "1")) == 1
    assert "below the 95%" in capsys.readouterr().out


def test_stops_where_parity_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fuse_wrongly(model: torch.nn.Module) -> object:
        report = fuse(model)
        model.transformer.layers[1][1].fn.lambd *= 1.001
        return report

    monkeypatch.setattr(demo, "fuse", fuse_wrongly)
    assert demo.main(arguments()) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "Training" not in printed


def test_names_the_packages_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_installed", lambda module: module != "sklearn")
    assert demo.main(arguments()) == 1
    assert "pip install scikit-learn " in capsys.readouterr().out


def test_compares_speed_and_plots_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def small() -> CRATE:
        return CRATE(image_size=224, patch_size=56, num_classes=1000, dim=16, depth=1, heads=1)

    monkeypatch.setattr(demo, "crate_tiny", small)
    monkeypatch.setattr(demo, "SECONDS", 0.1)
    demo.compare_speed(torch.device("cpu"), tmp_path / "new" / "folder")
    printed = capsys.readouterr().out
    assert "inference" in printed and "training" in printed
    assert (tmp_path / "new" / "folder" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_split_is_stratified_and_fixed_by_the_seed() -> None:
    cpu = torch.device("cpu")
    (images, labels), (held_out, held_out_labels) = demo.digits(0, cpu)
    assert images.shape == (1347, 1, 16, 16)
    assert held_out.shape == (450, 1, 16, 16)
    assert all(43 <= n <= 46 for n in held_out_labels.bincount(minlength=10).tolist())
    assert torch.equal(labels, demo.digits(0, cpu)[0][1])
    assert not torch.equal(labels, demo.digits(1, cpu)[0][1])


def test_shifts_move_whole_images() -> None:
    image = torch.zeros(64, 1, 16, 16)
    image[:, :, 8, 8] = torch.arange(1.0, 65)[:, None]
    moved = demo.shifted(image)
    assert torch.equal(moved.amax((1, 2, 3)), torch.arange(1.0, 65))
    places = moved.flatten(1).argmax(1)
    rows, columns = places // 16, places % 16
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(6, 11))


def test_parity_passes_for_a_copy() -> None:
    model = demo.build()
    images, labels = torch.rand(8, 1, 16, 16), torch.randint(10, (8,))
    assert demo.parity(model, copy.deepcopy(model), images, labels)
