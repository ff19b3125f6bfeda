"""fuse(model) swaps our layers into an existing model, in place; unfuse(model) swaps them back.

A swap changes the class of the module and nothing else, so parameters, hooks, names, and whoever
holds the module stay as they are. The class it had is kept in its ``_unfused_class``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..checks import refuse
from .alpha_encoder import AlphaEncoder
from .decoder import Decoder
from .encoder import Blocks, Encoder, Layers, check_memory, unfused_block_reason
from .encoder_recognition import (
    looks_like_alpha_encoder,
    looks_like_decoder,
    looks_like_encoder,
    reason_against_alpha_encoder,
    reason_against_decoder,
    reason_against_encoder,
)
from .layers import ISTA, MSSA, OvercompleteISTA, unfused_reason
from .patch_embedding import (
    PatchEmbedding,
    looks_like_stem,
    patch_size_of,
    reason_against_stem,
)
from .patch_projection import (
    PatchProjection,
    looks_like_patch_projection,
    reason_against_patch_projection,
)
from .recognition import Verdicts, looks_like, reason_against
from .steps import unfused_step_reason

KINDS: tuple[type[nn.Module], ...] = (
    PatchEmbedding,
    PatchProjection,
    Encoder,
    AlphaEncoder,
    Decoder,
    MSSA,
    ISTA,
    OvercompleteISTA,
)

# Of layers in a row: what they become, what looks like them, and why it would not be them.
STACKS: tuple[tuple[type[Layers], Any, Any], ...] = (
    (AlphaEncoder, looks_like_alpha_encoder, reason_against_alpha_encoder),
    (Decoder, looks_like_decoder, reason_against_decoder),
    (Encoder, looks_like_encoder, reason_against_encoder),
)


@dataclass(frozen=True)
class Layer:
    """One layer of a report. ``kind`` names one of our modules; ``reason`` says why it was
    skipped, or what to know about a swapped one ("" if nothing)."""

    name: str
    kind: str
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.name or '(the model itself)'} ({self.kind})"
        return f"{text}: {self.reason}" if self.reason else text


@dataclass(frozen=True)
class Report:
    """What :func:`fuse` or :func:`unfuse` did; as many as, and true if any, were swapped."""

    replaced: list[Layer] = field(default_factory=list)
    skipped: list[Layer] = field(default_factory=list)
    verb: str = "replaced"

    def __len__(self) -> int:
        return len(self.replaced)

    def __str__(self) -> str:
        count = ", ".join(_counts(self.replaced)) or "nothing"
        lines = [f"{self.verb} {count}; skipped {len(self.skipped)}"]
        if not self.replaced and not self.skipped:
            lines = [f"{self.verb} nothing: the model has no layer to swap"]
        lines += grouped("note", [layer for layer in self.replaced if layer.reason])
        lines += grouped("skipped", self.skipped)
        return "\n".join(lines)


def fuse(model: nn.Module, *, memory: str | None = None) -> Report:
    """Run the published MSSA and ISTA layers in ``model`` on this library's ops, from now on.

    An encoder of swapped layers becomes an :class:`Encoder`, which runs each layer as one op
    (:func:`crate_kernels.crate_block`), a block of CRATE-MAE's decoder a :class:`Decoder`, with one
    op for each layer as well; other layers run MSSA and ISTA as an op each, as do those of
    CRATE-alpha (:func:`crate_kernels.overcomplete_ista`), whose encoder becomes an
    :class:`AlphaEncoder`, with one op between the steps (:func:`crate_kernels.residual_norm`). The
    stem ``to_patch_embedding`` becomes a :class:`PatchEmbedding`, a stem that is a convolution, in
    a model with such layers, a :class:`PatchProjection`.

    Layers are found by what they hold and compute, wherever they were defined: the published
    CRATE, CRATE-alpha and CRATE-MAE, inside DataParallel and
    DistributedDataParallel too. What only looks like one of them (another forward, a subclass, an
    instance whose forward was replaced, other children) is left alone and reported. Modules change
    class in place: parameters, optimizers, hooks, state-dict keys and mode stay. Works on
    meta-device models; a second call finds nothing to do; a compiled model compiles itself again
    at its next call.

    Args:
        model: any module.
        memory: "default" or "low": what the layers of an encoder, of CRATE-MAE's decoder and of
            CRATE-alpha keep for the backward pass (:func:`crate_kernels.crate_block`,
            :class:`Decoder`, :func:`crate_kernels.overcomplete_ista`), those swapped before
            included. None leaves
            these as they are, and takes "default" for others.

    Returns:
        A printable report with ``replaced`` and ``skipped`` lists of layers, each with ``name``,
        ``kind`` and ``reason``.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: memory is none of these.
    """
    if memory is not None:
        check_memory("fuse", memory)
    report = Report()
    seen: Verdicts = {}
    for name, module in _layers("fuse", model):
        kind = looks_like(module)
        if kind is None:
            continue
        fused = isinstance(module, (MSSA, ISTA, OvercompleteISTA))
        reason = "fused already" if fused else reason_against(module, kind, seen)
        if isinstance(module, OvercompleteISTA) and memory is not None:
            module.memory = memory
        if reason is not None:
            report.skipped.append(Layer(name, kind.__name__, reason))
            continue
        module._unfused_class = type(module)  # type: ignore[assignment]
        module.__class__ = kind
        if isinstance(module, OvercompleteISTA):
            module.memory = memory or "default"
        report.replaced.append(Layer(name, kind.__name__, _note(module)))
    for name, module in _layers("fuse", model):
        if isinstance(module, Blocks):
            module.memory = memory or module.memory
        if isinstance(module, Layers):
            kind_name = next(kind.__name__ for kind, *_ in STACKS if isinstance(module, kind))
            report.skipped.append(Layer(name, kind_name, "fused already"))
        elif any(looks(module) for _, looks, _ in STACKS):
            _fuse_stack(name, module, memory, seen, report)
        elif looks_like_stem(module):
            _swap(name, module, PatchEmbedding, reason_against_stem, report)
        elif looks_like_patch_projection(module) and _has_our_layers(model):
            _swap(name, module, PatchProjection, reason_against_patch_projection, report)
    _forget_dictionaries(model, report)
    return report


def _has_our_layers(model: nn.Module) -> bool:
    return any(isinstance(module, (MSSA, ISTA, OvercompleteISTA)) for module in model.modules())


def _swap(
    name: str, module: Any, kind: type[nn.Module], reason_against_it: Any, report: Report
) -> None:
    """A stem becomes ours, or is reported with the reason against it."""
    reason = "fused already" if isinstance(module, kind) else reason_against_it(module)
    if reason is not None:
        report.skipped.append(Layer(name, kind.__name__, reason))
        return
    if kind is PatchEmbedding:
        module.patch_size = patch_size_of(module)
    module._unfused_class = type(module)
    module.__class__ = kind
    report.replaced.append(Layer(name, kind.__name__))


def _fuse_stack(name: str, module: Any, memory: str | None, seen: Verdicts, report: Report) -> None:
    """What looks like an encoder or decoder becomes one, or is reported with the reason against."""
    kind, against = next((kind, against) for kind, looks, against in STACKS if looks(module))
    reason = against(module, seen)
    if reason is not None:
        report.skipped.append(Layer(name, kind.__name__, reason))
        return
    module._unfused_class = type(module)
    module.__class__ = kind
    if isinstance(module, Blocks):
        module.memory = memory or "default"
    module.know_steps()
    note = _encoder_note(module) if kind is Encoder else _steps_note(module)
    report.replaced.append(Layer(name, kind.__name__, note))


def _forget_dictionaries(model: nn.Module, report: Report) -> None:
    """A decoder's dictionary, which holds what an ISTA does, is part of the decoder."""
    layers = _layers("fuse", model)
    taken: set[Any] = set()
    for _, module in layers:
        if isinstance(module, Decoder):
            pairs: Any = module.layers
            taken |= {dictionary.fn for dictionary, _ in pairs}
    names = {name for name, module in layers if module in taken}
    report.skipped[:] = [layer for layer in report.skipped if layer.name not in names]


def unfuse(model: nn.Module) -> Report:
    """Give every layer that :func:`fuse` swapped its own class back, in place.

    Those built as :class:`MSSA`, :class:`ISTA`, :class:`OvercompleteISTA`, :class:`Encoder`,
    :class:`AlphaEncoder`, :class:`Decoder`, :class:`PatchEmbedding` or :class:`PatchProjection`
    had no other and are reported as skipped.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    report = Report(verb="restored")
    for name, module in _layers("unfuse", model):
        kinds = [kind for kind in KINDS if isinstance(module, kind)]
        if not kinds:
            continue
        kind = kinds[0].__name__
        if "_unfused_class" not in vars(module):
            reason = f"built as {kind}, not swapped in by fuse"
        elif type(module) is not kinds[0]:
            reason = f"its class became {type(module).__name__} after fuse"
        else:
            for kept in ("_memory", "_steps", "_dictionaries", "constants", "patch_size"):
                vars(module).pop(kept, None)
            module.__class__ = vars(module).pop("_unfused_class")
            report.replaced.append(Layer(name, kind))
            continue
        report.skipped.append(Layer(name, kind, reason))
    return report


def _layers(caller: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module once, under its first name."""
    if not isinstance(model, nn.Module):
        refuse(caller, "model to be a torch.nn.Module", type(model).__name__, TypeError)
    return list(model.named_modules())


def _note(module: nn.Module) -> str:
    """What keeps a freshly swapped layer on its plain forward."""
    if not isinstance(module, MSSA):
        return ""
    reason = unfused_reason(module)
    if reason is not None:
        return f"{reason}: runs unfused"
    if module.dropout.p > 0:
        return f"dropout {module.dropout.p:g}: while training runs on Triton or unfused"
    return ""


def _encoder_note(encoder: Any) -> str:
    """How many of its layers do not run as one op each, and the first one's reason."""
    reasons = [unfused_block_reason(attn, ff, encoder._steps) for attn, ff in encoder.layers]
    unfused = [reason for reason in reasons if reason is not None]
    if not unfused:
        return ""
    return f"{unfused[0]}: {len(unfused)} of {len(reasons)} layers run MSSA and ISTA apart"


def _steps_note(module: Any) -> str:
    """How many steps leave norm and residual to PyTorch, and the first one's reason."""
    sides: Any = (("attention", (MSSA,)), ("dictionary", (OvercompleteISTA,)))
    if type(module) is Decoder:
        sides = (("dictionary", module._dictionaries), sides[0])
    reasons = [
        unfused_step_reason(side, step, kinds, module._steps)
        for pair in module.layers
        for step, (side, kinds) in zip(pair, sides, strict=True)
    ]
    unfused = [reason for reason in reasons if reason is not None]
    if not unfused:
        return ""
    return f"{unfused[0]}: {len(unfused)} of {len(reasons)} steps run norm and residual apart"


def _counts(layers: list[Layer]) -> list[str]:
    kinds = [layer.kind for layer in layers]
    names = [kind.__name__ for kind in KINDS]
    return [f"{kinds.count(name)} {name}" for name in names if name in kinds]


def grouped(label: str, layers: list[Layer]) -> list[str]:
    """One line per reason, with how many layers of which kind and the first of them."""
    reasons: dict[str, list[Layer]] = {}
    for layer in layers:
        reasons.setdefault(layer.reason, []).append(layer)
    lines = []
    for reason, group in reasons.items():
        first = group[0].name or "the model itself"
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        lines.append(f"  {label}: {', '.join(_counts(group))}: {reason} ({first}{more})")
    return lines
