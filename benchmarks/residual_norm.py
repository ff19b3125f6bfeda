"""What residual_norm takes between the steps of CRATE-alpha, over the width of the tokens.

python -m benchmarks.residual_norm [--rows 25216] [--widths 192 576 768 1024 1280]

x is float32 and y bfloat16, as under autocast, without a scale; the floor is the bytes of each pass
over the copy rate. Runs on the CPU too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from crate_kernels import env_report, residual_norm
from crate_kernels.bench.roofline import ceilings_for
from crate_kernels.bench.timing import interleave, prepare

# Bytes of an element: x, y -> z, h; dh, z, dz -> dx, dy.
BYTES = {"forward": 4 + 2 + 4 + 2, "backward": 2 + 4 + 4 + 4 + 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=25216)
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 576, 768, 1024, 1280])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each width")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if cuda else env_report.cpu_name()
    rate = ceilings_for(device, torch.bfloat16).bandwidth
    print(f"{name}; torch {torch.__version__}; {args.rows} rows, us")
    print(f"{'width':<8}{'pass':<12}{'median':>10}{'floor':>10}")
    stream = torch.cuda.stream(torch.cuda.Stream()) if cuda else contextlib.nullcontext()
    with stream:
        for d in args.widths:
            steps = passes(args.rows, d, device)
            runs = {label: prepare([step], device, graph=True) for label, step in steps.items()}
            timings = interleave(runs, device, rounds=100, seconds=args.seconds)
            for label, timing in timings.items():
                floor = BYTES[label] * args.rows * d / rate * 1e6
                print(f"{d:<8}{label:<12}{timing.median_us:>10.1f}{floor:>10.1f}", flush=True)


def passes(rows: int, d: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The forward pass, and the backward pass alone."""
    x = torch.randn(rows, d, device=device, requires_grad=True)
    y = torch.randn(rows, d, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(d, device=device, requires_grad=True) for _ in range(2))
    leaves = (x, weight, bias, y)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            return residual_norm(x, weight, bias, y)

    outputs = forward()
    grads = tuple(torch.randn_like(t) for t in outputs)
    backward = functools.partial(torch.autograd.grad, outputs, leaves, grads, retain_graph=True)
    return {"forward": forward, "backward": backward}


if __name__ == "__main__":
    main()
