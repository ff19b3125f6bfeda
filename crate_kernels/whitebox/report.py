"""What a trace says: a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import importlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..nn.fusion import Layer, grouped


@dataclass(frozen=True)
class Row:
    """One layer: means over its samples and, as ``_std``, standard deviations (n - 1); None where
    not measured, a deviation nan for one sample."""

    layer: int
    name: str
    samples: int
    coding_rate: float | None = None
    coding_rate_std: float | None = None
    compressed_rate: float | None = None
    compressed_rate_std: float | None = None
    rate_reduction: float | None = None
    rate_reduction_std: float | None = None
    sparsity: float | None = None
    sparsity_std: float | None = None
    nonzeros: float | None = None
    coherence_mean: float | None = None
    coherence_max: float | None = None

    @staticmethod
    def of(
        layer: int,
        name: str,
        samples: int,
        values: Mapping[str, Tensor | None],
        coherence: Tensor | None,
    ) -> Row:
        """From the values of each sample, and the heads' coherence (H, H)."""
        numbers: dict[str, float] = {}
        for measure, found in values.items():
            if found is not None and len(found):
                numbers[measure] = found.mean().item()
                numbers[f"{measure}_std"] = found.std().item() if len(found) > 1 else math.nan
        if "sparsity" in numbers:
            numbers["nonzeros"] = 1 - numbers["sparsity"]
        if coherence is not None and len(coherence) > 1:
            heads = len(coherence)
            between = coherence.double().cpu().fill_diagonal_(0)
            numbers["coherence_mean"] = between.sum().item() / (heads * (heads - 1))
            numbers["coherence_max"] = between.max().item()
        return Row(layer, name, samples, **numbers)


COLUMNS = tuple(f.name for f in fields(Row))
# Column of the table, its heading, its format.
_SHOWN = (
    ("coding_rate", "R", ".4g"),
    ("compressed_rate", "R^c", ".4g"),
    ("compressed_rate_std", "+-", ".2g"),
    ("rate_reduction", "R - R^c", ".4g"),
    ("sparsity", "zeros", ".2%"),
    ("sparsity_std", "+-", ".2%"),
    ("nonzeros", "nonzeros", ".2%"),
    ("coherence_mean", "coherence", ".3f"),
    ("coherence_max", "largest", ".3f"),
)


@dataclass(frozen=True)
class Table:
    """``print(table)`` for the text; ``rows`` for the numbers."""

    rows: list[Row]
    skipped: list[Layer]

    def __str__(self) -> str:
        shown = [c for c in _SHOWN if any(getattr(row, c[0]) is not None for row in self.rows)]
        lines = [["layer", "name", "samples", *(heading for _, heading, _ in shown)]]
        for row in self.rows:
            cells = [str(row.layer), row.name, str(row.samples)]
            for column, _, spec in shown:
                value = getattr(row, column)
                cells.append("-" if value is None or math.isnan(value) else format(value, spec))
            lines.append(cells)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if i == 1 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*text, *grouped("not measured", self.skipped)])

    __repr__ = __str__

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """The columns of :class:`Row`, numbers in full, nothing where nothing was measured."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for row in self.rows:
                values = [getattr(row, column) for column in COLUMNS]
                writer.writerow(["" if v is None or v != v else v for v in values])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Rates and the fraction of nonzeros over the layers, bars one standard deviation each."""
        panels = [
            ("coding rate, nats", {"coding_rate": "$R(Z)$", "compressed_rate": "$R^c(Z; U)$"}),
            ("fraction of nonzeros after ISTA", {"nonzeros": "nonzeros"}),
        ]
        panels = [
            (title, lines)
            for title, lines in panels
            if any(getattr(row, column) is not None for row in self.rows for column in lines)
        ]
        if not panels:
            raise ValueError("plot: expected rates or sparsity in the table, got neither")
        figure = new_figure(len(panels))
        for ax, (title, lines) in zip(figure.axes, panels, strict=True):
            self._draw(ax, lines)
            ax.set_title(title)
            ax.set_xlabel("layer")
            ax.spines[["top", "right"]].set_visible(False)
            if len(lines) > 1:
                ax.legend(frameon=False)
        figure.savefig(path, dpi=150)

    def _draw(self, ax: Any, lines: dict[str, str]) -> None:
        for (column, label), colour in zip(lines.items(), ("#1a73e8", "#e8710a"), strict=False):
            rows = [row for row in self.rows if getattr(row, column) is not None]
            spread = column.replace("nonzeros", "sparsity") + "_std"
            bars = [getattr(row, spread) for row in rows]
            ax.errorbar(
                [row.layer for row in rows],
                [getattr(row, column) for row in rows],
                yerr=None if any(math.isnan(bar) for bar in bars) else bars,
                label=label, color=colour, marker=".", capsize=2,
            )  # fmt: skip


def new_figure(columns: int, rows: int = 1, size: float = 4.5) -> Any:
    """Of matplotlib, with its axes, apart from pyplot and its state."""
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(
            figsize=(size * columns, 0.78 * size * rows), layout="constrained"
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot: needs matplotlib; pip install matplotlib", name="matplotlib"
        ) from error
    figure.subplots(rows, columns)
    return figure
