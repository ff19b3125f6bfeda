"""What this machine has: versions, devices, which backends work there and why others do not.

    python -m crate_kernels.env_report [--json]

Runs anywhere; what cannot be found out is said to be so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, tied_attention

UNKNOWN = "unknown"
# Triton releases between these can mis-compile a transposed accumulator, or have fixes missing.
HAZARD_FIRST, HAZARD_LAST, HAZARD_PTXAS = (3, 4, 0), (3, 7, 1), (13, 3)
VARIABLES = {
    backends.BACKEND_VARIABLE: "replaces backend='auto'",
    "TRITON_INTERPRET": "1 runs Triton kernels on the CPU, slowly",
    "TRITON_PTXAS_PATH": "the assembler Triton uses instead of its own",
    "CUDA_VISIBLE_DEVICES": "which GPUs torch sees",
}


def report() -> dict[str, Any]:
    return {
        "versions": versions(),
        "devices": devices(),
        "backends": working_backends(),
        "hazards": hazards(),
        "variables": {name: os.environ.get(name, "") for name in VARIABLES},
    }


def versions() -> dict[str, str]:
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "crate_kernels": __version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda or "none (a CPU build of torch)",
        "cudnn": str(cudnn or "none"),
        "driver": driver_version(),
        "ptxas": " ".join(ptxas()),
    }


def git_commit() -> str:
    """The short commit of this source tree, with -dirty where files differ from it."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return UNKNOWN
    commit = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    if not commit:
        return UNKNOWN
    status = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if status else commit


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def driver_version() -> str:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else "none found"


def ptxas() -> tuple[str, str]:
    """Version and path of the assembler that Triton uses."""
    path = os.environ.get("TRITON_PTXAS_PATH", "")
    if not path:
        try:
            files = importlib.metadata.files("triton") or []
        except importlib.metadata.PackageNotFoundError:
            return UNKNOWN, "(Triton is not installed)"
        path = next((str(f.locate()) for f in files if f.name == "ptxas"), "")
    found = re.search(r"release (\d+\.\d+)", _output(path, "--version") if path else "")
    return (found[1] if found else UNKNOWN), (f"({path})" if path else "(not found)")


def devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": cpu_name(), "threads": torch.get_num_threads()}
    ]
    try:
        count = torch.cuda.device_count()
        for i in range(count):
            p = torch.cuda.get_device_properties(i)
            found.append(
                {
                    "device": f"cuda:{i}",
                    "name": p.name,
                    "capability": f"{p.major}.{p.minor}",
                    "memory_gib": round(p.total_memory / 2**30, 1),
                    "multiprocessors": p.multi_processor_count,
                }
            )
    except Exception as error:  # a broken driver is something to report, not to fail on
        found.append({"device": "cuda", "name": f"unusable: {_first(error)}"})
    return found


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or UNKNOWN


def working_backends() -> dict[str, dict[str, str]]:
    """Per device, each backend: "works" (it ran a tiny op), or the reasons against it."""
    found = {}
    for device in devices():
        name = device["device"]
        try:
            w = torch.ones(1, 1, 64, dtype=torch.bfloat16, device=name)
            reasons = backends.explain("tied_attention", w, w.dtype, 64).reasons
            found[name] = {b: "; ".join(why) or _tried(b, w) for b, why in reasons.items()}
        except Exception as error:  # as in devices()
            found[name] = dict.fromkeys(backends.BACKENDS, f"device unusable: {_first(error)}")
    return found


def _tried(backend: str, w: torch.Tensor) -> str:
    try:
        tied_attention(w, heads=1, backend=backend).sum().item()
    except Exception as error:  # no compiler for Triton's launcher, say
        return f"fails: {_first(error)}"
    return "works"


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def hazards() -> list[str]:
    """Known compiler faults of the versions found; docs/hazards.md says how they are kept out."""
    notes = []
    triton, assembler = _numbers(triton_version()), _numbers(ptxas()[0])
    if triton and HAZARD_FIRST <= triton[:3] < HAZARD_LAST:
        notes.append(
            f"Triton {triton_version()}: can mis-compile a transposed accumulator on sm_90 "
            "(3.4.0 to 3.7.0); these kernels transpose loaded operands only"
        )
    if triton and triton[:3] == HAZARD_LAST:
        notes.append("Triton 3.7.1: has an illegal-access fault of its own")
    if assembler and assembler < HAZARD_PTXAS:
        notes.append(
            f"ptxas {ptxas()[0]}: before 13.3 it may reuse registers of a running wgmma; "
            "TRITON_PTXAS_PATH selects another"
        )
    return notes


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def _output(*command: str) -> str:
    """What it prints, or "" if it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def text(found: dict[str, Any]) -> str:
    lines = [f"{name:<15}{value}" for name, value in found["versions"].items()]
    for device in found["devices"]:
        rest = ", ".join(f"{k} {v}" for k, v in device.items() if k not in ("device", "name"))
        lines.append(f"{device['device']:<15}{device['name']}, {rest}".rstrip(", "))
        for backend, verdict in found["backends"].get(device["device"], {}).items():
            lines.append(f"  {backend:<13}{verdict}")
    lines += [f"{'hazard':<15}{note}" for note in found["hazards"]]
    for name, value in found["variables"].items():
        lines.append(f"{name}={value}" if value else f"{name} not set ({VARIABLES[name]})")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    found = report()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m crate_kernels.env_report")
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
