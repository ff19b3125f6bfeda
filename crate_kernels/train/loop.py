"""The training loop: what changes in a run, a step of it, a validation, and the whole."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import models
from ..models.gpt import IGNORED
from ..nn import fuse
from . import checkpoint, distributed
from .config import Config
from .data import HeldOut, Order, Sets, batches, seed_of
from .distributed import World
from .graph import CapturedPass
from .log import Log

Batch = tuple[Tensor, Tensor]


def build(config: Config, sets: Sets, device: str) -> nn.Module:
    """The model in published form. Raises ValueError for sizes that do not fit together."""
    names = ("dim", "depth", "heads", "image_size", "patch_size")
    given = {n: getattr(config, n) for n in names if getattr(config, n) is not None}
    return getattr(models, config.model)(**sets.model, **given, device=device)


def rate(step: int, steps: int, warmup: float) -> float:
    """Of the peak: up in a line over ``warmup`` of the steps, then down a cosine, to 0 at the end.

    min(1, (step + 1) / rising) before ``rising`` = warmup steps, (1 + cos(pi part)) / 2 after.
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def mixed(x: Tensor, y: Tensor, alpha: float, classes: int) -> Batch:
    """Mixup (arXiv 1710.09412): each image and its label with another of the batch, by one part."""
    part = torch.distributions.Beta(alpha, alpha).sample().item()
    targets = F.one_hot(y, classes).to(x.dtype)
    return x.lerp(x.flip(0), part), targets.lerp(targets.flip(0), part)


def seed_step(seed: int) -> None:
    """All generators, so that no state of one has to outlive a step."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


class Run:
    """What changes while training. ``net`` holds the parameters, ``model`` is what to call."""

    def __init__(self, config: Config, world: World, sets: Sets, per_epoch: int) -> None:
        self.config, self.world, self.sets, self.per_epoch = config, world, sets, per_epoch
        self.steps = config.steps or (config.epochs or 1) * per_epoch
        torch.manual_seed(config.seed)
        self.net = build(config, sets, "cpu").to(world.device)
        fused = config.fuse and config.kind != "text"
        self.report = fuse(self.net, memory=config.memory) if fused else None
        self.ema: Any = None
        if config.ema:
            self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.model = self.net
        if world.size > 1 and config.parallel == "fsdp":
            distributed.shard(self.net)
            if self.ema is not None:
                distributed.shard(self.ema.module)
        elif world.size > 1:
            self.model = distributed.replicate(self.net, world)
        if config.compile:
            self.net.compile()
        self.optimizer = self._optimizer()
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
        self.step, self.best = 0, math.inf
        # Sums of the losses and correct predictions since the last line of the log; their number.
        self.window = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.norm = torch.zeros(())
        self.captured: CapturedPass | None = None

    def _optimizer(self) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"lr": self.config.lr, "weight_decay": self.config.weight_decay}
        if self.config.optimizer == "lion":
            from lion_pytorch import Lion

            return Lion(self.net.parameters(), **options)
        return torch.optim.AdamW(self.net.parameters(), fused=True, **options)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss of a batch, how many predictions there are, and how many are correct."""
        with torch.autocast(
            self.world.device.type, self.dtype, enabled=self.dtype != torch.float32
        ):
            if self.config.kind == "text":
                logits, loss = model(x, y)
            else:
                logits = model(x)
                smoothing = self.config.label_smoothing or 0.0 if model.training else 0.0
                loss = F.cross_entropy(logits, y, label_smoothing=smoothing, ignore_index=IGNORED)
        labels = y if y.dtype == torch.long else y.argmax(-1)
        return loss, (labels != IGNORED).sum(), (logits.argmax(-1) == labels).sum()

    def both_passes(self, x: Tensor, y: Tensor) -> None:
        """Forward and backward of a part of a step."""
        loss, count, correct = self.loss(self.model, x, y)
        self.scaler.scale(loss / self.config.accumulate).backward()
        self.window += torch.stack((loss.detach() * count, correct, count))

    def captured_passes(self, x: Tensor, y: Tensor, first: bool) -> None:
        """The same by a CUDA graph, captured at the first call; ``first`` of its step."""
        if self.captured is None:
            parameters, several = self.net.parameters(), self.config.accumulate > 1
            self.captured = CapturedPass(self.both_passes, parameters, self.window, x, y, several)
        self.captured(x, y, first)

    def train_step(self, data: Iterator[Batch]) -> None:
        config = self.config
        seed_step(seed_of(config.seed, "step", self.step, self.world.rank))
        self.model.train()
        for part in range(config.accumulate):
            x, y = (t.to(self.world.device, non_blocking=True) for t in next(data))
            if config.mixup:
                x, y = mixed(x, y, config.mixup, self.sets.model["num_classes"])
            with distributed.synchronised(self.model, part == config.accumulate - 1):
                if config.graph:
                    self.captured_passes(x, y, part == 0)
                else:
                    self.both_passes(x, y)
        factor = rate(self.step, self.steps, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = (config.lr or 0.0) * factor
        self.scaler.unscale_(self.optimizer)
        self.norm = nn.utils.clip_grad_norm_(self.net.parameters(), config.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.net)
        self.step += 1

    def healthy(self) -> bool:
        """Whether the weights are numbers that still change: worth a checkpoint."""
        losses = self.world.sum(self.window.clone())[0]
        if not math.isfinite(losses):
            return False
        if self.scaler.is_enabled():
            # An infinite gradient is no harm: the step was skipped. But where all are, the scale
            # is halved until it is below what float16 can hold.
            return self.scaler.get_scale() >= torch.finfo(torch.float16).smallest_normal
        return math.isfinite(distributed.full(self.norm))

    @torch.no_grad()
    def validate(self, data: Any) -> tuple[float, float]:
        """Mean loss and accuracy on what was held out, of the averaged weights where there are."""
        model = self.net if self.ema is None else self.ema.module
        model.eval()
        sums = torch.zeros_like(self.window)
        for batch in data:
            x, y = (t.to(self.world.device, non_blocking=True) for t in batch)
            loss, count, correct = self.loss(model, x, y)
            # A batch of padding alone has no mean.
            sums += torch.stack((torch.where(count > 0, loss * count, 0.0), correct, count))
        return _means(self.world.sum(sums))

    def save(self, *names: str) -> None:
        content = checkpoint.gather(self)
        if self.world.first:
            content["config"] = dataclasses.asdict(self.config)
            for name in names:
                checkpoint.write(Path(self.config.out) / name, content)


def fit(config: Config, world: World, sets: Sets, content: dict[str, Any] | None) -> int:
    """Train from ``content`` or from the start. 0, or 1 where it came to infinity or NaN."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(config, world, sets, len(sets.train) // (config.batch_size or 1))
    if content is not None:
        checkpoint.restore(run, content)
    log = Log(
        out, run.step, run.steps, "bytes" if config.kind == "text" else "images", active=world.first
    )
    with contextlib.closing(log):
        _introduce(run, log, content)
        if content is not None:
            content.clear()  # whoever called holds it for as long as the run lasts
        return _loop(run, log)


def _loop(run: Run, log: Log) -> int:
    config, world, sets = run.config, run.world, run.sets
    order = Order(config, world, len(sets.train), run.step, run.steps)
    data = iter(batches(sets.train, order, config, world))
    held_out = batches(sets.validation, HeldOut(config, world, len(sets.validation)), config, world)
    clock = _Clock(run)
    while run.step < run.steps:
        run.train_step(data)
        log.bar.update()
        writes, validates, saves = (
            every is not None and (run.step % every == 0 or run.step == run.steps)
            for every in (
                config.log_every,
                config.validate_every or run.per_epoch,
                config.save_every,
            )
        )
        if (writes or validates or saves) and not run.healthy():
            log.say(
                f"train: stopped, the loss or its gradient is not finite at step {run.step}; "
                "--resume goes on from the last checkpoint"
            )
            return 1
        if writes:
            _write_window(run, log, clock)
        names = [checkpoint.LAST]
        with clock.stopped():
            if validates:
                loss, accuracy = run.validate(held_out)
                log.write(**_place(run, "val"), loss=loss, accuracy=accuracy)
                log.say(f"step {run.step}: held-out loss {loss:.4f}, accuracy {accuracy:.2%}")
                badness = loss if config.kind == "text" else -accuracy
                if badness < run.best:  # before the file that says how good it is
                    names.insert(0, checkpoint.BEST)
                run.best = min(run.best, badness)
            if validates or saves:
                run.save(*names)
    return 0


class _Clock:
    """Samples per second of training, without what happens while it is stopped."""

    def __init__(self, run: Run) -> None:
        self.run, self.step, self.since = run, run.step, time.perf_counter()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def per_second(self) -> float:
        now, config = time.perf_counter(), self.run.config
        samples = (self.run.step - self.step) * (config.batch_size or 0) * (config.context or 1)
        rate = samples / (now - self.since)
        self.step, self.since = self.run.step, now
        return rate


def _write_window(run: Run, log: Log, clock: _Clock) -> None:
    """One line for the steps since the last."""
    loss, accuracy = _means(run.world.sum(run.window))
    run.window.zero_()
    log.write(
        **_place(run, "train"), loss=loss, accuracy=accuracy,
        lr=run.optimizer.param_groups[0]["lr"],
        gradient_norm=distributed.full(run.norm).item(),
        per_second=clock.per_second(),
    )  # fmt: skip


def _place(run: Run, split: str) -> dict[str, Any]:
    return {"step": run.step, "epoch": run.step / run.per_epoch, "split": split}


def _means(sums: Tensor) -> tuple[float, float]:
    loss, correct, count = sums.tolist()
    return loss / count, correct / count


def _introduce(run: Run, log: Log, content: dict[str, Any] | None) -> None:
    config, world = run.config, run.world
    size = sum(p.numel() for p in run.net.parameters())
    log.say(
        f"{config.model}, {size / 1e6:.2f} M parameters; {len(run.sets.train)} samples, "
        f"{len(run.sets.validation)} held out; {run.steps} steps of {config.batch_size}; "
        f"{world.size} x {world.device.type}, {config.dtype}"
    )
    if run.report is not None:
        log.say(f"fuse: {run.report}")
    if content is not None:
        log.say(f"going on from step {run.step}")
        for line in checkpoint.differences(dataclasses.asdict(config), content["config"]):
            log.say(f"not as the run was begun: {line}")
