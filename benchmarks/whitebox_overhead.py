"""What a trace costs: forward passes of a fused model, bare and measured.

python -m benchmarks.whitebox_overhead [--model crate_base] [--batch 256] [--samples 16]

The determinants are in it, as they fall due over INNER passes. Runs on the CPU too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import crate_kernels
from crate_kernels import env_report, models
from crate_kernels.bench.timing import interleave, prepare
from crate_kernels.bench.workloads import DTYPES, MODELS
from crate_kernels.whitebox import trace

INNER = 20
CASES: dict[str, dict[str, Any]] = {
    "sparsity": {"rate": False},
    "rate": {"sparsity": False},
    "rate, sparsity": {},
    "rate, sparsity, attention": {"attention": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="crate_base")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--samples", type=int, default=16, help="measured of each batch; 0: all")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if cuda else env_report.cpu_name()
    print(f"{name}; torch {torch.__version__}; {args.model} {args.batch}, {args.dtype} autocast")

    base = getattr(models, args.model)().to(device).eval()
    print(crate_kernels.fuse(base))
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    stream = torch.cuda.stream(torch.cuda.Stream()) if cuda else contextlib.nullcontext()
    with contextlib.ExitStack() as exits, stream:
        steps = {"none": forward(base, images, DTYPES[args.dtype])}
        for label, options in CASES.items():
            model = copy.deepcopy(base)
            exits.enter_context(trace(model, samples=args.samples or None, **options))
            steps[label] = forward(model, images, DTYPES[args.dtype])
        inner = INNER if cuda else 1
        runs = {label: prepare([step], device, False, inner) for label, step in steps.items()}
        timings = interleave(runs, device, rounds=100, seconds=args.seconds)
    bare = timings["none"].median_us
    print(f"{'measured':<28}{'ms':>10}{'over none':>12}")
    for label, timing in timings.items():
        print(f"{label:<28}{timing.median_us / 1e3:>10.3f}{timing.median_us / bare - 1:>12.1%}")


def forward(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    @torch.no_grad()
    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            model(images)

    return step


if __name__ == "__main__":
    main()
