"""The candidates: the published form, what a skilled user makes of it, and ours.

eager          the published computation as it is
compile        that under torch.compile
sdpa           its attention through F.scaled_dot_product_attention(w, w, w)
sdpa-cudnn     the same by that one backend of SDPA
sdpa-flash
sdpa-looped    SDPA once for each length, of packed sequences (masks.py)
crate_kernels  ours; of a model: after fuse(model)
crate_kernels-low  a model after fuse(model, memory="low")
eager-narrow   no peer but the measure of a model's errors: the published form with its tokens in
               autocast's dtype between the steps too, where ours has them
NAME+compile   NAME under torch.compile
cublas         no peer but a yardstick for ISTA, not checked: bare GEMMs over the tokens, as many as
               ISTA cannot do without (1 forward, 2 backward)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..library import autocast_dtype
from ..models.crate import PreNorm, Transformer
from . import masks
from .workloads import Workload

OURS, YARDSTICK = "crate_kernels", "cublas"
LOW, NARROW = f"{OURS}-low", "eager-narrow"
LOOPED = "sdpa-looped"
STEP_SIZE, LAMBD = 0.1, 0.1

# The default candidates of each suite, on CUDA and on the CPU.
CANDIDATES = {
    "cuda": {
        "core": ("eager", "sdpa-cudnn", "sdpa-flash", OURS),
        "mssa": ("eager", "sdpa+compile", OURS),
        "ista": ("eager", "compile", YARDSTICK, OURS),
        "masks": ("eager", "sdpa", "sdpa+compile", "sdpa-looped", OURS),
        "model": ("eager", "sdpa+compile", OURS, LOW, f"{OURS}+compile"),
    },
    "cpu": {
        "core": ("eager", "sdpa", OURS),
        "mssa": ("eager", "sdpa", OURS),
        "ista": ("eager", OURS),
        "masks": ("eager", "sdpa", "sdpa-looped", OURS),
        "model": ("eager", "sdpa", OURS),
    },
}
NAMES = ("eager", NARROW, "sdpa", "sdpa-cudnn", "sdpa-flash", LOOPED, OURS, LOW, YARDSTICK)


class Unavailable(Exception):
    """A candidate cannot run here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """``build_layer(workload)`` gives a function of the op's tensors; ``build_model(workload,
    model)`` turns an unfused model (which it may change) into the module to call."""

    name: str
    build_layer: Callable[[Workload], Callable[..., Tensor]]
    build_model: Callable[[Workload, nn.Module], nn.Module]
    ours: bool = False


def candidate(name: str, backend: str = "auto", compile_backend: str = "inductor") -> Candidate:
    """By name; ``backend`` is that of our ops, ``compile_backend`` torch.compile's."""
    form = "eager" if name == "compile" else name.removesuffix("+compile")
    if name not in all_names():
        raise ValueError(f"bench: expected a peer among {all_names()}, got {name!r}")
    compiled = form != name

    def finish(target: Any) -> Any:
        if not compiled:
            return target
        return torch.compile(target, backend=compile_backend, dynamic=False)

    def build_layer(w: Workload) -> Callable[..., Tensor]:
        return finish(_layer(form, w, backend))

    def build_model(w: Workload, model: nn.Module) -> nn.Module:
        return finish(_model(form, w, model))

    return Candidate(name, build_layer, build_model, ours=form in (OURS, LOW))


def all_names() -> tuple[str, ...]:
    return (*NAMES, "compile", *(f"{name}+compile" for name in NAMES[1:-1]))


# ---- layers


def _layer(form: str, w: Workload, backend: str) -> Callable[..., Tensor]:
    if form in (LOW, NARROW):
        raise Unavailable(f"{form} is a form of whole models")
    if w.suite == "ista":
        return _ista(form, w, backend)
    if form == YARDSTICK:
        raise Unavailable("a yardstick for ISTA alone")
    if w.suite == "masks":
        return _masks(form, w, backend)
    if form == OURS:
        from ..mssa.op import mssa as fused_mssa
        from ..mssa.op import tied_attention

        op: Callable[..., Tensor] = tied_attention if w.suite == "core" else fused_mssa

        def ours(*tensors: Tensor) -> Tensor:
            return op(*tensors, heads=w.heads, causal=w.causal, backend=backend)

        return ours
    attention = published_attention if form == "eager" else _sdpa(form, w)
    if w.suite == "core":
        return lambda t: attention(t, w.heads, w.causal)

    def mssa(x: Tensor, w_qkv: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
        return F.linear(attention(F.linear(x, w_qkv), w.heads, w.causal), w_out, b_out)

    return mssa


def _masks(form: str, w: Workload, backend: str) -> Callable[..., Tensor]:
    """A function of the tokens and of what tells the lengths."""
    packed = w.sequences == "packed"
    if form == OURS:
        return masks.ours(w, backend)
    if form == "eager" and packed:
        return masks.looped(lambda t: published_attention(t, w.heads, w.causal), w)
    if form == "eager":
        return masks.masked(lambda t, seen: masks.published_masked(t, w.heads, seen), w)
    if form == "sdpa":
        return masks.masked(lambda t, seen: masks.sdpa_masked(t, w.heads, seen), w)
    if form == LOOPED and packed:
        return masks.looped(lambda t: sdpa_attention(t, w.heads, w.causal), w)
    raise Unavailable(f"{form} does not take {w.sequences} sequences")


def _ista(form: str, w: Workload, backend: str) -> Callable[..., Tensor]:
    if form == "eager":
        return published_ista
    if form == YARDSTICK:
        return bare_gemm
    if form != OURS:
        raise Unavailable("ISTA has no attention")
    from ..ista.op import ista

    return lambda x, weight: ista(x, weight, step_size=STEP_SIZE, lambd=LAMBD, backend=backend)


def published_attention(w: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Per head softmax(scale w w^T) w, the score matrix in memory, as the published code has it."""
    wh = w.unflatten(-1, (heads, -1)).transpose(1, 2)
    dots = torch.matmul(wh, wh.transpose(-1, -2)) * wh.shape[-1] ** -0.5
    if causal:
        future = torch.ones(dots.shape[-2:], dtype=torch.bool, device=w.device).triu(1)
        dots = dots.masked_fill(future, float("-inf"))
    return torch.matmul(dots.softmax(-1), wh).transpose(1, 2).flatten(2)


def published_ista(x: Tensor, weight: Tensor) -> Tensor:
    """The published three products, one gradient step and the threshold."""
    coded = F.linear(x, weight)
    descent = F.linear(x, weight.t()) - F.linear(coded, weight.t())
    return F.relu(x + (STEP_SIZE * descent - STEP_SIZE * LAMBD))


def bare_gemm(x: Tensor, weight: Tensor) -> Tensor:
    """x W; autograd makes dy W^T and x^T dy of it: ISTA's products over the tokens."""
    if not x.is_cuda:
        raise Unavailable(f"{YARDSTICK} runs on CUDA devices")
    return torch.matmul(x, weight)


def _sdpa(form: str, w: Workload) -> Callable[..., Tensor]:
    """SDPA on one tensor as query, key and value: autograd adds the three gradients."""
    named = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
    if form == "sdpa":
        return sdpa_attention
    if form == LOOPED:
        raise Unavailable(f"{form} takes sequences of several lengths")

    def attention(t: Tensor, heads: int, causal: bool = False) -> Tensor:
        if not t.is_cuda:
            raise Unavailable(f"{form} runs on CUDA devices")
        with sdpa_kernel(named[form]):
            return sdpa_attention(t, heads, causal)

    return attention


def sdpa_attention(w: Tensor, heads: int, causal: bool = False) -> Tensor:
    wh = w.unflatten(-1, (heads, -1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(wh, wh, wh, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


# ---- models


def _model(form: str, w: Workload, model: nn.Module) -> nn.Module:
    if form in (OURS, LOW):
        from ..nn import fuse

        report = fuse(model, memory="low" if form == LOW else "default")
        if not report.replaced:
            raise RuntimeError(f"fuse replaced nothing: {report}")
    elif form == YARDSTICK:
        raise Unavailable("a yardstick for ISTA alone")
    elif form == NARROW:
        _keep_narrow(model)
    elif form != "eager":
        attention = _sdpa(form, w)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if all(hasattr(child, key) for key in ("qkv", "attend", "to_out", "heads")):
                    setattr(parent, name, SDPAAttention(child, attention))
    return model


def _keep_narrow(model: nn.Module) -> None:
    """What enters the encoder, and each norm and step of it returns, in autocast's dtype."""

    def narrow(t: Tensor) -> Tensor:
        return t.to(autocast_dtype(t))

    for module in model.modules():
        if isinstance(module, Transformer):
            module.register_forward_pre_hook(lambda _, args: (narrow(args[0]),))
        if isinstance(module, PreNorm):
            for step in (module, module.norm):
                step.register_forward_hook(lambda _, args, out: narrow(out))


class SDPAAttention(nn.Module):
    """A published attention module, its core replaced by ``attention``; the same parameters."""

    def __init__(self, published: Any, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.to_out = published.qkv, published.to_out
        self.heads, self.attention = published.heads, attention

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.attention(self.qkv(x), self.heads))


def build_unfused(w: Workload, device: torch.device) -> nn.Module:
    """The published model, on ``device``, in float32, freshly initialised."""
    from .. import models

    return getattr(models, w.model)().to(device)
