"""timm's own scripts with CRATE: ``python -m crate_kernels timm train.py --model crate_...``.

Under torchrun: ``torchrun --nproc-per-node 8 -m crate_kernels timm train.py ...``.
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", help="the file to run, such as timm's train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own")


def main(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("timm") is None:
        print("timm: needs timm; pip install timm", file=sys.stderr)
        return 2
    from .models import timm_models  # noqa: F401

    sys.argv = [args.script, *args.arguments]
    runpy.run_path(args.script, run_name="__main__")
    return 0
