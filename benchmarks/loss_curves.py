"""Does fusing change what a model learns? Loss curves, fused and not, beside those of two seeds.

    python -m benchmarks.loss_curves --out docs/results
    python -m benchmarks.loss_curves --out curves --model crate_base --data imagenet

Trains the same model on the same batches unfused, fused, and fused with memory="low", and unfused
again from another seed. Rounding makes any two runs drift apart; the question is whether fusing
does more than that. The measure is the root mean square difference of two loss curves, and what it
is held against is the difference that the seed makes. Other options are those of
``python -m crate_kernels train``. Returns 1 where a fused run is farther off than the other seed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import sys
import tempfile
from pathlib import Path

import torch

from crate_kernels.__main__ import main as crate_kernels
from crate_kernels.train.log import read

RUNS = {
    "unfused": ("--seed", "0", "--no-fuse"),
    "unfused, another seed": ("--seed", "1", "--no-fuse"),
    "fused": ("--seed", "0"),
    'fused, memory="low"': ("--seed", "0", "--memory", "low"),
}
COLOURS = ("#9aa0a6", "#f29900", "#1a73e8", "#188038")
DEFAULTS = ("--steps", "500", "--optimizer", "adamw", "--dtype", "bfloat16", "--log-every", "10")

Curve = dict[int, float]


def train(options: list[str], folder: Path) -> Curve:
    """Mean training loss since the last point, by step."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = crate_kernels(["train", *DEFAULTS, *options, "--out", str(folder)])
    if status != 0:
        raise SystemExit(f"loss_curves: train {' '.join(options)} failed:\n{said.getvalue()}")
    rows = [r for r in read(folder / "metrics.csv") if r["split"] == "train"]
    return {int(r["step"]): float(r["loss"]) for r in rows}


def distance(a: Curve, b: Curve) -> float:
    """Root mean square difference of two curves with the same steps, in nats."""
    return (sum((a[step] - b[step]) ** 2 for step in a) / len(a)) ** 0.5


def write(out: Path, curves: dict[str, Curve], where: str) -> None:
    """loss_curves.csv and .png, each whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=True):
        axes.plot(list(curve), list(curve.values()), label=name, color=colour, lw=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats")
    axes.set_title(where, size=9)
    axes.legend(frameon=False)
    picture, table = io.BytesIO(), io.StringIO()
    FigureCanvasAgg(figure).print_png(picture)
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["step", *curves])
    writer.writerows([step, *(c[step] for c in curves.values())] for step in curves["unfused"])
    out.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("csv", table.getvalue().encode()), ("png", picture.getvalue())):
        partial = out / f".loss_curves.{suffix}"
        partial.write_bytes(content)
        os.replace(partial, out / f"loss_curves.{suffix}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("loss_curves"), help="folder to write to")
    args, options = parser.parse_known_args(argv)
    for name in ("--seed", "--fuse", "--no-fuse", "--memory"):
        if name in options:
            parser.error(f"expected no {name}, which this script sets")
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, own) in enumerate(RUNS.items()):
            print(f"{name}: train {' '.join(own)}", flush=True)
            curves[name] = train([*options, *own], Path(folder) / str(i))
    plain, other = curves["unfused"], curves["unfused, another seed"]
    bound = distance(plain, other)
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    write(args.out, curves, " ".join(["loss_curves.py", *options, "on", on]))
    print(f"\nroot mean square difference from the unfused curve, {len(plain)} points, in nats")
    far = 0
    for name, curve in curves.items():
        if curve is plain:
            continue
        apart = distance(plain, curve)
        far += curve is not other and not apart <= bound
        print(f"  {name:<24} {apart:.4f}   last loss {list(curve.values())[-1]:.4f}")
    print(f"written to {args.out}: loss_curves.csv, loss_curves.png")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
