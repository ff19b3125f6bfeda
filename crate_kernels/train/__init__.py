"""Train a CRATE model on images or text: ``python -m crate_kernels train``.

    python -m crate_kernels train --data imagenet --model crate_base --dtype bfloat16
    torchrun --nproc-per-node 8 -m crate_kernels train --data imagenet --model crate_base --resume

Whatever is random is a function of (seed, step, process) or of (seed, epoch, sample). So no
generator has a state worth saving, and a run resumed from a checkpoint goes on as if it had never
stopped: docs/training.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from . import checkpoint, data, distributed, loop
from .config import Config, check_packages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for option in dataclasses.fields(Config):
        flag = "--" + option.name.replace("_", "-")
        parser.add_argument(flag, default=option.default, **option.metadata)


def main(args: argparse.Namespace) -> int:
    config = Config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Config)})
    world = distributed.World.from_environment(config.device)
    try:
        check_packages(config)
        config = config.resolved(world.size, world.device.type)
        sets = data.load(config)
        content = checkpoint.find(config, loop.build(config, sets, "meta"))
    except ValueError as error:
        if world.local_rank == 0:
            print(error, file=sys.stderr)
        return 2
    with distributed.process_group(world):
        samples = len(sets.train), len(sets.validation)
        step = content["step"] if content else 0
        if not world.agrees(*samples, step):
            if world.local_rank == 0:
                print(
                    "train: expected every process to see the same --data and --out, got "
                    f"{samples[0]} + {samples[1]} samples and step {step} in process {world.rank}, "
                    "and others elsewhere",
                    file=sys.stderr,
                )
            return 2
        return loop.fit(config, world, sets, content)
