"""One workload from gate to figures: check every candidate, then time those that pass, together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch._functorch import config as functorch_config

from .cases import Case, make_case
from .check import Outputs, Parity, compare
from .model_cases import ModelCase
from .peers import NARROW, YARDSTICK, Candidate, Unavailable, candidate
from .roofline import Ceilings, floor_us
from .timing import Run, first_line, interleave, peak_gib, prepare
from .workloads import Workload

OK, FAILED, UNAVAILABLE = "ok", "FAILED", "unavailable"
STEPS_A_SAMPLE = 5  # of a model by events: the host runs ahead within a sample, as in training
MODEL_DRAWS = 4


@dataclass(frozen=True)
class Settings:
    device: torch.device
    rounds: int = 100
    seconds: float = 2.0
    graph: bool | None = None  # None: layers captured in CUDA graphs, models not
    check_only: bool = False
    seed: int = 0
    versus: str = ""  # overrides the workload's
    progress: Callable[[str], None] = lambda message: None


@dataclass
class Result:
    """One candidate on one workload; ``None`` where there is no figure."""

    workload: Workload
    candidate: str
    ours: bool
    status: str = OK
    note: str = ""
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    rounds: int = 0
    method: str = ""
    peak_gib: float | None = None
    floor_us: float | None = None
    versus: str = ""
    speedup: float | None = None
    over_gemms: float | None = None  # its time over that of the yardstick
    output_error: tuple[float, float] | None = None  # times eager's: largest, RMS
    gradient_error: tuple[float, float] | None = None

    @property
    def over_floor(self) -> float | None:
        return self.median_us / self.floor_us if self.median_us and self.floor_us else None

    @property
    def images_per_second(self) -> float | None:
        if self.workload.suite != "model" or not self.median_us:
            return None
        return 1e6 * self.workload.batch / self.median_us


def run_workload(
    w: Workload, candidates: Sequence[Candidate], settings: Settings, ceilings: Ceilings | None
) -> list[Result]:
    """Results in the order of ``candidates``. Peers that cannot run are listed with the reason."""
    torch.compiler.reset()
    results = {c.name: Result(w, c.name, c.ours) for c in candidates}
    # Graphs are captured on a side stream; so everything runs there. A backward that is timed
    # alone runs many times on one forward: its buffers must stay.
    with _side_stream(settings.device), functorch_config.patch(donated_buffer=False):
        case = make_case(w, settings.device, settings.seed)
        _gate(candidates, case, results, settings)
        if not settings.check_only:
            _time([c for c in candidates if results[c.name].status == OK], case, results, settings)
        del case
    for result in results.values():
        if ceilings is not None and result.median_us:
            result.floor_us = floor_us(w, ceilings)
    _compare_speeds(list(results.values()), settings.versus or w.versus)
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return list(results.values())


def _side_stream(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type != "cuda":
        return contextlib.nullcontext()
    torch.cuda.synchronize(device)
    return torch.cuda.stream(torch.cuda.Stream(device))


# ---- the gate


def _gate(
    candidates: Sequence[Candidate], case: Case, results: dict[str, Result], settings: Settings
) -> None:
    """A model whose gradients fail is drawn fresh images, up to MODEL_DRAWS times in all: in
    float32 one ReLU that rounds to the other side, right either way, outweighs all rounding."""
    waiting = list(candidates)
    for _draw in range(1, MODEL_DRAWS + 1):
        settings.progress("float64 reference")
        case, reference, eager = _what_is_right(case, settings)
        for c in waiting:
            settings.progress(f"{c.name}: check")
            try:
                outputs = case.outputs(c)
                if c.name != YARDSTICK:
                    _take(results[c.name], compare(outputs, eager, reference))
            except Exception as error:  # a peer that cannot run is shown as such, with its reason
                _fails(results[c.name], error)
        waiting = [c for c in waiting if _by_gradients_alone(results[c.name])]
        if not waiting or not isinstance(case, ModelCase):
            break
        case.draw()


def _what_is_right(case: Case, settings: Settings) -> tuple[Case, Outputs, Outputs]:
    """The float64 results and those that set the measure (the published form's, in the dtypes of
    ours), of a smaller batch where these do not fit in memory."""
    measure = candidate(NARROW if isinstance(case, ModelCase) else "eager")
    while True:
        try:
            reference = case.reference()
            return case, reference, case.outputs(measure)
        except torch.cuda.OutOfMemoryError:
            if case.w.batch == 1:
                raise
        torch.cuda.empty_cache()
        smaller = replace(case.w, batch=case.w.batch // 2)
        case = make_case(smaller, settings.device, settings.seed)


def _by_gradients_alone(result: Result) -> bool:
    return result.status == FAILED and result.note.startswith("gradients:")


def _take(result: Result, parity: Parity) -> None:
    result.output_error, result.gradient_error = parity.worst(True), parity.worst(False)
    result.status, result.note = (OK, "") if parity.passed else (FAILED, str(parity))


def _fails(result: Result, error: Exception) -> None:
    result.status = FAILED if result.ours else UNAVAILABLE
    result.note = str(error) if isinstance(error, Unavailable) else first_line(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()


# ---- timing


def _time(
    candidates: Sequence[Candidate], case: Case, results: dict[str, Result], settings: Settings
) -> None:
    device = settings.device
    layer = case.w.suite != "model"
    graph = layer or case.w.captured if settings.graph is None else settings.graph
    inner = 0 if layer or device.type != "cuda" else 1 if graph else STEPS_A_SAMPLE
    inner = 0 if case.w.captured else inner  # such a step is short
    runs: dict[str, Run] = {}
    for c in candidates:
        settings.progress(f"{c.name}: warm-up")
        try:
            resident = case.resident(c)
            results[c.name].peak_gib = peak_gib(
                functools.partial(case.step, c, 0), device, resident
            )
            steps = [case.step(c, i) for i in range(case.sets)]
            runs[c.name] = prepare(steps, device, graph, inner)
        except Exception as error:  # as in the gate
            _fails(results[c.name], error)
    settings.progress("timing")
    timings = interleave(runs, device, settings.rounds, settings.seconds)
    for name, timing in timings.items():
        result = results[name]
        result.median_us, result.p10_us = timing.median_us, timing.p10_us
        result.p90_us, result.rounds = timing.p90_us, timing.rounds
        result.method, result.note = timing.method, timing.note


def _compare_speeds(results: list[Result], versus: str) -> None:
    """Every timed row against ``versus``, or the fastest peer, and the bare GEMMs; ratios of
    medians."""
    timed = [r for r in results if r.median_us]
    peers = [r for r in timed if not r.ours and r.candidate != YARDSTICK]
    if versus:
        peers = [r for r in timed if r.candidate == versus and not r.ours]
    best = min(peers, key=lambda r: r.median_us or 0.0, default=None)
    for result in results:
        if best and best.median_us and result.median_us:
            result.versus, result.speedup = best.candidate, best.median_us / result.median_us
    gemms = next((r.median_us for r in timed if r.candidate == YARDSTICK), None)
    for result in timed:
        if gemms and result.median_us:
            result.over_gemms = result.median_us / gemms
