"""The benchmarks on the CPU: the gate, the figures and the files."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_equal_results
from torch import Tensor, nn

from crate_kernels import backends, bench, models
from crate_kernels.__main__ import main
from crate_kernels.bench import cases, model_cases, peers, report, roofline, run, timing, workloads
from crate_kernels.bench.check import compare
from crate_kernels.bench.peers import Candidate, candidate
from crate_kernels.bench.report import Machine
from crate_kernels.bench.run import FAILED, OK, UNAVAILABLE, Result, Settings, run_workload
from crate_kernels.bench.workloads import Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BOTH = ["--mode", "forward+backward"]
SMALL = ["--batch", "2", "--tokens", "20", "--heads", "2", "--head-dim", "16", "--width", "48"]
MACHINE = Machine("a CPU", "torch 0", "0", "1", "", "c0ffee", "2000-01-01", "python -m it")
EAGER, OURS = candidate("eager"), candidate("crate_kernels")


def run_bench(*argv: str) -> int:
    quickly = ["--device", "cpu", "--quick", "--rounds", "2", "--seconds", "0", "--seed", "0"]
    return main(["bench", *quickly, *argv])


def layer(suite: str, mode: str = "forward", dtype: str = "fp32", **kw: Any) -> Workload:
    return Workload(suite, mode, 2, 20, 2, 16, 48, dtype=dtype, **kw)


def quick(**kw: object) -> Settings:
    return Settings(CPU, rounds=2, seconds=0.0, **kw)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make these small tensors 10x slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is a small one, of real images and classes."""

    def build(w: Workload, device: torch.device) -> nn.Module:
        sizes = {"image_size": 224, "patch_size": 56, "dim": 32, "depth": 2, "heads": 2}
        if w.model == "crate_mae_base":
            decoder = {"decoder_depth": 1, "decoder_heads": 2}
            return models.MaskedAutoencoder(**sizes, **decoder).to(device)
        if w.model == "crate_gpt":
            small = {"context": 12, "dim": 32, "depth": 2, "heads": 2}
            return models.crate_gpt(50, **small).to(device)
        if w.model == "crate_bert":
            small = {"positions": 14, "dim": 32, "depth": 2, "heads": 2, "dropout": 0.0}
            return models.crate_bert(50, **small).to(device)
        return models.CRATE(num_classes=workloads.CLASSES, **sizes).to(device)

    monkeypatch.setattr(model_cases, "build_unfused", build)


# ---- cases: every peer computes the same


@pytest.mark.parametrize(
    "w",
    [
        *(layer("core", mode, "fp64") for mode in ("forward", "backward")),
        layer("core", "backward", "fp64", causal=True),
        layer("mssa", "forward+backward", "fp64"),
        layer("mssa", "forward", "fp64", causal=True),
        layer("ista", "forward+backward", "fp64"),
        layer("overcomplete", "forward+backward", "fp64"),
        layer("decode", "forward", "fp64"),
        *(layer("encoder", mode, "fp64") for mode in ("forward", "forward+backward")),
        *(
            layer("masks", "backward", "fp64", sequences=how, causal=causal)
            for how in ("padded", "packed")
            for causal in (False, True)
        ),
        *(workloads.model("crate_tiny", mode, 17, dtype="fp32") for mode in ("forward", "train")),
        workloads.model("crate_base_patch8", "forward", 2, dtype="fp32"),
        workloads.model("crate_mae_base", "train", 17, dtype="fp32"),
        workloads.model("crate_gpt", "train", 17, dtype="fp32"),
        workloads.model("crate_bert", "train", 17, dtype="fp32"),
    ],
    ids=lambda w: f"{w.suite} {w.label}",
)
def test_every_peer_computes_the_reference(
    w: Workload, small_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where a formula that differs shows; the reference an item at a time."""
    monkeypatch.setitem(workloads.DTYPES, "fp64", torch.float64)
    monkeypatch.setattr(cases, "MAX_SCORES", 1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        case = cases.make_case(w, CPU, seed=0)
        want = case.reference()
        assert (len(want) > 1) == (w.mode != "forward")
        for name in peers.all_names():
            try:
                got = case.outputs(candidate(name, compile_backend="eager"))
            except peers.Unavailable:
                without_attention = w.suite in ("ista", "overcomplete")
                looped = peers.LOOPED in name and w.sequences == "packed"
                unfit = "sdpa" in name and (without_attention or name != "sdpa") and not looped
                whole = (peers.LOW, peers.PREPARED, peers.NARROW)
                of_models = name.removesuffix("+compile") in whole
                assert unfit or of_models or name == peers.YARDSTICK
            else:
                assert_equal_results(got, want, name)
    finally:
        torch.set_default_dtype(before)


# ---- the gate

E = 2.0**-10  # eager's error, and what is compared is exact in float32 too


def parity(name: str, ours: list[float], eager: list[float] | None = None) -> bool:
    """Whether errors of ``ours`` on one quantity pass where eager's are E, or ``eager``."""
    exact = torch.ones(4, dtype=torch.float64)
    error = torch.tensor([E] * 4 if eager is None else eager)
    return compare({name: 1 + torch.tensor(ours)}, {name: 1 + error}, {name: exact}).passed


@pytest.mark.parametrize(("name", "factor"), [("output", 2), ("dx", 3), ("gradients", 3)])
def test_the_gate_opens_up_to_a_multiple_of_eagers_error(name: str, factor: int) -> None:
    limit = factor * E
    assert parity(name, [limit, -limit, limit, 0.0])
    assert not parity(name, [0.0, 0.0, 0.0, limit + E / 64])
    assert not parity(name, [-limit - E / 64, 0.0, 0.0, 0.0])
    assert not parity(name, [0.0, float("nan"), 0.0, 0.0])
    assert not parity(name, [0.0, float("inf"), 0.0, 0.0])


def test_the_gate_holds_the_rms_error_too() -> None:
    assert parity("output", [E, E, E, E], eager=[E, 0.0, 0.0, 0.0])  # RMS twice eager's
    assert not parity("output", [E, E, E, 1.5 * E], eager=[E, 0.0, 0.0, 0.0])


def test_where_eager_is_exact_so_is_what_passes() -> None:
    assert parity("output", [0.0] * 4, eager=[0.0] * 4)
    assert not parity("output", [0.0, 0.0, 0.0, 2.0**-23], eager=[0.0] * 4)


def test_the_gate_is_shut_where_eager_is_nan() -> None:
    assert not parity("output", [0.0] * 4, eager=[float("nan")] * 4)


def test_the_gate_is_shut_where_eager_overflows() -> None:
    assert not parity("output", [5.0] * 4, eager=[float("inf")] * 4)


def test_the_gate_refuses_another_shape() -> None:
    x = {"output": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"output of shape \(2, 3\), got \(3, 2\)"):
        compare({"output": torch.zeros(3, 2)}, x, {"output": torch.zeros(2, 3).double()})


def fail(y: Tensor) -> Tensor:
    raise RuntimeError("no such kernel\nand more")


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "output": (lambda y: 1.001 * y, "output: max"),
    "gradient": (lambda y: y + 0.001 * (y - y.detach()), "max"),
    "nan": (lambda y: torch.where(torch.arange(y.shape[-1]) == 0, torch.nan, y), "output: max nan"),
    "shape": (lambda y: y[:1], "Error: "),
    "error": (fail, "RuntimeError: no such kernel"),
}


def spoiled(c: Candidate, spoil: Callable[[Tensor], Tensor]) -> Candidate:
    def build_layer(w: Workload) -> Callable[..., Tensor]:
        function = c.build_layer(w)
        return lambda *tensors: spoil(function(*tensors))

    def build_model(w: Workload, model: nn.Module) -> nn.Module:
        built = c.build_model(w, model)
        built.register_forward_hook(lambda module, inputs, y: spoil(y))
        return built

    return replace(c, build_layer=build_layer, build_model=build_model)


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("suite", ["core", "mssa", "ista", "model", "alpha"])
def test_what_is_wrong_fails_and_gets_no_figure(
    suite: str,
    how: str,
    small_model: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    spoil, message = WRONG[how]
    monkeypatch.setattr(bench, "candidates_for", lambda *a: [EAGER, spoiled(OURS, spoil)])
    sizes = ["--batch", "2", "--mode", "train"] if suite == "model" else [*SMALL, *BOTH]
    assert run_bench("--suite", suite, *sizes, "--out", str(tmp_path)) == 1
    eager, ours = read_csv(tmp_path / f"{suite}-cpu.csv")
    assert eager["status"] == OK and float(eager["median_us"]) > 0
    assert ours["status"] == FAILED and message in ours["note"]
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("  crate_kernels"))
    assert line.split(maxsplit=1)[1] == f"FAILED: {ours['note']}"
    figures = ("median_us", "p10_us", "p90_us", "images_per_s", "over_floor", "speedup", "versus")
    assert {ours[figure] for figure in figures} == {""}
    row = (tmp_path / f"{suite}-cpu.md").read_text().splitlines()[-1]
    assert "| FAILED: " in row and "**" not in row


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_scaling_has_a_picture_of_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "ENCODER_DEPTH", 1)
    lines = []
    axes = pytest.importorskip("matplotlib.axes").Axes
    plot = axes.plot

    def note(self: object, x: object, *rest: object, **options: object) -> object:
        lines.append((options["label"], x))
        return plot(self, x, *rest, **options)

    monkeypatch.setattr(axes, "plot", note)
    assert run_bench("--suite", "scaling", "--out", str(tmp_path)) == 0
    rows = read_csv(tmp_path / "scaling-cpu.csv")
    assert {(r["tokens"], r["width"], r["heads"]) for r in rows} == {
        ("20", "64", "1"),
        ("50", "64", "1"),
    }
    # Over the tokens; the width does not vary, and memory is not measured on a CPU.
    assert lines == [(name, (20, 50)) for name in ("eager", "sdpa", "crate_kernels")]
    assert (tmp_path / "scaling-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("draws", "status"), [(3, OK), (4, FAILED)])
def test_a_model_is_drawn_other_images_where_gradients_fail(
    draws: int, status: str, small_model: None
) -> None:
    """One value on the other side of a ReLU is no fault; one at every draw is."""
    passed = []

    def wrong_at_first(y: Tensor) -> Tensor:
        passed.append(y)
        return WRONG["gradient"][0](y) if len(passed) <= draws else y

    w = workloads.model("crate_tiny", "train", 2, dtype="fp32")
    (result,) = run_workload(w, [spoiled(OURS, wrong_at_first)], quick(check_only=True), None)
    assert result.status == status and len(passed) == run.MODEL_DRAWS


def test_ours_that_does_not_fit_in_memory_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object) -> list[Result]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "run_workload", no_memory)
    assert run_bench("--suite", "core", *SMALL) == 1


def test_peers_that_cannot_run_say_why_and_fail_nothing(tmp_path: Path) -> None:
    argv = ["--suite", "core", "ista", *SMALL, *BOTH, "--peers", "sdpa-flash", "sdpa-cudnn+compile"]
    assert run_bench(*argv, "--compile-backend", "eager", "--out", str(tmp_path)) == 0
    for suite, reasons in {
        "core": ["sdpa-flash runs on CUDA devices", "sdpa-cudnn runs on CUDA devices", ""],
        "ista": ["ISTA has no attention", "ISTA has no attention", ""],
    }.items():
        rows = read_csv(tmp_path / f"{suite}-cpu.csv")
        assert [row["note"] for row in rows] == reasons
        assert [row["status"] for row in rows] == [UNAVAILABLE, UNAVAILABLE, OK]
        assert {row["speedup"] for row in rows} == {""}


def test_a_backend_asked_for_runs_or_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_model: None
) -> None:
    monkeypatch.setattr(backends, "_against_triton_on", lambda *device: ("not today",))
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "auto")
    argv = ["--suite", "ista", "model", "--batch", "2", "--check-only", "--backend"]
    assert run_bench(*argv, "reference") == 0
    assert run_bench(*argv, "triton") == 1
    assert capsys.readouterr().out.count("not today") == 2
    assert os.environ[backends.BACKEND_VARIABLE] == "auto"


# ---- timing


class Clock:
    """Seconds pass only where a run takes them."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, ""

    def perf_counter(self) -> float:
        return self.now

    def run(self, name: str, *seconds: float, inner: int = 1) -> timing.Run:
        """Takes each of ``seconds`` once, then the last for ever."""
        left = list(seconds)

        def call() -> None:
            self.log += name
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return timing.Run(call, inner, "host", f"note of {name}")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_candidates_alternate_and_the_first_round_is_discarded(clock: Clock) -> None:
    runs = {"a": clock.run("a", 99, 1, 2, 3), "b": clock.run("b", 99, 8, inner=4)}
    timings = timing.interleave(runs, CPU, rounds=3, seconds=1e9)
    assert clock.log == "ab" * 4
    assert timings["a"] == timing.Timing(2e6, 1.2e6, 2.8e6, 3, "host", "note of a")
    assert timings["b"] == timing.Timing(2e6, 2e6, 2e6, 3, "host", "note of b")


@pytest.mark.parametrize(
    ("rounds", "seconds", "made"), [(100, 0, 5), (100, 9, 9), (2, 0, 2), (1, 0, 1), (7, 1e9, 7)]
)
def test_rounds_end_with_the_time_but_a_few_are_made(
    rounds: int, seconds: float, made: int, clock: Clock
) -> None:
    assert timing.interleave({"a": clock.run("a", 1)}, CPU, rounds, seconds)["a"].rounds == made


def test_percentiles_interpolate() -> None:
    values = [40.0, 10.0, 30.0, 20.0]
    found = [timing.percentile(values, q) for q in (0, 10, 50, 90, 100)]
    assert found == [10, 13, 25, 37, 40]
    assert timing.percentile([7.0], 90) == 7


def test_samples_go_on_through_the_input_sets() -> None:
    seen: list[int] = []
    made = timing.prepare([lambda i=i: seen.append(i) for i in range(3)], CPU, True, inner=2)
    assert (made.inner, made.method, seen) == (2, "host", [0, 1, 2])  # warmed up
    made.call()
    made.call()
    assert seen[3:] == [0, 1, 2, 0]


def test_there_is_no_peak_memory_on_the_cpu() -> None:
    assert timing.peak_gib(lambda: pytest.fail("ran"), CPU, resident=1) is None


@pytest.mark.parametrize("versus", ["", "eager", "sdpa-flash"])
def test_speedups_are_over_the_peer_named_or_the_fastest(versus: str) -> None:
    settings = quick(versus=versus)
    results = run_workload(layer("core"), [EAGER, candidate("sdpa"), OURS], settings, None)
    medians = {r.candidate: r.median_us for r in results}
    peer = versus or min(("eager", "sdpa"), key=lambda name: medians[name])
    for r in results:
        expected = (peer, medians[peer] / r.median_us) if peer in medians else ("", None)
        assert (r.versus, r.speedup) == expected


@pytest.mark.parametrize("versus", ["", "cublas"])
def test_the_bare_gemms_are_no_peer_and_not_checked(versus: str, tmp_path: Path) -> None:
    yardstick = replace(candidate("cublas"), build_layer=lambda w: torch.matmul)
    w = replace(layer("ista", "forward+backward"), most=1.2)
    found = run_workload(w, [EAGER, yardstick, OURS], quick(versus=versus), None)
    _, gemms, ours = found
    assert gemms.status == OK and gemms.output_error is None and gemms.gradient_error is None
    assert ours.versus == (versus or "eager")
    assert (gemms.over_gemms, ours.over_gemms) == (1, ours.median_us / gemms.median_us)
    report.write(tmp_path, "x", found, MACHINE, None)
    rows = read_csv(tmp_path / "x.csv")
    assert [row["most"] for row in rows] == ["", "", "1.2"]
    assert float(rows[2]["over_gemms"]) == pytest.approx(ours.over_gemms, rel=1e-3)
    text = f"; {ours.over_gemms:.2f}x the time of cublas (at most 1.2x) |"
    table = (tmp_path / "x.md").read_text().splitlines()[-3:]
    assert [text in line for line in table] == [False, False, True]
    assert text[2:-2] in list(report.lines(found, bold=False))[-1]


@pytest.mark.parametrize(
    ("w", "reason"),
    [
        (layer("ista"), "cublas runs on CUDA devices"),
        (layer("mssa"), "a yardstick for ISTA alone"),
        (workloads.model("crate_tiny", "forward", 2, dtype="fp32"), "a yardstick for ISTA alone"),
    ],
    ids=lambda value: getattr(value, "suite", ""),
)
def test_the_bare_gemms_stand_beside_ista_on_a_gpu(
    w: Workload, reason: str, small_model: None
) -> None:
    (result,) = run_workload(w, [candidate("cublas")], quick(check_only=True), None)
    assert (result.status, result.note) == (UNAVAILABLE, reason)


# ---- files


def some_results() -> list[Result]:
    w = replace(workloads.model("crate_tiny", "train", 8), target=1.5)
    timed = {"floor_us": 250.0, "rounds": 9, "method": "graph", "versus": "eager"}
    errors = {"output_error": (1.0, 1.0), "gradient_error": (1.25, 1.0)}
    return [
        Result(w, "eager", False, OK, "", 2000.0, 1900.0, 2100.5, speedup=1.0, **timed, **errors),
        Result(w, "sdpa", False, UNAVAILABLE, "a | b"),
        Result(w, "crate_kernels", True, OK, "", 1e3, 9e2, 123456.75, speedup=2.0, **timed),
    ]


def test_files_hold_the_figures(tmp_path: Path) -> None:
    ceilings = roofline.Ceilings(4e12, 8e14, 3e12)
    paths = report.write(tmp_path / "new" / "folder", "x", some_results(), MACHINE, ceilings)
    assert [p.name for p in paths] == ["x.csv", "x.md", "x.png"]
    eager, sdpa, ours = read_csv(paths[0])
    assert (ours["workload"], ours["images_per_s"]) == ("crate_tiny 8 bf16 train", "8000")
    assert (ours["median_us"], ours["over_floor"], ours["speedup"]) == ("1000", "4", "2")
    assert (ours["target"], ours["commit"], ours["timed_by"]) == ("1.5", "c0ffee", "graph")
    assert (eager["p90_us"], eager["gradient_max_error_x_eager"]) == ("2100.5", "1.25")
    assert (sdpa["status"], sdpa["note"], sdpa["median_us"]) == (UNAVAILABLE, "a | b", "")
    text = paths[1].read_text()
    assert "a CPU; torch 0; commit c0ffee" in text and "    python -m it\n" in text
    assert "Floor (table ceilings): 4 TB/s, 800 TFLOP/s, 3e12 exponentials/s." in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5 and {line.count("|") for line in table} == {10}
    assert "| eager | 2000.0 | 1900.0-2100.5 | 4000 |  | 8.00 |  | output 1.00/1.00" in table[2]
    assert "unavailable: a / b" in table[3] and "**2.00x** eager (target 1.5x)" in table[4]
    image = paths[2].read_bytes()
    assert image.startswith(b"\x89PNG") and image.endswith(b"IEND\xaeB`\x82")


def test_figures_are_rounded(tmp_path: Path) -> None:
    assert report.row(some_results()[2], MACHINE)["p90_us"] in ("123457", "1.2346e+05")


@pytest.mark.parametrize("what", ["to_png", "os.fdopen", "os.chmod", "os.replace"])
def test_nothing_half_written_is_left_where_writing_fails(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: object) -> None:
        raise OSError("disk full")

    (tmp_path / "x.csv").write_text("as before")
    monkeypatch.setattr(f"crate_kernels.bench.report.{what}", full)
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path, "x", some_results(), MACHINE, None)
    monkeypatch.undo()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"x.csv": "as before"}


# ---- from end to end


def test_runs_from_end_to_end(
    small_model: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        run_bench("--suite", "core", "mssa", "ista", "decode", *SMALL, "--out", str(tmp_path)) == 0
    )
    assert run_bench("--suite", "cpu", "--batch", "2", "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    names = ("core-cpu", "mssa-cpu", "ista-cpu", "decode-cpu", "cpu")
    assert "python -m crate_kernels bench --suite core mssa ista decode --device cpu" in printed
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("csv", "md", "png")
    }
    counts = (6, 3, 2, 3, 3)
    for name, count in zip(names, counts, strict=True):
        rows = read_csv(tmp_path / f"{name}.csv")
        assert len(rows) == count
        for row in rows:
            assert (row["status"], row["timed_by"], row["rounds"]) == (OK, "host", "2")
            assert row["workload"] in printed and row["peak_gib"] == ""
            assert 0 < float(row["p10_us"]) <= float(row["median_us"]) <= float(row["p90_us"])
            assert float(row["over_floor"]) > 0 and float(row["speedup"]) > 0


def test_a_folder_that_cannot_be_written_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "run_workload", fail)
    (tmp_path / "file").touch()
    assert run_bench("--suite", "core", "--out", str(tmp_path / "file" / "folder")) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_run_draws_the_seed_that_it_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []

    def note_seed(w: Workload, candidates: object, settings: Settings, *_: object) -> list[Result]:
        drawn.append(str(settings.seed))
        return [Result(w, "eager", False, UNAVAILABLE, "not run")]

    monkeypatch.setattr(bench, "run_workload", note_seed)
    printed = []
    for _ in range(2):
        assert main(["bench", "--device", "cpu", "--quick", "--check-only", "--suite", "ista"]) == 0
        printed.append(capsys.readouterr().out.splitlines()[1].rsplit("--seed ", 1)[1])
    assert printed == drawn and drawn[0] != drawn[1]


@pytest.mark.parametrize("autocast", [[], ["--autocast"]])
def test_half_precision_passes_the_gate(autocast: list[str], small_model: None) -> None:
    assert run_bench(*SMALL, "--dtype", "bf16", "--check-only", *autocast) == 0
