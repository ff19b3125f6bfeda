"""Is this module a published encoder or decoder? By the same tests as their layers, see
recognition.py."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ISTA, MSSA, AlphaStep, OvercompleteISTA
from .recognition import KEYWORDS, LOOP, Verdicts, against_class, against_code, holds, same, waves

_DICTIONARY_NAMES = {"torch", "nn", "functional", "F", "linear", "matmul", "weight", "t", "T", "mT"}


def published_forward(
    encoder: Any, x: Tensor, return_attention: bool = False, return_key: bool = False
) -> Tensor:
    """The encoder, module by module; with a flag, what the first MSSA returns for it."""
    for attn, ff in encoder.layers:
        if return_attention:
            return attn(x, return_attention=True)
        if return_key:
            return attn(x, return_key=True)
        x = ff(attn(x) + x)
    return x


def published_alpha_forward(encoder: Any, x: Tensor) -> Tensor:
    """The encoder of CRATE-alpha, module by module."""
    for attn, ff in encoder.layers:
        x = attn(x) + x
        x = ff(x) + x
    return x


def published_decoder_forward(decoder: Any, x: Tensor) -> Tensor:
    """The decoder of CRATE-MAE, module by module."""
    for dictionary, attn in decoder.layers:
        h = dictionary(x)
        x = h - attn(h)
    return x


def looks_like_encoder(module: nn.Module) -> bool:
    """Whether it has layers of two steps, each with a norm and a fn: worth a verdict.

    CRATE-alpha's, which adds its input to either step, and CRATE-MAE's decoder are known for others
    by what their second steps are.
    """
    return bool(_pairs(module)) and not (
        looks_like_alpha_encoder(module) or looks_like_decoder(module)
    )


def looks_like_alpha_encoder(module: nn.Module) -> bool:
    """The same for CRATE-alpha's."""
    return any(isinstance(second, OvercompleteISTA) for _, second in _pairs(module))


def looks_like_decoder(module: nn.Module) -> bool:
    """The same for CRATE-MAE's decoder."""
    found = _pairs(module)
    in_order = (isinstance(b, MSSA) and not isinstance(a, MSSA) for a, b in found)
    return bool(found) and all(in_order)


def _pairs(module: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The two fn of each layer; none if there are no layers, or others than pairs of steps."""
    layers = module._modules.get("layers")
    if not isinstance(layers, nn.ModuleList):
        return []
    pairs: list[Any] = list(layers)
    of_steps = all(
        isinstance(pair, nn.ModuleList)
        and len(pair) == 2
        and all(isinstance(s, nn.Module) and {"norm", "fn"} <= set(s._modules) for s in pair)
        for pair in pairs
    )
    return [(first.fn, second.fn) for first, second in pairs] if of_steps else []


def reason_against_encoder(module: nn.Module, seen: Verdicts) -> str | None:
    """Why ``module`` is not the published encoder of layers already swapped; None if it is.

    ``seen`` keeps the verdict on each forward function.
    """
    against = _against_whole(module, seen, published_forward)
    return against or _against_layers(module, seen, reason_against_step, (MSSA, ISTA))


def reason_against_alpha_encoder(module: nn.Module, seen: Verdicts) -> str | None:
    """The same for CRATE-alpha's."""
    against = _against_whole(module, seen, published_alpha_forward)
    kinds = (MSSA, OvercompleteISTA)
    return against or _against_layers(module, seen, reason_against_alpha_step, kinds)


def reason_against_decoder(module: nn.Module, seen: Verdicts) -> str | None:
    """The same for CRATE-MAE's decoder."""
    against = _against_whole(module, seen, published_decoder_forward)
    return against or reason_against_decoder_layers(module, seen)


def reason_against_decoder_layers(module: nn.Module, seen: Verdicts) -> str | None:
    """Why its steps are not fn(norm(x)) of a dictionary and a swapped MSSA; None if they are."""
    return _against_layers(module, seen, reason_against_step, (None, MSSA))


def _against_whole(module: nn.Module, seen: Verdicts, own: Any) -> str | None:
    """What it holds, and its forward against ``own``."""
    if set(module._modules) != {"layers"} or module._parameters or module._buffers:
        return holds(module, {"layers"})
    layers: Any = module._modules["layers"]
    depth = len(layers)
    against_forward = functools.partial(_against_encoder_forward, own, depth)
    return _against_module(module, seen, against_forward, (own, depth))


def _against_layers(
    module: Any, seen: Verdicts, against_step: Any, kinds: tuple[Any, Any]
) -> str | None:
    """Its steps, whose fn are of these kinds; None stands for a decoder's dictionary."""
    for i, pair in enumerate(module.layers):
        for j, (step, kind) in enumerate(zip(pair, kinds, strict=True)):
            reason = against_step(step, seen)
            if reason is None and kind is None:
                reason = _against_dictionary(step.fn, seen)
            elif reason is None and type(step.fn) is not kind:
                found = type(step.fn).__name__
                reason = f"expected fn to be a swapped {kind.__name__}, got {found}"
            if reason is not None:
                return f"layers.{i}.{j}: {reason}"
    return None


def _against_dictionary(fn: nn.Module, seen: Verdicts) -> str | None:
    """Why ``fn`` is not F.linear(x, weight), of a weight (D, D)."""
    if set(fn._parameters) != {"weight"} or fn._modules or fn._buffers:
        return holds(fn, {"weight"})
    weight: Any = fn._parameters["weight"]
    if type(weight) is not nn.Parameter or weight.dim() != 2 or len(set(weight.shape)) != 1:
        return "expected its weight to be a plain nn.Parameter of shape (D, D)"
    return _against_module(fn, seen, _against_dictionary_forward, "dictionary")


def reason_against_step(step: nn.Module, seen: Verdicts) -> str | None:
    """Why ``step`` is not fn(norm(x)); None if it is."""
    if set(step._modules) != {"norm", "fn"} or step._parameters or step._buffers:
        return holds(step, {"norm", "fn"})
    return _against_module(step, seen, _against_step_forward)


def reason_against_alpha_step(step: nn.Module, seen: Verdicts) -> str | None:
    """Why ``step`` is neither an AlphaStep nor fn(norm(x)); None if it is."""
    if type(step) is not AlphaStep:
        return reason_against_step(step, seen)
    if set(step._modules) != {"norm", "fn"} or set(step._parameters) != {"layer_scale"}:
        return holds(step, {"norm", "fn", "layer_scale"})
    if "forward" in vars(step):
        return "the forward of this instance was replaced"
    return None


def _against_module(
    module: nn.Module, seen: Verdicts, against_forward: Any, trial: Any = None
) -> str | None:
    """By class and forward; ``trial`` tells apart what one function is tried as."""
    reason = against_class(type(module))
    if reason is not None:
        return reason
    if "forward" in vars(module):
        return "the forward of this instance was replaced"
    forward = type(module).__dict__["forward"]
    if (forward, trial) not in seen:
        seen[forward, trial] = against_forward(forward)
    return seen[forward, trial]


def _against_encoder_forward(own: Any, depth: int, forward: types.FunctionType) -> str | None:
    """What ``own`` does with ``depth`` pairs; a flag, if it takes any, goes to the first attn."""
    reason = against_code(forward, {"layers"}, own is published_forward, LOOP)
    if reason is not None:
        return reason
    return _against_trials(forward, own, _encoder_stand_in(depth))


def _against_step_forward(forward: types.FunctionType) -> str | None:
    """fn(norm(x)), keyword arguments handed on to fn if it takes any."""
    reason = against_code(forward, {"norm", "fn"}, False, KEYWORDS)
    if reason is not None:
        return reason

    def own(step: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return step.fn(step.norm(x), **kwargs)

    return _against_trials(forward, own, _step_stand_in())


def _against_dictionary_forward(forward: types.FunctionType) -> str | None:
    reason = against_code(forward, _DICTIONARY_NAMES, False, frozenset())
    stand_in = types.SimpleNamespace(weight=waves(6, 6))
    return reason or _against_trials(forward, lambda fn, x: F.linear(x, fn.weight), stand_in)


def _against_trials(forward: Any, own: Any, stand_in: types.SimpleNamespace) -> str | None:
    code = forward.__code__
    flags = code.co_varnames[2 : code.co_argcount]
    if code.co_flags & 0x08:
        flags = ("return_attention", "return_key")
    calls: list[dict[str, bool]] = [{}, *({flag: True} for flag in flags)]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for kwargs in calls:
            x = waves(2, 5, 6)
            try:
                got = forward(stand_in, x, **kwargs)
            except Exception as error:
                return f"its forward fails on a trial input: {type(error).__name__}: {error}"
            if not torch.equal(x, waves(2, 5, 6)):
                return "its forward writes into its input"
            if not same(got, own(stand_in, x, **kwargs)):
                return "its forward computes something else than the published one"
    return None


def _encoder_stand_in(depth: int) -> types.SimpleNamespace:
    def attn(turn: float) -> Any:
        def run(x: Tensor, return_attention: bool = False, return_key: bool = False) -> Tensor:
            return torch.sin(turn * x) + 3.0 * return_attention + 5.0 * return_key

        return run

    layers = [[attn(i + 1.3), lambda x, i=i: torch.cos((i + 0.7) * x)] for i in range(depth)]
    return types.SimpleNamespace(layers=layers)


def _step_stand_in() -> types.SimpleNamespace:
    def fn(x: Tensor, return_attention: bool = False, return_key: bool = False) -> Tensor:
        return torch.sin(1.3 * x) + 3.0 * return_attention + 5.0 * return_key

    return types.SimpleNamespace(norm=lambda x: torch.cos(0.7 * x), fn=fn)
