"""Checkpoints: written whole or not at all, independent of the number of processes.

A file holds {"config", "model", "ema", "optimizer", "scaler", "step", "best", "window"}, with the
model under its published keys, so that :func:`crate_kernels.models.load_checkpoint` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..checks import refuse
from .config import Config

if TYPE_CHECKING:
    from .loop import Run

LAST, BEST = "last.pt", "best.pt"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
# Options that change nothing in what is computed, but for rounding.
_FREE = {"fuse", "compile", "graph", "device", "parallel", "workers", "out", "resume"}
_FREE |= {"log_every", "validate_every", "save_every"}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path`` by ``content`` at once: at any time it is the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def find(config: Config, model: nn.Module) -> dict[str, Any] | None:
    """The checkpoint to go on from, if any. ``model`` may be on meta.

    Raises ValueError for one of another model, a file that is none, and where a run in --out
    would be written over.
    """
    last = Path(config.out) / LAST
    path = Path(config.resume) if config.resume else last
    # The same command again, after a kill, must not begin again from a file elsewhere.
    begins = config.resume is None or path.resolve().parent != last.resolve().parent
    if begins and last.exists():
        refuse("train", f"--out without a run, or --resume to go on with {last}", config.out)
    if config.resume is None:
        return None
    if not path.is_file():
        if config.resume:
            refuse("train", "--resume with a checkpoint", f"{path}, which does not exist")
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state, saved = content["model"], content["config"]
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"train: expected a checkpoint of train, got {path} ({kind})") from error
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            refuse(
                "train",
                f"a checkpoint of this {config.model}, with {key} of shape {wanted.get(key)}",
                f"{path}, a {saved['model']} with {found.get(key)}",
            )
    if saved["optimizer"] != config.optimizer:
        refuse("train", f"a checkpoint with the state of {config.optimizer}", saved["optimizer"])
    return content


def differences(config: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Options that were others before, so that the run is not the one that was begun."""
    return [
        f"{name} {saved.get(name)} -> {value}"
        for name, value in config.items()
        if name not in _FREE and value != saved.get(name)
    ]


def gather(run: Run) -> dict[str, Any]:
    """All that ``run`` needs to go on; every process has to take part, the first gets it."""
    ema, window = run.ema, run.world.sum(run.window.clone())
    return {
        "model": get_model_state_dict(run.net, options=FULL),
        "ema": None if ema is None else get_model_state_dict(ema.module, options=FULL),
        "optimizer": get_optimizer_state_dict(run.net, run.optimizer, options=FULL),
        "scaler": run.scaler.state_dict(),
        "step": run.step,
        "best": run.best,
        "window": window.tolist(),
    }


def restore(run: Run, content: Mapping[str, Any]) -> None:
    options = StateDictOptions(full_state_dict=True)
    # The optimizer first: setting its state may take a step of size zero with the weights.
    set_optimizer_state_dict(run.net, run.optimizer, content["optimizer"], options=options)
    for group in run.optimizer.param_groups:  # an option, which may have changed; so is the rate
        group["weight_decay"] = run.config.weight_decay
    set_model_state_dict(run.net, content["model"], options=options)
    if run.ema is not None and content["ema"] is not None:
        set_model_state_dict(run.ema.module, content["ema"], options=options)
        run.ema.n_averaged.fill_(content["step"])
    if content["scaler"]:
        run.scaler.load_state_dict(content["scaler"])
    run.step, run.best = content["step"], content["best"]
    if run.world.first:  # the sum over all processes
        run.window.copy_(torch.tensor(content["window"], dtype=run.window.dtype))
