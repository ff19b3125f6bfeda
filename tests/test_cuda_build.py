"""The CUDA kernels compile for sm_90a, without spills, on a machine that needs no GPU."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from building import PATH, ROOT, build, copy_source, missing_tools

from crate_kernels import backends
from crate_kernels.block.cuda_kernels import MOST_COLUMNS
from crate_kernels.cuda_extension import mask_bytes, moments_shape

pytestmark = pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A source tree with its wheel installed into installed/, and what the build printed."""
    source = copy_source(tmp_path_factory.mktemp("cuda") / "source")
    done = build("wheel", source, CUDAFLAGS="-Xptxas=-v")
    assert done.returncode == 0, done.stdout
    (wheel,) = source.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(source / "installed")
    return source, done.stdout


def complaints(log: str) -> list[str]:
    """Kernels whose registers spill, or whose wgmma wait for each other, by what ptxas -v says."""
    found = [line for line in log.splitlines() if "wgmma" in line and "serialized" in line]
    report = r"Function properties for (\w+)\s+\d+ bytes stack frame, (\d+) bytes spill stores"
    spills = re.findall(report, log)
    assert spills, "ptxas reported on no kernel"
    return found + [f"{name}: {size} bytes spilled" for name, size in spills if int(size) > 0]


def test_no_kernel_spills_registers(built):
    found = complaints(built[1])
    assert not found, "\n".join(found)


def test_the_search_for_spills_finds_one(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void spills(float* p) {\n"
        "    float v[64];\n"
        "    for (int i = 0; i < 64; ++i) v[i] = p[i];\n"
        "    __syncthreads();\n"
        "    for (int i = 0; i < 64; ++i) p[i] = v[i] * v[63 - i];\n"
        "}\n"
    )
    nvcc = ["nvcc", "-arch=sm_90a", "-maxrregcount=32", "-Xptxas=-v", "-cubin", str(source)]
    done = subprocess.run(nvcc, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = complaints(done.stderr)
    assert "spills" in found and "bytes spilled" in found


def test_the_wheel_holds_the_extension_alone(built):
    installed = built[0] / "installed"
    (extension,) = (installed / "crate_kernels").glob("_cuda*")
    assert extension.suffix == ".so"
    assert not (installed / "csrc").exists()


def test_the_extension_loads_and_refuses_without_a_gpu(built):
    """Bad arguments are ValueErrors before anything touches the device."""
    code = (
        "from crate_kernels import cuda_extension\n"
        "kernels = cuda_extension.load()\n"
        "given = dict(w=0, w_stride_batch=0, w_stride_row=0, o=0, lse=0, batch=1, n=1, heads=1)\n"
        "for head_dim, dtype in ((7, 'float16'), (64, 'float64'), (64, 'float32')):\n"
        "    try:\n"
        "        kernels.attention_forward(**given, head_dim=head_dim, dtype=dtype, scale=1.0,\n"
        "                                  causal=False, stream=0)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=built[0] / "installed", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3


def test_sizes_are_those_that_python_allocates(built):
    shapes = [(1, 8), (128, 64), (129, 72), (25216, 768), (70_000, 1032)]
    widths = range(64, 4096, 64)
    code = (
        "from crate_kernels import cuda_extension; kernels = cuda_extension.load()\n"
        f"print(*(kernels.ista_mask_bytes(*shape) for shape in {shapes}))\n"
        f"print(*(-(-d // kernels.moments_span(d)) for d in {widths}))\n"
        "print(kernels.most_normed_columns)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=built[0] / "installed", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    masks, spans, most = ([*map(int, line.split())] for line in done.stdout.splitlines())
    assert masks == [mask_bytes(*shape) for shape in shapes]
    assert spans == [moments_shape(1, d)[0] for d in widths]
    assert most == [MOST_COLUMNS]


def test_the_test_in_cpp_links_and_is_skipped_without_a_gpu(built):
    (tree,) = built[0].glob("build/temp*")
    done = subprocess.run(
        ["ctest", "--output-on-failure"], cwd=tree, env={"PATH": PATH, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "smoke_test (Skipped)" in done.stdout


def test_head_dims_are_those_of_the_kernels():
    header = (ROOT / "csrc/crate_kernels.h").read_text()
    (listed,) = re.findall(r"kHeadDims\[\] = \{([\d, ]+)\}", header)
    assert tuple(map(int, listed.split(","))) == backends.CUDA_HEAD_DIMS
