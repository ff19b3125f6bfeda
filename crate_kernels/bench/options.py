"""The command line of the benchmarks: options, and the workloads and candidates they select."""

from __future__ import annotations

import argparse
import itertools
import shlex
from dataclasses import replace
from typing import Any

import torch

from .. import backends
from .peers import CANDIDATES, OURS, Candidate, all_names, candidate, default_names
from .workloads import DTYPES, MODELS, MODES, SUITES, Workload, named_set

SIZES = ("batch", "tokens", "heads", "head_dim", "width")
ATTENTION = {"core", "mssa", "masks"}
LAYER_MODES, MODEL_MODES = MODES[:3], ("forward", "train")


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, backend_names = parser.add_argument, ("auto", *backends.BACKENDS)
    add("--suite", nargs="+", default=["all"], choices=("all", *SUITES, "cpu"),
        help="all: these but cpu; masks: core on sequences of several lengths; decode: a step of "
        "generation; latency: a batch of one; scaling: over tokens and width; alpha, family: "
        "CRATE-alpha, -MAE, -GPT, -BERT; cpu: model on the CPU")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    add("--mode", nargs="+", choices=MODES,
        help="layers: forward, backward, forward+backward; decode: forward; "
        "model: forward, train")
    for size in SIZES:
        several: dict[str, Any] = {"nargs": "+"} if size in ("batch", "tokens") else {}
        add(f"--{size.replace('_', '-')}", type=_positive, help="replaces the suite's shapes",
            **several)
    add("--model", nargs="+", choices=tuple(MODELS), help="default: crate_base; cpu: crate_tiny")
    add("--dtype", choices=tuple(DTYPES), help="default: bf16; cpu: fp32")
    add("--autocast", action="store_true",
        help="layers: float32 tensors under autocast to the dtype (models always are)")
    add("--causal", action="store_true", help="core, mssa and masks")
    add("--backend", choices=backend_names, default="auto", help="of our ops")
    add("--peers", nargs="+", choices=all_names(), metavar="PEER",
        help="instead of the suite's own; ours are added where none is named. Out of: "
        f"{', '.join(all_names())}")
    add("--versus", default="", choices=all_names(), metavar="PEER",
        help="the peer that speedups are against; default: the fastest")
    add("--quick", action="store_true", help="fewer and smaller workloads")
    add("--check-only", action="store_true", help="the check against float64, no timing")
    add("--graph", action=argparse.BooleanOptionalAction,
        help="capture in CUDA graphs; default: layers yes, models no")
    add("--rounds", type=_positive, default=100, help="at most (default: 100)")
    add("--seconds", type=float, default=2.0, help="of timing a workload, about (default: 2)")
    add("--seed", type=int, help="of the random inputs; default: another at every run")
    add("--measure-ceilings", action="store_true",
        help="measure copy and GEMM rates even where the table has them")
    add("--out", metavar="DIR", help="write SUITE.csv, .md and .png there")
    add("--commit", default="", help="recorded in the files; default: git's")
    add("--compile-backend", default="inductor", help=argparse.SUPPRESS)
# fmt: on


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer > 0, got {text}")
    return value


def command(args: argparse.Namespace) -> str:
    """The command that repeats this run: the options that differ from their defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["python", "-m", "crate_kernels", "bench"]
    for name, value in vars(args).items():
        if name in ("out", "commit") or value == parser.get_default(name):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def select(args: argparse.Namespace, device: torch.device) -> dict[str, list[Workload]]:
    """The workloads of each suite asked for, in order."""
    if args.suite == ["cpu"]:
        source = {"cpu": named_set("cpu", args.quick)["model"]}
    else:
        sets = named_set(device.type, args.quick)
        names = SUITES if "all" in args.suite else tuple(dict.fromkeys(args.suite))
        source = {name: sets[name] for name in names}
    _refuse_what_has_no_effect(args, {w.suite for found in source.values() for w in found})
    selected = {
        name: found
        for name, workloads in source.items()
        if (found := _each_once(_changed(workloads, args, device)))
    }
    if not selected:
        raise ValueError(f"bench: no workload of suite {args.suite} has mode {args.mode}")
    return selected


def _changed(
    workloads: tuple[Workload, ...], args: argparse.Namespace, device: torch.device
) -> list[Workload]:
    """The set's workloads with the options' changes, those of an op or of models each by
    themselves."""
    parts = itertools.groupby(workloads, key=lambda w: w.suite)
    return [w for _, part in parts for w in _changed_part(tuple(part), args, device)]


def _changed_part(
    workloads: tuple[Workload, ...], args: argparse.Namespace, device: torch.device
) -> list[Workload]:
    """Sizes replace the shapes by one."""
    suite = workloads[0].suite
    is_model = suite == "model"
    first_shape = [w for w in workloads if w.shape == workloads[0].shape and not w.causal]
    resized = any(getattr(args, size) for size in (("batch",) if is_model else SIZES))
    start = first_shape if resized or (is_model and args.model) else list(workloads)
    axes: dict[str, list[Any]] = {}
    if args.mode:
        allowed = MODEL_MODES if is_model else LAYER_MODES[: 1 if suite == "decode" else None]
        allowed = LAYER_MODES[::2] if suite == "encoder" else allowed
        axes["mode"] = [mode for mode in args.mode if mode in allowed]
    if is_model:
        axes |= {"model": args.model} if args.model else {}
        axes |= {"batch": args.batch} if args.batch else {}
    else:
        axes |= {size: _listed(value) for size in SIZES if (value := getattr(args, size))}
        axes |= {"causal": [True]} if args.causal and suite in ATTENTION else {}
        axes |= {"autocast": [True]} if args.autocast and suite != "decode" else {}
    axes |= {"dtype": [args.dtype]} if args.dtype else {}
    found = []
    for combination in itertools.product(*axes.values()):
        changes = dict(zip(axes, combination, strict=True))
        if is_model and "model" in changes and "batch" not in changes and device.type == "cuda":
            changes["batch"] = MODELS[changes["model"]].batch
        found += [_with(w, changes, device) for w in start]
    return found


def _refuse_what_has_no_effect(args: argparse.Namespace, suites: set[str]) -> None:
    """Options that none of the suites to be run knows."""
    layers = {*ATTENTION, "ista", "overcomplete"}
    takers = dict.fromkeys(("width", "autocast"), layers | {"encoder"})
    takers |= dict.fromkeys(("tokens", "heads", "head_dim"), layers | {"decode", "encoder"})
    takers |= {"causal": ATTENTION, "model": {"model"}}
    for name, known in takers.items():
        if getattr(args, name) and not known & suites:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"bench: expected {option} with one of the suites {sorted(known)}, "
                f"got {sorted(suites)}"
            )


def _each_once(found: list[Workload]) -> list[Workload]:
    """In order, without those that differ from another in the target only; one with comes first."""
    kept: dict[Workload, Workload] = {}
    for w in found:
        bare = replace(w, target=None, most=None)
        kept[bare] = w if bare not in kept or w.target else kept[bare]
    return list(kept.values())


def _with(w: Workload, changes: dict[str, Any], device: torch.device) -> Workload:
    """A target stays only with the workload, and the device, that it was set for."""
    changed = replace(w, **changes)
    known = device.type == "cpu" or torch.cuda.get_device_name(device) == "NVIDIA H200"
    return changed if changed == w and known else replace(changed, target=None, most=None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def candidates_for(w: Workload, device_type: str, args: argparse.Namespace) -> list[Candidate]:
    """The suite's peers, or those asked for, and ours."""
    names = list(default_names(w, device_type))
    if args.quick and w.suite == "model":
        names = list(CANDIDATES["cpu"]["model"])
    if args.peers:
        ours = [n for n in names if n.startswith(OURS)]
        names = args.peers if any(n.startswith(OURS) for n in args.peers) else args.peers + ours
    if args.versus and args.versus not in names:
        names.insert(0, args.versus)
    return [candidate(name, args.backend, args.compile_backend) for name in dict.fromkeys(names)]
