"""Images from folders, scikit-learn's digits, bytes of text; and the order they come in.

A sample, with its augmentation, is a function of (seed, epoch, index); the samples of a step are
one of (seed, step). So neither the number of processes nor a restart changes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..checks import refuse
from ..demo import digits, shifted
from ..models.gpt import IGNORED
from .config import Config
from .distributed import World

TEXTS = (".txt", ".py")
HELD_OUT = 0.1  # of a text, from its end
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels

Sample = tuple[Tensor, Any]


def seed_of(*parts: Any) -> int:
    """A seed of 63 bits for these parts, which have to be plain numbers and strings."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Samples(Dataset[Sample]):
    """``sample(index, epoch)`` with torch's generator seeded for it; index -1 is padding."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: before CUDA is set up it remembers every call, with its stack.
            torch.default_generator.manual_seed(seed_of(self.seed, "sample", epoch, index))
            x, y = self.sample(max(index, 0), epoch)
        y = torch.as_tensor(y)
        return x, torch.full_like(y, IGNORED) if index < 0 else y

    def sample(self, index: int, epoch: int) -> Sample:
        raise NotImplementedError


class Digits(Samples):
    def __init__(self, images: Tensor, labels: Tensor, seed: int, *, moved: bool) -> None:
        super().__init__(len(labels), seed)
        self.images, self.labels, self.moved = images, labels, moved

    def sample(self, index: int, epoch: int) -> Sample:
        image = self.images[index : index + 1]
        return (shifted(image) if self.moved else image)[0], self.labels[index]


class Images(Samples):
    """A torchvision ImageFolder, with its transforms."""

    def __init__(self, folder: Any, seed: int) -> None:
        super().__init__(len(folder), seed)
        self.folder = folder

    def sample(self, index: int, epoch: int) -> Sample:
        return self.folder[index]


class Text(Samples):
    """Windows of ``length`` bytes and the bytes after each.

    With ``moved`` there is one window fewer: each epoch begins somewhere in the first.
    """

    def __init__(self, text: Tensor, length: int, seed: int, *, moved: bool) -> None:
        super().__init__((len(text) - 1) // length - moved, seed)
        self.text, self.length, self.moved = text, length, moved

    def sample(self, index: int, epoch: int) -> Sample:
        begin = seed_of(self.seed, "begin", epoch) % self.length if self.moved else 0
        start = begin + index * self.length
        window = self.text[start : start + self.length + 1].long()
        return window[:-1], window[1:]


@dataclass(frozen=True)
class Sets:
    """What to train and validate on, and the arguments of the model that follow from it."""

    train: Samples
    validation: Samples
    model: dict[str, int]


def load(config: Config) -> Sets:
    """Raises ValueError for files that are not there or do not suit."""
    sets = {"digits": _digits, "folder": _folder, "text": _text}[config.kind](config)
    if len(sets.train) < (config.batch_size or 0):
        refuse(
            "train",
            f"at least --batch-size {config.batch_size} training samples in {config.data}",
            len(sets.train),
        )
    return sets


def _digits(config: Config) -> Sets:
    size = config.image_size
    train, held_out = (
        (F.interpolate(images, size, mode="bilinear"), labels)
        for images, labels in digits(0, torch.device("cpu"))
    )
    return Sets(
        Digits(*train, config.seed, moved=True),
        Digits(*held_out, config.seed, moved=False),
        {"num_classes": 10, "channels": 1},
    )


def _folder(config: Config) -> Sets:
    """As ImageNet: random crops and flips for training, the centre of the image for validation."""
    root, size = Path(config.data), config.image_size or 0
    classes = {}
    for part in ("train", "val"):
        if not (root / part).is_dir():
            got = "no such folder" if not root.is_dir() else f"one without {part}/"
            refuse("train", f"--data {root} to be 'digits' or a folder with train/ and val/", got)
        classes[part] = sorted(p.name for p in (root / part).iterdir() if p.is_dir())
    if not classes["train"]:
        refuse("train", f"a folder for each class in {root / 'train'}", "none")
    if classes["train"] != classes["val"]:
        odd = sorted(set(classes["train"]) ^ set(classes["val"]))
        refuse("train", f"the same classes in train/ and val/ of {root}", f"only in one: {odd[:5]}")

    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
    except RuntimeError as error:  # how torchvision says that it was built for another torch
        raise ValueError(
            f"train: needs the torchvision that goes with torch {torch.__version__}; the one here "
            f"fails with: {error}"
        ) from error

    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    first = {
        "train": [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()],
        "val": [v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size)],
    }
    found = {}
    for part, steps in first.items():
        try:
            images = ImageFolder(str(root / part), v2.Compose([v2.ToImage(), *steps, *last]))
        except FileNotFoundError as error:
            raise ValueError(f"train: {error}") from error
        found[part] = Images(images, config.seed)
    return Sets(found["train"], found["val"], {"num_classes": len(classes["train"]), "channels": 3})


def _text(config: Config) -> Sets:
    """Bytes; the last tenth is held out."""
    root, length = Path(config.data), config.context or 0
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in TEXTS)
    if not files:
        got = "a folder without any" if root.is_dir() else "no such file"
        refuse("train", f"--data {root} to be a text, or a folder of {' and '.join(TEXTS)}", got)
    text = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    split = len(text) - int(HELD_OUT * len(text))
    train = Text(text[:split], length, config.seed, moved=True)
    held_out = Text(text[split:], length, config.seed, moved=False)
    if len(train) < 1 or len(held_out) < 1:
        refuse("train", f"a text of more than {round(length / HELD_OUT)} bytes", len(text))
    return Sets(train, held_out, {"vocab_size": 256, "context": length})


class Order:
    """The keys of this process's batches, from step ``start`` on; remainders are left out.

    Each step takes the next batch_size places of its epoch's permutation, split evenly over
    --accumulate, then over processes.
    """

    def __init__(self, config: Config, world: World, size: int, start: int, steps: int) -> None:
        self.config, self.world, self.size = config, world, size
        self.start, self.steps = start, steps

    def __len__(self) -> int:
        return (self.steps - self.start) * self.config.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, seed = self.config.batch_size or 1, self.config.seed
        of_epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.steps):
            epoch, place = divmod(step, self.size // batch)
            if epoch != of_epoch:
                generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
                of_epoch, order = epoch, torch.randperm(self.size, generator=generator)
            places = order[place * batch : (place + 1) * batch]
            for part in places.view(self.config.accumulate, self.world.size, -1):
                yield [(epoch, i) for i in part[self.world.rank].tolist()]


class HeldOut:
    """The keys of this process's share of a validation; as many batches in every process."""

    def __init__(self, config: Config, world: World, size: int) -> None:
        self.batch = (config.batch_size or 1) // world.size // config.accumulate
        self.world, self.size = world, size

    def __len__(self) -> int:
        return -(-self.size // (self.batch * self.world.size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for place in range(len(self)):
            first = (place * self.world.size + self.world.rank) * self.batch
            yield [(0, i if i < self.size else -1) for i in range(first, first + self.batch)]


def batches(samples: Samples, keys: Any, config: Config, world: World) -> DataLoader[Sample]:
    workers = config.workers if config.kind == "folder" else 0
    return DataLoader(
        samples,
        batch_sampler=keys,
        num_workers=workers,
        persistent_workers=workers > 0 and isinstance(keys, HeldOut),
        pin_memory=world.device.type == "cuda",
    )
