"""Wheels and sdists of this source tree, built as pip builds them but without isolation."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATH = os.environ.get("PATH", os.defpath) + os.pathsep + sysconfig.get_path("scripts")


def copy_source(to: Path) -> Path:
    """What a build reads, in ``to``: nothing built before is there."""
    to.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "CMakeLists.txt"):
        shutil.copy(ROOT / name, to)
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    for name in ("crate_kernels", "csrc"):
        shutil.copytree(
            ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    return to


def build(kind: str, source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build a "wheel" or an "sdist" into ``source``/dist; stdout has stderr too."""
    code = f"import setuptools.build_meta as b; b.build_{kind}('dist')"
    environment = {**os.environ, "CRATE_KERNELS_SKIP_CUDA": "0", "PATH": PATH, **variables}
    (source / "dist").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def missing_tools() -> list[str]:
    """What a build of the CUDA kernels needs and is not here."""
    tools = [name for name in ("nvcc", "cmake", "ninja") if shutil.which(name, path=PATH) is None]
    modules = [m for m in ("setuptools", "pybind11") if importlib.util.find_spec(m) is None]
    return tools + modules
