"""What a run is told: the options of ``python -m crate_kernels train``, their defaults and limits.

A default of None depends on the data or on the optimizer: ``BY_DATA`` and ``BY_OPTIMIZER``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

from ..block.op import MEMORY
from ..checks import refuse

MODELS = ("crate_tiny", "crate_small", "crate_base", "crate_large", "crate_gpt")
# For image folders as in the papers, arXiv 2306.01129 and 2311.13110: ImageNet-1K.
BY_DATA: dict[str, dict[str, Any]] = {
    "folder": {
        "batch_size": 2048, "epochs": 150, "label_smoothing": 0.1, "mixup": 0.0,
        "image_size": 224, "patch_size": 16,
    },
    "digits": {
        "batch_size": 64, "epochs": 30, "label_smoothing": 0.1, "mixup": 0.0,
        "image_size": 16, "patch_size": 4,
    },
    "text": {"batch_size": 64, "epochs": 1, "context": 1024},
}  # fmt: skip
# Lion as in the papers, AdamW as in the published training script.
BY_OPTIMIZER = {
    "lion": {"lr": 2.4e-4, "weight_decay": 0.5},
    "adamw": {"lr": 4e-4, "weight_decay": 0.1},
}
_COUNTS = {"image_size", "patch_size", "context", "dim", "depth", "heads", "batch_size"}
_COUNTS |= {"accumulate", "epochs", "steps", "log_every", "validate_every", "save_every"}
PACKAGES = {"lion_pytorch": "lion-pytorch", "sklearn": "scikit-learn"}


def _option(default: Any, help: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **more})


def _switch(default: bool, help: str) -> Any:
    return _option(default, help, action=argparse.BooleanOptionalAction)


@dataclass(frozen=True)
class Config:
    """The options, each the field of its name; None where the default is not a constant."""

    data: str = _option(
        "digits",
        "a folder with train/ and val/, each with a folder of images for each class; 'digits', "
        "scikit-learn's; for crate_gpt a text file or a folder of .txt and .py files",
    )
    model: str = _option("crate_tiny", "one of %(choices)s", choices=MODELS)
    image_size: int | None = _option(None, "pixels (224; digits: 16)", type=int)
    patch_size: int | None = _option(None, "pixels (16; digits: 4)", type=int)
    context: int | None = _option(None, "bytes of text at once (1024)", type=int)
    dim: int | None = _option(None, "width, in place of the model's own", type=int)
    depth: int | None = _option(None, "blocks, in place of the model's own", type=int)
    heads: int | None = _option(None, "heads, in place of the model's own", type=int)
    fuse: bool = _switch(True, "swap the published layers for this library's")
    memory: str = _option(
        "default",
        "low keeps less for the backward pass, for a GEMM more a layer",
        choices=MEMORY,
    )
    compile: bool = _switch(False, "torch.compile the model")
    graph: bool = _switch(
        False, "forward and backward as one launch, a CUDA graph: for one GPU that waits for Python"
    )
    dtype: str = _option(
        "float32", "of autocast; float16 with a GradScaler",
        choices=("float32", "bfloat16", "float16"),
    )  # fmt: skip
    device: str | None = _option(None, "cuda or cpu (cuda if there)", choices=("cuda", "cpu"))
    parallel: str = _option("ddp", "of several processes, by torchrun", choices=("ddp", "fsdp"))
    batch_size: int | None = _option(
        None, "samples in each step, over all processes and --accumulate (2048; digits, text: 64)",
        type=int,
    )  # fmt: skip
    accumulate: int = _option(1, "backward passes that make up a step", type=int)
    epochs: int | None = _option(None, "(150; digits: 30; text: 1)", type=int)
    steps: int | None = _option(None, "optimizer steps, in place of --epochs", type=int)
    optimizer: str = _option("lion", "lion or adamw", choices=tuple(BY_OPTIMIZER))
    lr: float | None = _option(None, "peak learning rate (lion: 2.4e-4, adamw: 4e-4)", type=float)
    weight_decay: float | None = _option(None, "(lion: 0.5, adamw: 0.1)", type=float)
    warmup: float = _option(
        1 / 30, "part of the steps in which the rate rises, before its cosine (1/30)", type=float
    )
    clip: float = _option(1.0, "largest norm of the gradient; 0: any", type=float)
    ema: float = _option(0.0, "decay of the averaged weights, such as 0.9999; 0: none", type=float)
    mixup: float | None = _option(None, "alpha of mixup; 0: none (0)", type=float)
    label_smoothing: float | None = _option(None, "(images: 0.1)", type=float)
    seed: int = _option(0, "of everything random", type=int)
    workers: int = _option(
        min(8, os.cpu_count() or 1), "processes that load images from a folder", type=int
    )
    out: str = _option("train_output", "folder for checkpoints and logs")
    resume: str | None = _option(
        None, "go on from this checkpoint; without a path, from the last in --out if there is one",
        nargs="?", const="", metavar="PATH",
    )  # fmt: skip
    log_every: int = _option(50, "steps between lines of metrics.csv", type=int)
    validate_every: int | None = _option(
        None, "steps between validations, with a checkpoint each (one epoch)", type=int
    )
    save_every: int | None = _option(None, "steps between further checkpoints", type=int)

    @property
    def kind(self) -> str:
        """Of the data: "text", "digits" or "folder"."""
        if self.model == "crate_gpt":
            return "text"
        return "digits" if self.data == "digits" else "folder"

    def resolved(self, processes: int, device: str) -> Config:
        """With every default filled in. Raises ValueError for what does not fit together."""
        known = {**BY_DATA[self.kind], **BY_OPTIMIZER[self.optimizer]}
        chosen = {
            name: value if getattr(self, name) is None else getattr(self, name)
            for name, value in known.items()
        }
        self._check(chosen, processes, device)
        return dataclasses.replace(self, **chosen)

    def _check(self, chosen: dict[str, Any], processes: int, device: str) -> None:
        of_others = {name for options in BY_DATA.values() for name in options} - set(chosen)
        for name in sorted(of_others):
            if getattr(self, name) is not None:
                refuse("train", f"no {_flag(name)} with {self.model}", getattr(self, name))
        if self.kind == "text" and not self.fuse:
            refuse(
                "train",
                "a model with published layers for --no-fuse",
                "crate_gpt, which is built on the ops (CRATE_KERNELS_BACKEND=reference runs "
                "them in plain PyTorch)",
            )
        if self.memory != "default" and (self.kind == "text" or not self.fuse):
            refuse("train", "a fused image model for --memory", self.memory)
        if self.graph and (processes > 1 or device != "cuda"):
            got = f"{processes} processes" if processes > 1 else device
            refuse("train", "one process on a CUDA device for --graph", got)
        values = {**dataclasses.asdict(self), **chosen}
        for name, value in values.items():
            if value is None:
                continue
            if name in ("ema", "warmup", "label_smoothing") and not 0 <= value < 1:
                refuse("train", f"{_flag(name)} at least 0 and below 1", value)
            if name in ("mixup", "clip", "weight_decay", "workers") and not 0 <= value < math.inf:
                refuse("train", f"{_flag(name)} of at least 0", value)
            if name == "lr" and not 0 < value < math.inf:
                refuse("train", "--lr above 0", value)
            if name in _COUNTS and value < 1:
                refuse("train", f"{_flag(name)} of at least 1", value)
        parts = processes * self.accumulate
        if values["batch_size"] % parts != 0:
            refuse(
                "train",
                f"--batch-size to be a multiple of {parts} ({processes} processes x "
                f"--accumulate {self.accumulate})",
                values["batch_size"],
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_packages(config: Config) -> None:
    """Raise ValueError where a package that this run needs is missing."""
    modules = ["tqdm"]
    modules += ["lion_pytorch"] * (config.optimizer == "lion")
    modules += {"digits": ["sklearn"], "folder": ["torchvision"], "text": []}[config.kind]
    missing = [PACKAGES.get(m, m) for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        hint = " (or take --optimizer adamw)" if "lion-pytorch" in missing else ""
        raise ValueError(
            f"train: needs {', '.join(missing)}; pip install {' '.join(missing)} "
            f"(or install crate_kernels[train]){hint}"
        )
