"""``python -m crate_kernels inspect``: the measures of a checkpoint on images, and its attention.

Writes ``layers.csv``, ``layers.png`` and, for each image, ``attention-<name>.png``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..checks import refuse
from ..models.checkpoint import plain_state
from ..nn import fuse
from . import images
from .tracing import Trace, trace

MODELS = ("crate_tiny", "crate_small", "crate_base", "crate_large")
NEEDS = {"matplotlib": "matplotlib", "PIL": "Pillow"}


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, help="of the published CRATE classifiers, or of train")
    add("images", type=Path, nargs="+", metavar="IMAGE", help="what Pillow reads")
    add("--model", choices=MODELS,
        help="default: what train wrote down, else the published model of that width and depth")
    add("--heads", type=int, help="of a model of another size")
    add("--ema", action="store_true", help="the averaged weights of a checkpoint of train")
    add("--layer", type=int, default=None,
        help="whose attention is drawn; negative from the end (the last but one)")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    add("--out", type=Path, default=Path("inspect_output"), help="folder for the files")
# fmt: on


def main(args: argparse.Namespace) -> int:
    """0, or 2 for files and options that do not suit."""
    missing = [package for module, package in NEEDS.items() if not _installed(module)]
    if missing:
        print(
            f"inspect: needs {', '.join(missing)}; pip install {' '.join(missing)} "
            "(or install crate_kernels[inspect])",
            file=sys.stderr,
        )
        return 2
    try:
        return _inspect(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def _inspect(args: argparse.Namespace) -> int:
    model = load_model(args.checkpoint, args.model, args.heads, ema=args.ema)
    depth = model.transformer.depth
    layer = max(depth - 2, 0) if args.layer is None else args.layer
    loaded = [images.load(path, *_input(model)) for path in args.images]
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        refuse("inspect", "a CUDA device for --device cuda", "none")
    model.to(device).eval()
    fuse(model)
    found = trace(model, coherence=True, attention={"layers": [layer]})
    args.out.mkdir(parents=True, exist_ok=True)

    with torch.no_grad(), found, _progress(loaded) as several:
        for x, _ in several:
            model(x[None].to(device))
    print(found.table())
    for path in _write(found, args, layer, [shown for _, shown in loaded]):
        print(f"wrote {path}")
    return 0


def _write(
    found: Trace, args: argparse.Namespace, layer: int, shown: list[torch.Tensor]
) -> Iterator[Path]:
    found.write_csv(args.out / "layers.csv")
    yield args.out / "layers.csv"
    found.plot(args.out / "layers.png")
    yield args.out / "layers.png"
    rows = found.attention(layer)[:, :, 0]  # [images, heads, N]
    for path, picture, row in zip(_names(args.images), shown, rows, strict=True):
        title = f"attention of the class token, layer {layer % len(found.layers)}"
        images.plot_attention(picture, row, title, args.out / path)
        yield args.out / path


def _names(paths: Sequence[Path]) -> list[str]:
    """A file name for each image; those of one name are counted."""
    stems = [path.stem for path in paths]
    return [
        f"attention-{stem}{'' if stems.count(stem) == 1 else f'-{i}'}.png"
        for i, stem in enumerate(stems)
    ]


# ---- the model of a checkpoint


def _input(model: models.CRATE) -> tuple[int, int]:
    """Side and channels of its images."""
    patches: Any = model.to_patch_embedding[0]
    linear: Any = model.to_patch_embedding[2]
    side = math.isqrt(model.pos_embedding.shape[1] - 1)
    return side * patches.height, linear.in_features // (patches.height * patches.width)


def load_model(
    path: Path, name: str | None = None, heads: int | None = None, *, ema: bool = False
) -> models.CRATE:
    """The CRATE classifier whose weights are in ``path``, on the CPU; sized by their shapes.

    Raises:
        ValueError: a file that cannot be read, of no such model, or not of the one called ``name``.
    """
    content, config = _read(path)
    try:
        if config is not None and config["model"] not in MODELS:
            refuse("inspect", f"one of {MODELS}", config["model"])
        if ema:
            content = content.get("ema") if isinstance(content, Mapping) else None
            if not isinstance(content, Mapping):
                refuse("inspect", "a checkpoint with averaged weights for --ema", "one without")
        state = plain_state(content)
        size = _size(state)
        size["heads"] = _heads(size, name, config) if heads is None else heads
        inner = state[_QKV].shape[0]
        if size["heads"] < 1 or inner % size["heads"] != 0:
            refuse("inspect", f"heads that divide the projected width {inner}", size["heads"])
        model = models.CRATE(dim_head=inner // size["heads"], **size)
        return models.load_checkpoint(model, content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"inspect: {path}: {str(error).removeprefix('inspect: ')}") from error


_QKV, _PATCH = "transformer.layers.0.0.fn.qkv.weight", "to_patch_embedding.2.weight"
_HEAD, _POSITIONS = "mlp_head.1.weight", "pos_embedding"


def _read(path: Path) -> tuple[Any, Mapping[str, Any] | None]:
    """What is in the file, and the options of train where it wrote them down."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"inspect: {path}: {error.strerror or error}") from error
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise ValueError(
            f"inspect: expected a checkpoint of torch.save with nothing but tensors and plain "
            f"values, got {path} ({type(error).__name__})"
        ) from error
    config = content.get("config") if isinstance(content, Mapping) else None
    return content, config if isinstance(config, Mapping) and "model" in config else None


def _size(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of CRATE but for the heads, from the shapes of its weights."""
    for key in (_QKV, _PATCH, _HEAD, _POSITIONS):
        if not isinstance(state.get(key), torch.Tensor):
            refuse("inspect", f"the weights of a CRATE image classifier, with {key}", "none")
    layers = {key.split(".")[2] for key in state if key.startswith("transformer.layers.")}
    patches = state[_POSITIONS].shape[1] - 1
    dim, width = state[_PATCH].shape
    side = math.isqrt(patches)
    if side * side != patches or patches == 0:
        refuse("inspect", "positions of a square image", f"{patches} patches")
    for channels in (3, 1):  # of one width at most one is a patch of whole pixels
        patch = math.isqrt(width // channels)
        if channels * patch * patch == width:
            return {
                "image_size": side * patch, "patch_size": patch, "channels": channels,
                "num_classes": state[_HEAD].shape[0], "dim": dim, "depth": len(layers),
            }  # fmt: skip
    refuse("inspect", "square patches of 3 channels or 1", f"{width} values a patch")


def _heads(size: dict[str, Any], name: str | None, config: Mapping[str, Any] | None) -> int:
    """Which no shape tells: of the options of train, or of the published model."""
    if config is not None and name in (None, config["model"]):
        return config.get("heads") or _published(config["model"])[2]
    shape = (size["dim"], size["depth"])
    if name is not None:
        *wanted, heads = _published(name)
        if shape != tuple(wanted):
            refuse(
                "inspect",
                f"a {name}, width {wanted[0]} and depth {wanted[1]}",
                f"width {shape[0]} and depth {shape[1]}",
            )
        return heads
    for known in MODELS:
        *wanted, heads = _published(known)
        if shape == tuple(wanted):
            return heads
    refuse(
        "inspect",
        "--heads for a model of a size that was not published",
        f"none for width {shape[0]} and depth {shape[1]}",
    )


def _published(name: str) -> tuple[int, int, int]:
    """Width, depth and heads."""
    transformer = getattr(models, name)(device="meta").transformer
    return transformer.dim, transformer.depth, transformer.heads


# ----


@contextlib.contextmanager
def _progress(several: Sequence[Any]) -> Iterator[Any]:
    """A bar on the terminal's stderr for more than one image, if tqdm is there."""
    if len(several) == 1 or not _installed("tqdm"):
        yield several
        return
    from tqdm import tqdm

    with tqdm(several, unit="image", dynamic_ncols=True, disable=None, leave=False) as bar:
        yield bar


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
