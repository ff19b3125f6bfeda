"""``python -m crate_kernels bench``: ops, layers and models against what one has without them.

Reading order: workloads.py (what), roofline.py (how fast it could be), peers.py (against what),
cases.py (the tensors), check.py (the gate), timing.py, run.py (one workload), report.py (output).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import backends, env_report
from . import report
from .options import add_arguments, candidates_for, command, select
from .peers import Candidate
from .report import Machine
from .roofline import Ceilings, ceilings_for
from .run import FAILED, UNAVAILABLE, Result, Settings, run_workload
from .workloads import Workload

__all__ = ["add_arguments", "main"]


def main(args: argparse.Namespace) -> int:
    """0; 1 if one of our candidates failed the check or did not run; 2 for impossible options."""
    try:
        device = _device(args)
        suites = select(args, device)
        plan = {
            name: [(w, candidates_for(w, device.type, args)) for w in workloads]
            for name, workloads in suites.items()
        }
        if args.out is not None:
            report.prepare(Path(args.out))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.seed is None:  # so that the command printed repeats a failure
        args.seed = int.from_bytes(os.urandom(4), "little")
    machine = _machine(args, device)
    print(f"{machine}\n{machine.command}", flush=True)
    failed = False
    with _backend_of_models(args.backend), _progress(plan) as progress:
        for name, pairs in plan.items():
            results = _run_suite(name, pairs, args, device, progress)
            failed |= any(r.ours and r.status == FAILED for r in results)
            if args.out is not None:
                ceilings = _ceilings(device, pairs[0][0].torch_dtype, args.measure_ceilings)
                stem = name if device.type == "cuda" or name == "cpu" else f"{name}-cpu"
                paths = report.write(Path(args.out), stem, results, machine, ceilings)
                progress.show("wrote " + " ".join(str(path) for path in paths))
    return 1 if failed else 0


def _run_suite(
    name: str,
    pairs: list[tuple[Workload, list[Candidate]]],
    args: argparse.Namespace,
    device: torch.device,
    progress: _Progress,
) -> list[Result]:
    progress.show("", report.header())
    results = []
    for w, candidates in pairs:
        settings = Settings(
            device,
            rounds=args.rounds,
            seconds=args.seconds,
            graph=args.graph,
            check_only=args.check_only,
            seed=args.seed,
            versus=args.versus,
            progress=lambda what, label=w.label: progress.describe(  # type: ignore[misc]
                f"{name} {label}: {what}"
            ),
        )
        ceilings = None
        if not args.check_only:
            ceilings = _ceilings(device, w.torch_dtype, args.measure_ceilings)
        try:
            found = run_workload(w, candidates, settings, ceilings)
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            found = [
                Result(w, c.name, c.ours, FAILED if c.ours else UNAVAILABLE, reason)
                for c in candidates
            ]
            torch.cuda.empty_cache()
        progress.show(*report.lines(found, bold=sys.stdout.isatty()))
        progress.advance()
        results += found
    return results


@functools.cache
def _ceilings(device: torch.device, dtype: torch.dtype, measure: bool) -> Ceilings:
    return ceilings_for(device, dtype, measure)


def _device(args: argparse.Namespace) -> torch.device:
    if "cpu" in args.suite and (args.device == "cuda" or len(args.suite) > 1):
        raise ValueError("bench: expected suite cpu by itself and on the CPU")
    if args.device == "cpu" or "cpu" in args.suite or not torch.cuda.is_available():
        if args.device == "cuda":
            raise ValueError("bench: expected a CUDA device for --device cuda, got none")
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _machine(args: argparse.Namespace, device: torch.device) -> Machine:
    versions = env_report.versions()
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else env_report.cpu_name()
    software = f"torch {versions['torch']}, Triton {versions['triton']}"
    if cuda:
        software += f", CUDA {versions['cuda']}, cuDNN {versions['cudnn']}"
        software += f", driver {versions['driver']}"
    return Machine(
        device=name if cuda else f"{name}, {torch.get_num_threads()} threads",
        software=software,
        torch=versions["torch"],
        triton=versions["triton"],
        cuda=versions["cuda"] if cuda else "",
        commit=args.commit or versions["commit"],
        date=datetime.date.today().isoformat(),
        command=command(args),
    )


@contextlib.contextmanager
def _backend_of_models(backend: str) -> Iterator[None]:
    """Fused modules take "auto"; the environment says what that is."""
    if backend == "auto":
        yield
        return
    before = os.environ.get(backends.BACKEND_VARIABLE)
    os.environ[backends.BACKEND_VARIABLE] = backend
    try:
        yield
    finally:
        del os.environ[backends.BACKEND_VARIABLE]
        if before is not None:
            os.environ[backends.BACKEND_VARIABLE] = before


class _Progress:
    """A bar on the terminal's stderr if tqdm is there; lines go above it to stdout."""

    def __init__(self, total: int) -> None:
        try:
            from tqdm import tqdm

            self.bar = tqdm(total=total, file=sys.stderr, disable=None, leave=False)
        except ImportError:
            self.bar = None

    def show(self, *lines: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        print("\n".join(lines), flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def describe(self, what: str) -> None:
        if self.bar is not None:
            self.bar.set_description(what)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()


@contextlib.contextmanager
def _progress(plan: dict[str, list[tuple[Workload, list[Candidate]]]]) -> Iterator[_Progress]:
    progress = _Progress(sum(len(pairs) for pairs in plan.values()))
    try:
        yield progress
    finally:
        if progress.bar is not None:
            progress.bar.close()
