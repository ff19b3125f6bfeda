from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crate_kernels.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "crate_kernels", *args], cwd=ROOT, capture_output=True, text=True
    )


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"crate_kernels {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["brew"], ["demo", "--nonsense"]])
def test_bad_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_runs_as_a_module() -> None:
    done = run("env_report")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout
    assert run("brew").returncode == 2
