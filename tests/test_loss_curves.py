"""benchmarks/loss_curves.py: the script that compares training fused and not."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest

for package in ("sklearn", "tqdm", "matplotlib"):
    pytest.importorskip(package)

SIZE = ["--dim", "32", "--depth", "1", "--heads", "2", "--steps", "6", "--log-every", "2"]


@pytest.fixture
def script() -> Any:
    path = Path(__file__).parent.parent / "benchmarks" / "loss_curves.py"
    spec = importlib.util.spec_from_file_location("loss_curves", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fused_runs_are_nearer_than_another_seed(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--out", str(tmp_path), *SIZE]) == 0
    rows = list(csv.DictReader((tmp_path / "loss_curves.csv").open()))
    assert [int(r["step"]) for r in rows] == [2, 4, 6] and set(rows[0]) == {"step", *script.RUNS}
    curves = {name: {int(r["step"]): float(r[name]) for r in rows} for name in script.RUNS}
    apart = {name: script.distance(curves["unfused"], c) for name, c in curves.items()}
    assert 0 == apart["unfused"] < apart["fused"] < apart["unfused, another seed"]
    assert (tmp_path / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss_curves.csv", "loss_curves.png"]
    assert "root mean square difference" in capsys.readouterr().out


def test_a_fused_run_that_learns_something_else_is_told(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter((1.0, 1.1, 1.0, 1.2))
    monkeypatch.setattr(script, "train", lambda options, folder: {1: next(losses)})
    assert script.main(["--out", str(tmp_path)]) == 1


def test_options_that_the_script_sets_are_refused(script: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path), "--seed", "3"])
    with pytest.raises(SystemExit, match="failed"):
        script.main(["--out", str(tmp_path), "--lr", "0"])
    assert not list(tmp_path.iterdir())
