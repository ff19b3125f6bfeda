from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crate_kernels import backends, env_report

ROOT = Path(__file__).parent.parent


def test_runs_as_a_module_and_prints_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crate_kernels.env_report", "--json"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"versions", "devices", "backends", "hazards", "variables"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert found["backends"]["cpu"]["reference"] == "works"
    assert set(found["variables"]) >= {backends.BACKEND_VARIABLE, "TRITON_INTERPRET"}


def test_the_text_has_all_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "reference")
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    found = env_report.report()
    lines = env_report.text(found).splitlines()
    for name, value in found["versions"].items():
        assert f"{name:<15}{value}" in lines
    for device, verdicts in found["backends"].items():
        assert any(line.startswith(f"{device:<15}") for line in lines)
        assert all(f"  {backend:<13}{verdict}" in lines for backend, verdict in verdicts.items())
    assert f"{backends.BACKEND_VARIABLE}=reference" in lines
    assert any(line.startswith("TRITON_PTXAS_PATH not set") for line in lines)


def test_a_broken_driver_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise RuntimeError("driver too old\nand more")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    found = env_report.report()
    assert found["devices"][1] == {"device": "cuda", "name": "unusable: driver too old"}
    assert set(found["backends"]["cpu"]) == set(backends.BACKENDS)
    assert "cuda           unusable: driver too old" in env_report.text(found).splitlines()


def test_a_backend_that_fails_is_not_called_working(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(env_report, "tied_attention", fail)
    assert env_report.working_backends()["cpu"]["reference"] == "fails: no compiler"


@pytest.mark.parametrize(
    ("triton", "ptxas", "named"),
    [
        ("3.3.1", "13.3", []),
        ("3.4.0", "13.3", ["Triton 3.4.0: can mis-compile"]),
        ("3.7.0+git1234", "13.4", ["Triton 3.7.0+git1234: can mis-compile"]),
        ("3.7.1", "13.3", ["Triton 3.7.1: has an illegal-access fault"]),
        ("3.8.0", "12.8", ["ptxas 12.8: before 13.3"]),
        ("not installed", env_report.UNKNOWN, []),
    ],
)
def test_hazards_of_the_versions_found(
    triton: str, ptxas: str, named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env_report, "triton_version", lambda: triton)
    monkeypatch.setattr(env_report, "ptxas", lambda: (ptxas, "(somewhere)"))
    notes = env_report.hazards()
    assert len(notes) == len(named)
    assert all(note.startswith(start) for note, start in zip(notes, named, strict=True))


@pytest.mark.parametrize(
    ("commit", "status", "expected"),
    [("c0ffee1", "", "c0ffee1"), ("c0ffee1", " M setup.py", "c0ffee1-dirty"), ("", "", "unknown")],
)
def test_the_commit_says_where_files_differ_from_it(
    commit: str, status: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(env_report, "__file__", str(tmp_path / "crate_kernels" / "env_report.py"))
    printed = {"rev-parse": commit, "status": status}
    monkeypatch.setattr(env_report, "_output", lambda *command: printed[command[3]])
    assert env_report.git_commit() == env_report.UNKNOWN  # not a checkout
    (tmp_path / ".git").mkdir()
    assert env_report.git_commit() == expected


@pytest.mark.parametrize("command", [["no-such-program-here"], ["false"]])
def test_what_is_missing_or_fails_prints_nothing(command: list[str]) -> None:
    assert env_report._output(*command) == ""
