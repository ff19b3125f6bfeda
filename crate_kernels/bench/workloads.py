"""What is measured: workloads as data, and the named sets of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

SUITES = ("core", "mssa", "ista", "masks", "model")
MODES = ("forward", "backward", "forward+backward", "train")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModelShape:
    width: int
    depth: int
    heads: int
    parameters: int
    batch: int  # of one measured step on a large GPU


# 224 pixels, patch 16: 196 patches and the class token.
TOKENS, PATCH_WIDTH, CLASSES = 197, 16 * 16 * 3, 1000
MODELS = {
    "crate_tiny": ModelShape(384, 12, 6, 6_090_000, 512),
    "crate_small": ModelShape(576, 12, 12, 13_120_000, 256),
    "crate_base": ModelShape(768, 12, 12, 22_800_000, 256),
    "crate_large": ModelShape(1024, 24, 16, 77_640_000, 128),
}


@dataclass(frozen=True)
class Workload:
    """One row group of the tables: an op or model, a shape, a dtype and what is timed.

    suite    core: tied_attention on w (batch, tokens, heads*head_dim); mssa and ista: the layers
             without norm and residual on x (batch, tokens, width); masks: core on sequences of
             several lengths; model: a whole CRATE.
    sequences  of masks: padded or packed (masks.py).
    mode     forward (no gradient wanted), backward (alone: every gradient from that of the
             output), forward+backward, train (model: forward, backward, fused AdamW).
    dtype    of every tensor; with autocast, tensors are float32 and dtype is autocast's. Models
             in bf16 and fp16 always run under autocast.
    versus   the peer that the speedup is against; empty: the fastest of those that pass.
    target   the speedup aimed at on an NVIDIA H200 (on any machine if device is "cpu").
    most     the time aimed at there, at most, over that of the bare GEMMs (peers.py).
    """

    suite: str
    mode: str
    batch: int
    tokens: int = TOKENS
    heads: int = 12
    head_dim: int = 64
    width: int = 768
    causal: bool = False
    sequences: str = ""
    dtype: str = "bf16"
    autocast: bool = False
    model: str = ""
    versus: str = ""
    target: float | None = None
    most: float | None = None

    @property
    def label(self) -> str:
        parts = [self.shape, self.dtype]
        parts += ["autocast"] * (self.autocast and self.suite != "model")
        parts += ["causal"] * (self.causal and self.suite in ("core", "mssa", "masks"))
        return " ".join([*parts, self.mode])

    @property
    def shape(self) -> str:
        if self.suite == "model":
            return f"{self.model} {self.batch}"
        sizes = {
            "core": (self.batch, self.tokens, self.heads, self.head_dim),
            "mssa": (self.batch, self.tokens, self.width, self.heads, self.head_dim),
            "ista": (self.batch, self.tokens, self.width),
            "masks": (self.batch, self.tokens, self.heads, self.head_dim),
        }[self.suite]
        shape = "x".join(str(size) for size in sizes)
        return f"{shape} {self.sequences}" if self.sequences else shape

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype the tensors (of a model: the parameters) are kept in."""
        return torch.float32 if self.autocast or self.suite == "model" else self.torch_dtype


def core(
    batch: int, tokens: int, heads: int, forward: float, backward: float, **kw: Any
) -> tuple[Workload, ...]:
    """Forward and backward of one core shape, with their targets."""
    shape = Workload("core", "forward", batch, tokens, heads, **kw)
    return (
        replace(shape, target=forward or None),
        replace(shape, mode="backward", target=backward or None),
    )


def masks(batch: int, tokens: int, heads: int, sequences: str, **kw: Any) -> tuple[Workload, ...]:
    """Forward and backward of sequences of several lengths."""
    shape = Workload("masks", "forward", batch, tokens, heads, sequences=sequences, **kw)
    return shape, replace(shape, mode="backward")


def model(name: str, mode: str, batch: int = 0, **kw: Any) -> Workload:
    """A whole model; batch 0 takes the model's own."""
    return Workload("model", mode, batch or MODELS[name].batch, model=name, **kw)


Set = dict[str, tuple[Workload, ...]]

# What a CUDA device is measured on; the targets are an H200's.
H200: Set = {
    "core": (
        *core(128, 197, 12, 1.7, 2.6),
        *core(512, 50, 12, 3.0, 4.5),
        *core(64, 512, 12, 1.2, 1.8),
        *core(32, 785, 12, 1.4, 1.8),
        *core(8, 4096, 16, 1.08, 1.3),
        *core(16, 1024, 12, 1.2, 1.6, causal=True),
        *core(256, 197, 12, 0, 0, head_dim=48),
    ),
    "mssa": (
        Workload("mssa", "forward", 128, target=1.25),
        Workload("mssa", "forward+backward", 128, target=1.6),
    ),
    "ista": (
        Workload("ista", "forward", 128, target=2.2, most=1.15),
        Workload("ista", "forward+backward", 128, target=2.3, most=1.2),
    ),
    "masks": (*masks(64, 512, 12, "padded"), *masks(64, 197, 6, "packed")),
    "model": (
        model("crate_base", "train", target=2.0),
        model("crate_base", "forward", target=1.8),
        model("crate_large", "train", target=2.0),
        model("crate_small", "train", target=2.0),
        model("crate_tiny", "train", target=1.8),
    ),
}

CPU: Set = {
    "core": core(8, 197, 6, 0, 0, dtype="fp32"),
    "mssa": tuple(
        Workload("mssa", mode, 8, heads=6, width=384, dtype="fp32")
        for mode in ("forward", "forward+backward")
    ),
    "ista": tuple(
        Workload("ista", mode, 8, width=384, dtype="fp32")
        for mode in ("forward", "forward+backward")
    ),
    "masks": masks(8, 197, 6, "padded", dtype="fp32"),
    "model": tuple(
        model("crate_tiny", mode, 8, dtype="fp32", versus="eager", target=1.5)
        for mode in ("forward", "train")
    ),
}

QUICK_CUDA: Set = {
    "core": H200["core"][:4],
    "mssa": H200["mssa"][1:],
    "ista": H200["ista"],
    "masks": H200["masks"],
    "model": (model("crate_tiny", "train", 64),),
}
QUICK_CPU: Set = {
    "core": core(2, 50, 3, 0, 0, dtype="fp32"),
    "mssa": (Workload("mssa", "forward+backward", 2, 50, 3, width=192, dtype="fp32"),),
    "ista": (Workload("ista", "forward+backward", 2, width=192, dtype="fp32"),),
    "masks": (*masks(2, 50, 3, "padded", dtype="fp32"), *masks(1, 50, 3, "packed", dtype="fp32")),
    "model": (model("crate_tiny", "forward", 2, dtype="fp32", versus="eager"),),
}


def named_set(device_type: str, quick: bool) -> Set:
    if device_type == "cuda":
        return QUICK_CUDA if quick else H200
    return QUICK_CPU if quick else CPU
