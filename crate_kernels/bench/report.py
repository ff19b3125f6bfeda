"""What a run leaves behind: lines on the terminal, and a CSV, PNG and Markdown file per suite."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .peers import YARDSTICK
from .roofline import Ceilings
from .run import FAILED, OK, Result

WITH_HEADS = ("core", "mssa", "masks", "decode", "encoder")
BOLD, PLAIN = "\033[1m", "\033[0m"


@dataclass(frozen=True)
class Machine:
    """Where and by what the figures came about."""

    device: str
    software: str
    torch: str
    triton: str
    cuda: str
    commit: str
    date: str
    command: str

    def __str__(self) -> str:
        return f"{self.device}; {self.software}; commit {self.commit}; {self.date}"


# ---- terminal

COLUMNS = (
    ("candidate", 22),
    ("median us", -11),
    ("p10", -11),
    ("p90", -11),
    ("img/s", -8),
    ("GiB", -6),
    ("x floor", -8),
    ("speedup", -8),
)


def header() -> str:
    return "  " + " ".join(_pad(name, width) for name, width in COLUMNS)


def lines(results: Sequence[Result], bold: bool) -> Iterable[str]:
    """The workload on a line of its own, then one line per candidate."""
    w = results[0].workload
    floor = next((r.floor_us for r in results if r.floor_us), None)
    yield f"{w.suite} {w.label}" + (f"   (floor {floor:.1f} us)" if floor else "")
    for r in results:
        yield "  " + _line(r, bold)


def _line(r: Result, bold: bool) -> str:
    name = _pad(r.candidate, COLUMNS[0][1])
    if r.status != OK:
        return f"{name} {r.status}: {r.note}"
    if r.median_us is None:
        return f"{name} {r.status}: {error_text(r)}"
    figures = (
        f"{r.median_us:.1f}",
        f"{r.p10_us:.1f}",
        f"{r.p90_us:.1f}",
        _number(r.images_per_second, ".0f"),
        _number(r.peak_gib, ".2f"),
        _number(r.over_floor, ".2f"),
        _number(r.speedup, ".2f", "x"),
    )
    cells = [_pad(text, width) for text, (_, width) in zip(figures, COLUMNS[1:], strict=True)]
    if r.ours and bold:
        cells[-1] = f"{BOLD}{cells[-1]}{PLAIN}"
    remarks = []
    if r.ours and r.versus:
        remarks.append(f"against {r.versus}")
        if r.workload.target:
            remarks.append(f"target {r.workload.target:g}x")
    if r.ours and r.over_gemms:
        remarks.append(gemms_text(r))
    if r.note:
        remarks.append(r.note)
    return " ".join([name, *cells, "; ".join(remarks)]).rstrip()


def gemms_text(r: Result) -> str:
    most = f" (at most {r.workload.most:g}x)" if r.workload.most else ""
    return f"{r.over_gemms:.2f}x the time of {YARDSTICK}{most}"


def error_text(r: Result) -> str:
    """Errors against float64 as multiples of eager's: largest / RMS."""
    parts = []
    for name, error in (("output", r.output_error), ("gradients", r.gradient_error)):
        if error is not None:
            parts.append(f"{name} {error[0]:.2f}/{error[1]:.2f}")
    return ", ".join(parts)


def _pad(text: str, width: int) -> str:
    return text.ljust(width) if width > 0 else text.rjust(-width)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


# ---- files


def prepare(out: Path) -> None:
    """Make ``out``, and refuse before anything is measured what could not be written after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("bench: expected matplotlib for --out, got none: pip install matplotlib")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


def write(
    out: Path, name: str, results: Sequence[Result], machine: Machine, ceilings: Ceilings | None
) -> list[Path]:
    """``name``.csv, .md and .png under ``out``; each appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    contents = {
        "csv": to_csv(results, machine).encode(),
        "md": to_markdown(name, results, machine, ceilings).encode(),
        "png": (scaling_png if name.startswith("scaling") else to_png)(name, results, machine),
    }
    paths = []
    for suffix, data in contents.items():
        path = out / f"{name}.{suffix}"
        _write_whole(path, data)
        paths.append(path)
    return paths


def _write_whole(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def row(r: Result, machine: Machine) -> dict[str, Any]:
    """One CSV row: floats rounded to what was measured, blanks where there is no figure."""
    w = r.workload
    output, gradient = r.output_error or ("", ""), r.gradient_error or ("", "")
    values = {
        "suite": w.suite,
        "workload": w.label,
        "mode": w.mode,
        "model": w.model,
        "batch": w.batch,
        "tokens": w.tokens,
        "width": w.width if w.suite in ("mssa", "ista", "overcomplete", "encoder") else "",
        "heads": w.heads if w.suite in WITH_HEADS else "",
        "head_dim": w.head_dim if w.suite in WITH_HEADS else "",
        "causal": int(w.causal),
        "dtype": w.dtype,
        "autocast": int(w.autocast or (w.suite == "model" and w.dtype != "fp32")),
        "candidate": r.candidate,
        "status": r.status,
        "median_us": r.median_us,
        "p10_us": r.p10_us,
        "p90_us": r.p90_us,
        "rounds": r.rounds,
        "timed_by": r.method,
        "images_per_s": r.images_per_second,
        "peak_gib": r.peak_gib,
        "floor_us": r.floor_us,
        "over_floor": r.over_floor,
        "versus": r.versus,
        "speedup": r.speedup,
        "target": w.target if r.ours else "",
        "over_gemms": r.over_gemms,
        "most": w.most if r.ours else "",
        "output_max_error_x_eager": output[0],
        "output_rms_error_x_eager": output[1],
        "gradient_max_error_x_eager": gradient[0],
        "gradient_rms_error_x_eager": gradient[1],
        "note": r.note,
        "device": machine.device,
        "torch": machine.torch,
        "triton": machine.triton,
        "cuda": machine.cuda,
        "commit": machine.commit,
        "date": machine.date,
    }
    return {k: _rounded(v) for k, v in values.items()}


def _rounded(value: Any) -> Any:
    if value is None:
        return ""
    if not isinstance(value, float):
        return value
    return f"{value:.5g}" if abs(value) < 1e5 else f"{value:.0f}"


def to_csv(results: Sequence[Result], machine: Machine) -> str:
    rows = [row(r, machine) for r in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(
    name: str, results: Sequence[Result], machine: Machine, ceilings: Ceilings | None
) -> str:
    text = [f"# Benchmark: {name}", "", f"{machine}.", "", f"    {machine.command}", ""]
    text.append(
        "Error: largest / RMS difference from float64, as multiples of eager's. Speedup: median of "
        "the named peer over ours."
    )
    if ceilings is not None:
        units = "" if ceilings.exponentials == float("inf") else _exponentials(ceilings)
        text.append(
            f"Floor ({ceilings.source} ceilings): {ceilings.bandwidth / 1e12:.3g} TB/s, "
            f"{ceilings.flops / 1e12:.3g} TFLOP/s{units}."
        )
    text += [
        "",
        "| workload | candidate | us | p10-p90 | img/s | GiB | x floor | speedup | error |",
    ]
    text.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |")
    label = ""
    for r in results:
        same, label = r.workload.label == label, r.workload.label
        cells = ["" if same else label, r.candidate, *_markdown_figures(r)]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def _exponentials(ceilings: Ceilings) -> str:
    return f", {ceilings.exponentials / 1e12:.3g}e12 exponentials/s"


def _markdown_figures(r: Result) -> list[str]:
    if r.median_us is None:
        status = r.status if r.status == OK else f"{r.status}: {r.note}".replace("|", "/")
        return [status, "", "", "", "", "", error_text(r)]
    speedup = f"**{r.speedup:.2f}x** {r.versus}" if r.ours and r.speedup else ""
    if speedup and r.workload.target:
        speedup += f" (target {r.workload.target:g}x)"
    if r.ours and r.over_gemms:
        speedup += f"; {gemms_text(r)}"
    return [
        f"{r.median_us:.1f}",
        f"{r.p10_us:.1f}-{r.p90_us:.1f}",
        _number(r.images_per_second, ".0f"),
        _number(r.peak_gib, ".2f"),
        _number(r.over_floor, ".2f"),
        speedup,
        error_text(r),
    ]


def to_png(name: str, results: Sequence[Result], machine: Machine) -> bytes:
    """Bars: speedup of ours over the peer named beside each; a line at 1, ticks at the targets."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [r for r in results if r.ours]
    figure = Figure(figsize=(9, 1.6 + 0.42 * max(1, len(shown))), layout="constrained")
    axes = figure.add_subplot()
    for y, r in enumerate(shown):
        value = r.speedup or 0.0
        axes.barh(y, value, height=0.6, color="#2a6f97" if r.status == OK else "#b23a48")
        text = f"{value:.2f}x {r.versus}" if r.speedup else r.status
        if r.status == FAILED:
            text = "FAILED the check against float64"
        axes.annotate(text, (value, y), (4, 0), textcoords="offset points", va="center", size=8)
        if r.workload.target:
            axes.plot([r.workload.target] * 2, [y - 0.42, y + 0.42], color="black", lw=1.6)
    longest = max([1.0, *(max(r.speedup or 0, r.workload.target or 0) for r in shown)])
    axes.set_xlim(0, 1.35 * longest)
    axes.axvline(1.0, color="grey", lw=0.8, ls="--")
    axes.set_yticks(range(len(shown)), [_bar_label(r) for r in shown], size=8)
    axes.invert_yaxis()
    axes.set_xlabel("speedup over the peer named (black tick: target)")
    axes.set_title(f"{name}: {machine.device}, {machine.date}, commit {machine.commit}", size=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def scaling_png(name: str, results: Sequence[Result], machine: Machine) -> bytes:
    """Time and peak memory of each candidate, over the tokens of an item and over the width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    grid = figure.subplots(2, 2, squeeze=False)
    usual = results[0].workload.width, results[-1].workload.tokens
    for column, (size, other) in enumerate((("tokens", "width"), ("width", "tokens"))):
        shown = [r for r in results if getattr(r.workload, other) == usual[column]]
        for row, (label, figure_of) in enumerate(
            (("ms", lambda r: r.median_us and r.median_us / 1e3), ("GiB", lambda r: r.peak_gib))
        ):
            axes = grid[row][column]
            sizes = sorted({getattr(r.workload, size) for r in shown if figure_of(r)})
            if len(sizes) < 2:
                axes.set_axis_off()
                continue
            for candidate in dict.fromkeys(r.candidate for r in shown):
                points = sorted(
                    (getattr(r.workload, size), figure_of(r))
                    for r in shown
                    if r.candidate == candidate and figure_of(r)
                )
                if points:
                    axes.plot(*zip(*points, strict=True), marker=".", label=candidate)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(s) for s in sizes])
            axes.set_ylim(bottom=0)
            axes.set_xlabel(size)
            axes.set_ylabel(label)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{name}: {machine.device}, {machine.date}, commit {machine.commit}", size=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _bar_label(r: Result) -> str:
    extra = "" if r.candidate == "crate_kernels" else f"\n{r.candidate}"
    return f"{r.workload.label}{extra}"
