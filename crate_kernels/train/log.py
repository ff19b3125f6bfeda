"""What a run says: progress bar, metrics.csv, TensorBoard where it is installed, curves.png."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

COLUMNS = ("step", "epoch", "split", "loss", "accuracy", "lr", "gradient_norm", "per_second")


class Log:
    """One line of metrics.csv for each :meth:`write`; numbers in full, so that runs compare.

    Opened at ``step``, it drops the lines of later steps: those will be written again. Where
    ``active`` is false (all processes but the first) it does nothing.
    """

    def __init__(self, out: Path, step: int, steps: int, unit: str, *, active: bool) -> None:
        from tqdm import tqdm

        self.out, self.active, self.unit = out, active, unit
        # disable=None: no bar where stderr is not a terminal.
        self.bar = tqdm(
            total=steps, initial=step, unit="step", dynamic_ncols=True,
            disable=None if active else True,
        )  # fmt: skip
        self.board: Any = None
        if not active:
            return
        rows = [r for r in read(out / "metrics.csv") if int(r["step"]) <= step]
        partial = out / "metrics.csv.partial"
        partial.write_text(_line(COLUMNS) + "".join(_line(r.values()) for r in rows))
        os.replace(partial, out / "metrics.csv")
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, **row: Any) -> None:
        """Append a line, flushed to the disk, in one piece."""
        if not self.active:
            return
        with (self.out / "metrics.csv").open("a") as file:
            file.write(_line(row.get(name, "") for name in COLUMNS))
            file.flush()
            os.fsync(file.fileno())
        if self.board is not None:
            for name in COLUMNS[3:]:
                if name in row:
                    self.board.add_scalar(f"{name}/{row['split']}", row[name], row["step"])
        if row["split"] == "train":
            self.bar.set_postfix_str(
                f"loss {row['loss']:.3f}, {row['per_second']:.4g} {self.unit}/s, lr {row['lr']:.2g}"
            )

    def say(self, text: str) -> None:
        if self.active:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()
        if self.active and importlib.util.find_spec("matplotlib"):
            plot(read(self.out / "metrics.csv"), self.out / "curves.png")


def read(path: Path) -> list[dict[str, str]]:
    """The whole lines of a metrics.csv; none where there is no file."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]  # a kill may have cut the last line
    return [r for r in csv.DictReader(io.StringIO(whole)) if None not in r.values()]


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Loss and accuracy over the steps, in training and on what was held out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for split, label, colour in (("train", "training", "#9aa0a6"), ("val", "held out", "#1a73e8")):
        for ax, name in zip(axes, ("loss", "accuracy"), strict=True):
            own = [r for r in rows if r["split"] == split]
            steps, values = [int(r["step"]) for r in own], [float(r[name]) for r in own]
            ax.plot(steps, values, label=label, color=colour, marker=".")
            ax.set_xlabel("step")
            ax.set_title(name)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _line(values: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
