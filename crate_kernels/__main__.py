"""The command line: ``python -m crate_kernels COMMAND``, one of ``COMMANDS``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "build a CRATE model, swap its layers, check them, train it, compare the speed",
    "train": "train a model on image folders or text, on one device or many",
    "inspect": "measure the layers of a trained model on images, and draw its attention",
    "timm": "run a script of timm's, such as its train.py, with the CRATE models registered",
    "bench": "time ops, layers and models against their peers",
    "env_report": "print versions, devices, and which backends work",
}
MODULES = {"inspect": "whitebox.inspect"}  # of the others the name is the command's


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m crate_kernels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<12}{does}" for name, does in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="command --help lists them")
    chosen = parser.parse_args(argv)
    # Only the chosen module is imported: the others may need packages that are not there.
    module = importlib.import_module(f".{MODULES.get(chosen.command, chosen.command)}", __package__)
    prog = f"{parser.prog} {chosen.command}"
    sub = argparse.ArgumentParser(prog=prog, description=COMMANDS[chosen.command])
    module.add_arguments(sub)
    return module.main(sub.parse_args(chosen.options))


if __name__ == "__main__":
    sys.exit(main())
