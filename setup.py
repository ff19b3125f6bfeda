"""Builds the CUDA kernels of csrc/ by CMake where nvcc is found; pyproject.toml has the rest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SKIP = "CRATE_KERNELS_SKIP_CUDA"
NVCC = shutil.which(os.environ.get("CUDACXX") or "nvcc")
# Installed in place of the extension; crate_kernels/cuda_extension.py reads it.
WHY_NOT = "_cuda_not_built.txt"


def why_not_built() -> str:
    if os.environ.get(SKIP, "0") not in ("", "0"):
        return f"{SKIP} was set when crate_kernels was installed"
    if NVCC is None:
        return "nvcc was not found (on PATH, or as CUDACXX) when crate_kernels was installed"
    return ""


def say_why_not() -> None:
    if why_not_built():
        print(f"crate_kernels: without the CUDA kernels of csrc/: {why_not_built()}", flush=True)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        package = Path(self.build_lib, "crate_kernels")
        if why_not_built() and package.is_dir():  # not in an editable install
            say_why_not()
            (package / WHY_NOT).write_text(why_not_built() + "\n")


class BuildExt(build_ext):
    def run(self) -> None:
        say_why_not()
        super().run()

    def build_extension(self, extension: Extension) -> None:
        """Leaves the module where setuptools expects it, or fails the build."""
        try:
            import pybind11
        except ImportError as error:
            raise failure("pybind11 is not installed (pip install pybind11 cmake ninja)") from error
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve()
        # pip puts the tools of an isolated build on PATH; an environment need not be activated.
        path = os.environ.get("PATH", os.defpath) + os.pathsep + sysconfig.get_path("scripts")
        cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
        if not cmake or not ninja:
            raise failure("cmake and ninja are needed (pip install cmake ninja)")
        # All of these are given each time: an isolated build's are gone by the next one.
        settings = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_CUDA_COMPILER": NVCC,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
        }
        given = [f"-D{name}={value}" for name, value in settings.items()]
        try:
            subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *given], check=True)
            subprocess.run([cmake, "--build", build], check=True)
        except subprocess.CalledProcessError as error:
            raise failure(f"CMake failed with exit code {error.returncode}, see above") from error


def failure(what: str) -> CompileError:
    return CompileError(
        f"the CUDA kernels of crate_kernels could not be built: {what}. {SKIP}=1 in the "
        "environment installs the Triton and reference backends alone."
    )


setup(
    ext_modules=[] if why_not_built() else [Extension("crate_kernels._cuda", sources=[])],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
)
