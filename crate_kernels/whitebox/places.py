"""Where the tokens of a model can be seen without leaving the fused path.

An Encoder runs a layer as one op, and would run it module by module for a hook inside it: it calls
an observer instead, and so do AlphaEncoder and Decoder. Layers outside are seen by a hook before
MSSA and one after ISTA, on these modules themselves, which neither MSSA nor ISTA takes as a reason
to run unfused.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.gpt import CausalMSSA
from ..nn.decoder import Decoder
from ..nn.encoder import Encoder, Layers
from ..nn.fusion import Layer
from ..nn.layers import (
    ISTA,
    MSSA,
    Attention,
    FeedForward,
    OvercompleteFeedForward,
    OvercompleteISTA,
)
from ..nn.recognition import Verdicts, looks_like, reason_against


@dataclass
class Place:
    """One layer: its two steps, as far as there are. ``index`` is its place in an encoder."""

    name: str
    attention: nn.Module | None
    dictionary: nn.Module | None = None
    encoder: Layers | None = None
    index: int = 0

    @property
    def heads(self) -> int:
        return getattr(self.attention, "heads", 0)

    @property
    def subspaces(self) -> Tensor | None:
        """(H, p, D), the projection of each head; None where no weight holds them."""
        if self.attention is None:
            return None
        weight = getattr(projection(self.attention), "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            return None
        return weight.detach().unflatten(0, (self.heads, -1))


@dataclass
class Found:
    """The layers of a model in the order of its modules, and what only looks like one."""

    places: list[Place] = field(default_factory=list)
    skipped: list[Layer] = field(default_factory=list)


def find(model: nn.Module) -> Found:
    """Recognised as by :func:`crate_kernels.fuse`, and the causal layers of CRATEGPT.

    Weights that several layers share count for each of them.
    """
    found = Found()
    seen: Verdicts = {}
    inside: tuple[str, ...] = ()  # of the encoders so far, what their modules' names begin with
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside):
            continue
        if isinstance(module, Layers):
            inside = (*inside, f"{name}." if name else "")
            layers: Any = module.layers
            for i, pair in enumerate(layers):
                at = 1 if isinstance(module, Decoder) else 0
                attn, ff = pair[at], pair[1 - at]
                label = f"{name}.layers.{i}" if name else f"layers.{i}"
                if not isinstance(attn.fn, Attention):
                    now = f"its attention step is now {type(attn.fn).__name__}"
                    found.skipped.append(Layer(label, type(module).__name__, now))
                elif isinstance(module, Encoder):
                    found.places.append(Place(label, attn.fn, ff.fn, module, i))
                else:  # what leaves the dictionary of CRATE-alpha, or of a decoder, is not sparse
                    found.places.append(Place(f"{label}.{at}.fn", attn.fn, None, module, i))
            continue
        kind, reason = _kind(module, seen)
        if reason is not None:
            found.skipped.append(Layer(name, kind.__name__, reason))
        elif kind is MSSA:
            found.places.append(Place(name, module))
        elif kind is ISTA:
            last = found.places[-1] if found.places else None
            if last is None or last.dictionary is not None:
                found.places.append(Place(name, None, module))
            else:
                last.dictionary, last.name = module, _common(last.name, name)
    return found


def _kind(module: nn.Module, seen: Verdicts) -> tuple[Any, str | None]:
    """MSSA, ISTA or None, and what speaks against it."""
    if isinstance(module, (Attention, CausalMSSA)):
        return MSSA, None
    if isinstance(module, FeedForward):
        return ISTA, None
    if isinstance(module, OvercompleteFeedForward):
        return OvercompleteISTA, None
    kind = looks_like(module)
    return kind, None if kind is None else reason_against(module, kind, seen)


def _common(first: str, second: str) -> str:
    """The module that holds both; ``first`` where it is the model itself."""
    pairs = zip(first.split("."), second.split("."), strict=False)
    parts = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return ".".join(parts) or first


def projection(attention: Any) -> Any:
    """The linear layer of U."""
    return attention.c_attn if isinstance(attention, CausalMSSA) else attention.qkv


def project(attention: Any, h: Tensor) -> Tensor:
    """w = h U^T as the layer makes it, by heads: (B, H, N, p). No hook is called."""
    w = projection(attention).forward(h)
    return w.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def options_of(attention: Any) -> dict[str, Any]:
    """Of its attention map, as keywords of ``attention_rows``."""
    return {
        "scale": getattr(attention, "scale", None),
        "causal": isinstance(attention, CausalMSSA),
    }


def unreadable(model: nn.Module) -> str | None:
    """Why the parameters of ``model`` cannot be read here; None if they can."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return f"{name} on meta"
        if type(parameter.data) is not torch.Tensor and hasattr(parameter, "full_tensor"):
            return f"{name} in shards (FSDP)"
    return None
