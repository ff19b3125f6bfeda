"""Images for a classifier as validation takes them, and a picture of attention over one."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import refuse
from ..train.data import MEAN, STD
from .report import new_figure

MARGIN = 0.875  # of the shorter side that validation keeps


def load(path: Path, size: int, channels: int) -> tuple[Tensor, Tensor]:
    """An image as the model takes it, (channels, size, size), and as one sees it, in [0, 1].

    One of size x size stays as it is. Colours: the shorter side becomes size / 0.875, then the
    centre is cut out, and channels are normed by ImageNet's means. Grey: the shorter side becomes
    size, values stay in [0, 1], as with the digits.

    Raises:
        ValueError: a file that cannot be read as an image; channels other than 1 and 3.
    """
    from PIL import Image

    if channels not in (1, 3):
        refuse("inspect", "a model of 1 or 3 channels", channels)
    try:
        with Image.open(path) as file:
            image = file.convert("RGB" if channels == 3 else "L")
    except OSError as error:  # which Pillow raises for what is no image, too
        raise ValueError(f"inspect: expected an image, got {path} ({error})") from error
    if image.size != (size, size):
        image = _fit(image, size, round(size / MARGIN) if channels == 3 else size)
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    shown = data.view(size, size, channels).permute(2, 0, 1) / 255
    if channels == 1:
        return shown, shown
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (shown - mean) / std, shown


def _fit(image: Any, size: int, shorter: int) -> Any:
    """The shorter side scaled to ``shorter`` (bilinear, antialiased), the centre cut out."""
    from PIL import Image

    scale = shorter / min(image.size)
    wide, high = (shorter if s == min(image.size) else int(scale * s) for s in image.size)
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return image.crop((left, top, left + size, top + size))


def plot_attention(
    shown: Tensor, rows: Tensor, title: str, path: str | os.PathLike[str], columns: int = 4
) -> None:
    """The image (C, S, S), and over it what the class token of each head looks at.

    rows (H, 1 + n*n): attention from the class token to all tokens, itself first. Each map is
    scaled to its own largest value.
    """
    side = math.isqrt(rows.shape[-1] - 1)
    maps = rows[:, 1:].view(len(rows), 1, side, side)
    maps = F.interpolate(maps, shown.shape[-1], mode="bilinear")[:, 0]
    figure = new_figure(columns, -(-(len(rows) + 1) // columns), size=2.4)
    figure.suptitle(title)
    picture = shown.permute(1, 2, 0).squeeze(-1).numpy()
    for ax in figure.axes:
        ax.axis("off")
    for i, ax in enumerate(figure.axes[: len(rows) + 1]):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        ax.set_title("image" if i == 0 else f"head {i - 1}")
        if i > 0:
            ax.imshow(maps[i - 1].numpy(), cmap="inferno", alpha=0.6)
    figure.savefig(path, dpi=150)
