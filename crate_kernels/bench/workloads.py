"""What is measured: workloads as data, and the named sets of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

OPS = ("core", "mssa", "ista", "masks", "decode")
SUITES = (*OPS, "model", "latency", "scaling", "alpha", "family")
MODES = ("forward", "backward", "forward+backward", "train")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModelShape:
    width: int
    depth: int
    heads: int
    parameters: int
    batch: int  # of one measured step on a large GPU
    overcomplete: bool = False  # CRATE-alpha
    patch: int = 16
    decoder: int = 0  # layers of CRATE-MAE's
    context: int = 0  # of text
    vocabulary: int = 0

    @property
    def tokens(self) -> int:
        """Of a text; or patches of an image and the class token."""
        return self.context or (PIXELS // self.patch) ** 2 + 1


PIXELS, TOKENS, CLASSES = 224, 197, 1000
MODELS = {
    "crate_tiny": ModelShape(384, 12, 6, 6_090_000, 512),
    "crate_small": ModelShape(576, 12, 12, 13_120_000, 256),
    "crate_base": ModelShape(768, 12, 12, 22_800_000, 256),
    "crate_large": ModelShape(1024, 24, 16, 77_640_000, 128),
    "crate_base_patch8": ModelShape(768, 12, 12, 22_800_000, 64, patch=8),
    "crate_alpha_tiny": ModelShape(192, 12, 3, 4_810_000, 512, True),
    "crate_alpha_small": ModelShape(576, 12, 12, 40_980_000, 128, True),
    "crate_alpha_base": ModelShape(768, 12, 12, 72_330_000, 128, True),
    "crate_mae_base": ModelShape(768, 12, 12, 44_640_000, 256, decoder=12),
    "crate_gpt": ModelShape(768, 12, 12, 60_700_000, 16, context=1024, vocabulary=50304),
    "crate_bert": ModelShape(768, 12, 12, 60_910_000, 64, context=512, vocabulary=50265),
}
RATIO = 4  # columns of an overcomplete dictionary over its rows
ENCODER_DEPTH = 2


@dataclass(frozen=True)
class Workload:
    """One row group of the tables: an op or model, a shape, a dtype and what is timed.

    suite    core: tied_attention on w (batch, tokens, heads*head_dim); mssa, ista and overcomplete:
             the layers without norm and residual on x (batch, tokens, width); decode: one new
             token of each item, the last of ``tokens``, with a cache; masks: core on sequences of
             several lengths; model: a whole one (of text a batch of sequences); encoder:
             ENCODER_DEPTH layers of one on x, in the scaling suite.
    sequences  of masks: padded or packed (masks.py).
    mode     forward (no gradient wanted), backward (alone: every gradient from that of the
             output), forward+backward, train (model: forward, backward, fused AdamW).
    dtype    of every tensor; with autocast, tensors are float32 and dtype is autocast's. Models
             in bf16 and fp16 always run under autocast.
    versus   the peer that the speedup is against; empty: the fastest of those that pass.
    target   the speedup aimed at on an NVIDIA H200 (on any machine if device is "cpu").
    most     the time aimed at there, at most, over that of the bare GEMMs (peers.py).
    captured a model's step goes into a CUDA graph, which for the peers is what torch.compile's
             mode="reduce-overhead" does.
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
    captured: bool = False

    @property
    def label(self) -> str:
        parts = [self.shape, self.dtype]
        parts += ["autocast"] * (self.autocast and self.suite != "model")
        parts += ["captured"] * self.captured
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
            "overcomplete": (self.batch, self.tokens, self.width, RATIO * self.width),
            "decode": (self.batch, self.tokens, self.heads, self.head_dim),
            "encoder": (self.batch, self.tokens, self.width, self.heads, self.head_dim),
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


def both(name: str, train: float, forward: float) -> tuple[Workload, ...]:
    """A training step and an inference of a model, with their targets."""
    return model(name, "train", target=train), model(name, "forward", target=forward)


def alpha(name: str, batch: int, modes: dict[str, float], **kw: Any) -> tuple[Workload, ...]:
    """The overcomplete ISTA of a CRATE-alpha, and the model, with a target for each mode of it."""
    shape = Workload("overcomplete", "forward", batch, width=MODELS[name].width, **kw)
    return (
        shape,
        replace(shape, mode="forward+backward"),
        *(model(name, mode, batch, target=target or None, **kw) for mode, target in modes.items()),
    )


def encoder(batch: int, tokens: int, width: int, **kw: Any) -> Workload:
    """A forward and a backward pass of a few layers, heads of 64."""
    options: dict[str, Any] = {"heads": width // 64, "autocast": True, **kw}
    return Workload("encoder", "forward+backward", batch, tokens, width=width, **options)


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
    "decode": (
        Workload("decode", "forward", 64, 4096, target=1.8),
        Workload("decode", "forward", 64, 1024),
        Workload("decode", "forward", 1, 4096),
        Workload("decode", "forward", 8, 16384),
        Workload("decode", "forward", 64, 4096, heads=6, head_dim=128),
    ),
    "masks": (*masks(64, 512, 12, "padded"), *masks(64, 197, 6, "packed")),
    "model": (
        *both("crate_base", 2.0, 1.8),
        *both("crate_large", 2.0, 1.8),
        *both("crate_small", 2.0, 1.8),
        *both("crate_tiny", 1.8, 1.6),
        *both("crate_base_patch8", 1.8, 1.6),
    ),
    "latency": (
        model("crate_base", "forward", 1, target=2.0, captured=True),
        model("crate_large", "forward", 1, captured=True),
    ),
    # About 25,000 tokens each, first over their number in an item, then over the width.
    "scaling": (
        *(encoder(b, n, 768) for b, n in ((512, 50), (128, 197), (32, 785), (12, 2048), (6, 4096))),
        *(encoder(128, 197, width) for width in (384, 576, 1024, 1536, 2048)),
    ),
    "alpha": alpha("crate_alpha_base", 128, {"train": 1.4, "forward": 1.3}),
    "family": (
        model("crate_mae_base", "train", target=1.8),
        model("crate_gpt", "train", target=1.7),
        model("crate_bert", "train", target=1.7),
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
    "decode": (Workload("decode", "forward", 4, 1024, 6, dtype="fp32"),),
    "masks": masks(8, 197, 6, "padded", dtype="fp32"),
    "model": tuple(
        model("crate_tiny", mode, 8, dtype="fp32", versus="eager", target=1.5)
        for mode in ("forward", "train")
    ),
    "latency": (model("crate_tiny", "forward", 1, dtype="fp32"),),
    "scaling": tuple(
        encoder(b, n, 384, dtype="fp32", autocast=False) for b, n in ((32, 50), (8, 197), (2, 785))
    ),
    "alpha": alpha("crate_alpha_tiny", 8, {"train": 0, "forward": 0}, dtype="fp32"),
    "family": (model("crate_mae_base", "train", 4, dtype="fp32"),),
}

QUICK_CUDA: Set = {
    "core": H200["core"][:4],
    "mssa": H200["mssa"][1:],
    "ista": H200["ista"],
    "decode": H200["decode"][:1],
    "masks": H200["masks"],
    "model": (model("crate_tiny", "train", 64),),
    "latency": H200["latency"][:1],
    "scaling": H200["scaling"][:2],
    "alpha": alpha("crate_alpha_base", 128, {})[1:],
    "family": (model("crate_gpt", "train", 4),),
}
QUICK_CPU: Set = {
    "core": core(2, 50, 3, 0, 0, dtype="fp32"),
    "mssa": (Workload("mssa", "forward+backward", 2, 50, 3, width=192, dtype="fp32"),),
    "ista": (Workload("ista", "forward+backward", 2, width=192, dtype="fp32"),),
    "decode": (Workload("decode", "forward", 2, 100, 3, dtype="fp32"),),
    "masks": (*masks(2, 50, 3, "padded", dtype="fp32"), *masks(1, 50, 3, "packed", dtype="fp32")),
    "model": (model("crate_tiny", "forward", 2, dtype="fp32", versus="eager"),),
    "latency": (model("crate_tiny", "forward", 1, dtype="fp32"),),
    "scaling": tuple(encoder(2, n, 64, dtype="fp32", autocast=False) for n in (20, 50)),
    "alpha": alpha("crate_alpha_tiny", 2, {}, dtype="fp32")[1:],
    "family": (model("crate_mae_base", "forward", 1, dtype="fp32"),),
}


def named_set(device_type: str, quick: bool) -> Set:
    if device_type == "cuda":
        return QUICK_CUDA if quick else H200
    return QUICK_CPU if quick else CPU
