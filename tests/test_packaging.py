from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from building import ROOT, build, copy_source, missing_tools

import crate_kernels


def python(*args: str, **options: object) -> str:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements-dev.txt").read_text()
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", lines, re.M))


def test_import_leaves_the_gpu_and_triton_alone() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import crate_kernels\n"
        "print(torch.cuda.is_initialized(), sorted(set(sys.modules) - before))"
    )
    initialised, modules = python("-c", code, cwd=ROOT).split(maxsplit=1)
    assert initialised == "False"
    for name in (
        "crate_kernels._cuda",
        "triton",
        "torch._dynamo",
        "sklearn",
        "matplotlib",
        "tqdm",
        "einops",
        "torchvision",
        "timm",
        "lion_pytorch",
    ):
        assert f"'{name}'" not in modules, f"{name} takes its time, and not everybody has it"


def test_ruff_and_clang_format_are_pinned_alike_everywhere() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = dict(re.findall(r"repo: \S*/(\S+)\n\s+rev: v(\S+)", hooks))
    assert found == {
        "ruff-pre-commit": pins()["ruff"],
        "mirrors-clang-format": pins()["clang-format"],
    }


def test_every_development_requirement_is_pinned() -> None:
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert len(wanted) == len(pins())


def test_torch_is_no_build_requirement() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = (\[.*?\])", pyproject, re.M | re.S)
    assert requires is not None
    assert "torch" not in requires[1]


@pytest.mark.parametrize("document", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")))
def test_links_and_paths_in_documents_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", text)
    paths = re.findall(r"`((?:crate_kernels|tests|docs|tools|benchmarks)/[\w./-]*)`", text)
    missing = [path for path in links if not (document.parent / path).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_makefile_describes_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)", makefile, re.M)
    assert phony is not None
    assert set(phony[1].split()) == set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools before 77 does not know the form of our licence field")
    return copy_source(tmp_path / "source")


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"CRATE_KERNELS_SKIP_CUDA": "1"}, "CRATE_KERNELS_SKIP_CUDA was set"),
        ({"PATH": "/nowhere", "CUDACXX": ""}, "nvcc was not found"),
    ],
)
def test_wheel_without_the_cuda_kernels(source: Path, variables: dict[str, str], why: str) -> None:
    """Holds every module, and says why it holds no more."""
    done = build("wheel", source, **variables)
    assert done.returncode == 0, done.stdout
    assert f"without the CUDA kernels of csrc/: {why}" in done.stdout
    (wheel,) = source.glob("dist/*-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("crate_kernels/")}
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA")))
        recorded = archive.read("crate_kernels/_cuda_not_built.txt").decode()
    assert recorded.startswith(why) and "when crate_kernels was installed" in recorded
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "crate_kernels").rglob("*.py")}
    assert held == expected | {"crate_kernels/py.typed", "crate_kernels/_cuda_not_built.txt"}
    headers = metadata.decode().splitlines()
    assert f"Version: {crate_kernels.__version__}" in headers
    assert "License-Expression: MIT" in headers


def test_sdist_holds_what_a_build_needs(source: Path) -> None:
    done = build("sdist", source, CRATE_KERNELS_SKIP_CUDA="1")
    assert done.returncode == 0, done.stdout
    (sdist,) = source.glob("dist/*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.*")}
    assert held >= csrc | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"}


def test_a_failed_build_of_the_cuda_kernels_fails_the_install(source: Path, tmp_path: Path) -> None:
    missing = [tool for tool in missing_tools() if tool != "nvcc"]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    done = build("wheel", source, CUDACXX=str(broken))
    assert done.returncode != 0
    assert "the CUDA kernels of crate_kernels could not be built" in done.stdout
    assert "CRATE_KERNELS_SKIP_CUDA=1" in done.stdout
    assert not list(source.glob("dist/*.whl"))
