"""Is this module a published MSSA or ISTA layer? Decided by structure and code, not by import.

Three tests, all strict: what the module holds (:func:`_against_attention`,
:func:`_against_feed_forward`, :func:`_against_overcomplete`), what its class says
(:func:`against_class`, :func:`against_code`: a short straight forward that stores nothing and
branches on nothing but its flags), and what that forward computes (:func:`_against_result`: run in
float64 with stand-ins for the children, against our own).
"""

from __future__ import annotations

import dis
import math
import types
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    ISTA,
    MSSA,
    Attention,
    FeedForward,
    OvercompleteFeedForward,
    OvercompleteISTA,
)

# What a class may define besides forward: nothing else would survive the change of class.
_CLASS_NAMES = {"__init__", "forward", "extra_repr", "__doc__", "__module__", "__qualname__"}
_CLASS_NAMES |= {"__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"}
_CLASS_NAMES |= {"__firstlineno__", "__static_attributes__", "__dict__", "__weakref__"}

_MODULE_NAMES = {"torch", "nn", "functional", "F", "einops"}
_SHAPE_NAMES = {"shape", "size", "view", "reshape", "permute", "transpose", "contiguous", "flatten"}
_SHAPE_NAMES |= {"unflatten", "swapaxes", "t", "T", "mT", "rearrange"}
_PRODUCT_NAMES = {"matmul", "bmm", "einsum", "mul", "add", "sub"}
# Every name, global or attribute, that a forward may use.
_ATTENTION_NAMES = _MODULE_NAMES | _SHAPE_NAMES | _PRODUCT_NAMES
_ATTENTION_NAMES |= {"qkv", "heads", "scale", "attend", "dropout", "to_out"}
_FEED_FORWARD_NAMES = _MODULE_NAMES | _SHAPE_NAMES | _PRODUCT_NAMES
_FEED_FORWARD_NAMES |= {"weight", "step_size", "lambd", "linear", "relu"}
_OVERCOMPLETE_NAMES = _MODULE_NAMES | _SHAPE_NAMES | _PRODUCT_NAMES
_OVERCOMPLETE_NAMES |= {"D", "D1", "eta", "lmbda", "linear", "relu"}

_FLAGS = ("return_attention", "return_key")
_FLAG_SET = frozenset(_FLAGS)
_OPERATORS = {"+", "-", "*", "/", "@", "[]"}
# The instructions of straight code that stores in its own frame only: Python 3.10 to 3.14.
_INSTRUCTIONS = {"LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD"}
_INSTRUCTIONS |= {"LOAD_FAST", "LOAD_FAST_LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW"}
_INSTRUCTIONS |= {"LOAD_FAST_BORROW_LOAD_FAST_BORROW", "STORE_FAST", "STORE_FAST_LOAD_FAST"}
_INSTRUCTIONS |= {"STORE_FAST_STORE_FAST", "POP_TOP", "SWAP", "COPY", "DUP_TOP", "ROT_TWO"}
_INSTRUCTIONS |= {"PRECALL", "KW_NAMES", "PUSH_NULL", "CALL", "CALL_KW", "CALL_METHOD"}
_INSTRUCTIONS |= {"CALL_FUNCTION", "CALL_FUNCTION_KW", "RETURN_VALUE", "RETURN_CONST", "RESUME"}
_INSTRUCTIONS |= {"BINARY_OP", "BINARY_SUBSCR", "UNARY_NEGATIVE", "BUILD_TUPLE", "UNPACK_SEQUENCE"}
_INSTRUCTIONS |= {
    f"{kind}_{operator}"
    for kind in ("BINARY", "INPLACE")
    for operator in ("ADD", "SUBTRACT", "MULTIPLY", "TRUE_DIVIDE", "MATRIX_MULTIPLY")
}
# What a loop over layers has more of, and a call that hands on keyword arguments.
LOOP = frozenset({"GET_ITER", "FOR_ITER", "END_FOR", "POP_ITER", "JUMP_BACKWARD", "JUMP_ABSOLUTE"})
KEYWORDS = frozenset({"BUILD_MAP", "DICT_MERGE", "CALL_FUNCTION_EX"})
_IGNORED = {"CACHE", "EXTENDED_ARG", "TO_BOOL", "NOP", "NOT_TAKEN"}

Verdicts = dict[Any, "str | None"]
Kind = type[MSSA] | type[ISTA] | type[OvercompleteISTA]


def looks_like(module: nn.Module) -> Kind | None:
    """Which of our layers this module has the attributes of, if any: worth a verdict."""
    if all(_has(module, name) for name in ("heads", "scale", "attend", "qkv", "to_out")):
        return MSSA
    if all(_has(module, name) for name in ("weight", "step_size", "lambd")):
        return ISTA
    if all(_has(module, name) for name in ("D", "D1", "eta", "lmbda")):
        return OvercompleteISTA
    return None


def reason_against(module: nn.Module, kind: Kind, seen: Verdicts) -> str | None:
    """Why ``module`` is not the published layer that ``kind`` stands for; None if it is.

    ``seen`` keeps the verdict on each forward function, for models of many equal layers.
    """
    reason = against_class(type(module))
    if reason is not None:
        return reason
    if "forward" in vars(module):
        return "the forward of this instance was replaced"
    against, names = {
        MSSA: (_against_attention, _ATTENTION_NAMES),
        ISTA: (_against_feed_forward, _FEED_FORWARD_NAMES),
        OvercompleteISTA: (_against_overcomplete, _OVERCOMPLETE_NAMES),
    }[kind]
    reason = against(module)
    if reason is not None:
        return reason
    forward = type(module).__dict__["forward"]
    if forward not in seen:
        reason = against_code(forward, names, kind is MSSA, frozenset())
        seen[forward] = reason or _against_result(forward, kind)
    return seen[forward]


# ---- what the module holds


def _has(module: nn.Module, name: str) -> bool:
    holders = (vars(module), module._modules, module._parameters, module._buffers)
    return any(name in held for held in holders) or hasattr(type(module), name)


def _against_attention(module: nn.Module) -> str | None:
    children: dict[str, Any] = dict(module._modules)
    expected = {"attend", "dropout", "qkv", "to_out"}
    if set(children) != expected or module._parameters or module._buffers:
        return holds(module, expected)
    qkv, to_out = children["qkv"], children["to_out"]
    wanted = [("attend", children["attend"], nn.Softmax), ("qkv", qkv, nn.Linear)]
    wanted.append(("dropout", children["dropout"], nn.Dropout))
    if type(to_out) is not nn.Identity:
        wanted.append(("to_out", to_out, nn.Sequential))
        if type(to_out) is nn.Sequential:
            if len(to_out) != 2:
                return f"expected to_out of 2 modules, Linear and Dropout, got {len(to_out)}"
            wanted += [("to_out.0", to_out[0], nn.Linear), ("to_out.1", to_out[1], nn.Dropout)]
    for name, child, kind in wanted:
        if type(child) is not kind:
            return f"expected {name} to be nn.{kind.__name__}, got {type(child).__name__}"
    heads, scale = (vars(module).get(name) for name in ("heads", "scale"))
    inner, dim = qkv.out_features, qkv.in_features
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or inner % heads != 0:
        return f"expected heads to divide the projected width {inner}, got {heads!r}"
    if not _is_number(scale) or scale <= 0:
        return f"expected scale to be a float > 0, got {_shown(scale)}"
    if qkv.bias is not None:
        return "expected qkv without bias, got one with"
    if children["attend"].dim != -1:
        return f"expected attend to be a softmax along dim -1, got dim {children['attend'].dim}"
    if type(to_out) is nn.Sequential and (to_out[0].out_features, to_out[0].in_features) != (
        dim,
        inner,
    ):
        return f"expected to_out.0 to map {inner} to {dim} features, got {to_out[0]}"
    return None


def _against_feed_forward(module: nn.Module) -> str | None:
    if set(module._parameters) != {"weight"} or module._modules or module._buffers:
        return holds(module, {"weight"})
    weight: Any = module._parameters["weight"]
    if type(weight) is not nn.Parameter:
        return f"expected weight to be a plain nn.Parameter, got {type(weight).__name__}"
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        return f"expected weight of shape (D, D), got {tuple(weight.shape)}"
    return _against_numbers(module, "step_size", "lambd")


def _against_overcomplete(module: nn.Module) -> str | None:
    if set(module._parameters) != {"D", "D1"} or module._modules or module._buffers:
        return holds(module, {"D", "D1"})
    for name, t in module._parameters.items():
        if type(t) is not nn.Parameter:
            return f"expected {name} to be a plain nn.Parameter, got {type(t).__name__}"
    shapes = [tuple(t.shape) for t in module._parameters.values() if t is not None]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        return f"expected D and D1 of one shape (d, m), got {shapes[0]} and {shapes[1]}"
    return _against_numbers(module, "eta", "lmbda")


def _against_numbers(module: nn.Module, *names: str) -> str | None:
    for name in names:
        value = vars(module).get(name)
        if not _is_number(value) or value < 0:
            return f"expected {name} to be a float >= 0, got {_shown(value)}"
    return None


def holds(module: nn.Module, expected: set[str]) -> str:
    held = sorted({*module._modules, *module._parameters, *module._buffers})
    return f"expected {sorted(expected)} as children and parameters, got {held}"


def _is_number(value: Any) -> TypeGuard[float]:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and math.isfinite(value)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float, type(None))) else type(value).__name__


# ---- what its class and code say


def against_class(cls: type[nn.Module]) -> str | None:
    if cls.__mro__[1:] != (nn.Module, object):
        return f"{cls.__name__} is a subclass of {cls.__mro__[1].__name__}"
    extra = sorted(set(vars(cls)) - _CLASS_NAMES)
    if extra:
        return f"{cls.__name__} defines more than a layer: {', '.join(extra)}"
    if not isinstance(vars(cls).get("forward"), types.FunctionType):
        return f"{cls.__name__} has no plain forward of its own"
    return None


def against_code(
    forward: types.FunctionType, allowed: set[str], takes_flags: bool, more: frozenset[str]
) -> str | None:
    """Uses no other names and, but for ``more`` ones, no instructions than straight code has."""
    code = forward.__code__
    names = code.co_varnames[: code.co_argcount]
    flags = names[2:] if takes_flags else ()
    exact = names == ("self", "x", *flags) and flags in ((), _FLAGS)
    variadic = code.co_flags & (0x04 if more & KEYWORDS else 0x0C) or code.co_kwonlyargcount
    if not exact or variadic or forward.__defaults__ != ((False,) * len(flags) or None):
        return "its forward takes other arguments"
    if code.co_freevars or code.co_cellvars or hasattr(forward, "__wrapped__"):
        return "its forward is decorated or a closure"
    unknown = sorted(set(code.co_names) - allowed)
    if unknown:
        return f"its forward uses {', '.join(unknown)}"
    return _against_instructions(forward, _INSTRUCTIONS | more)


def _against_instructions(forward: types.FunctionType, known: set[str]) -> str | None:
    previous: Any = None
    for step in dis.get_instructions(forward):
        if step.opname in _IGNORED:
            continue
        if step.opname.startswith("POP_JUMP"):
            if previous not in _FLAGS:
                return "its forward branches on something other than its flags"
        elif step.opname.startswith("STORE_FAST") and not _FLAG_SET.isdisjoint(_names(step)):
            return "its forward assigns its flags"
        elif step.opname not in known or not _plain_operand(step):
            return f"its forward does more than compute ({step.opname} {step.argrepr})"
        elif step.opname == "LOAD_GLOBAL" and not _known_global(forward, step.argval):
            return f"its forward uses {step.argval}, which is not torch's or einops' own"
        previous = step.argval
    return None


def _names(step: dis.Instruction) -> tuple[str, ...]:
    """The variables of an instruction on one or two of them."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


def _plain_operand(step: dis.Instruction) -> bool:
    """A known operator; a constant that is no slice."""
    if step.opname == "BINARY_OP":
        return step.argrepr.rstrip("=") in _OPERATORS
    if step.opname == "LOAD_CONST":
        parts = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        return all(isinstance(part, (int, float, str, type(None))) for part in parts)
    return True


def _known_global(forward: types.FunctionType, name: str) -> bool:
    value = forward.__globals__.get(name)
    if value is None:
        return False
    own = (torch, nn, F, getattr(torch, name, None), getattr(F, name, None))
    if any(value is known for known in own):
        return True
    owner = "__name__" if isinstance(value, types.ModuleType) else "__module__"
    return str(getattr(value, owner, "")).split(".")[0] == "einops"


# ---- what its forward computes


def _against_result(forward: types.FunctionType, kind: Kind) -> str | None:
    """Run it on stand-ins for ``self``: no parameter, hook, random state or gradient is touched."""
    forms: dict[Kind, tuple[Callable[..., Tensor], Callable[[], types.SimpleNamespace]]] = {
        MSSA: (Attention.forward, _attention_stand_in),
        ISTA: (FeedForward.forward, _feed_forward_stand_in),
        OvercompleteISTA: (OvercompleteFeedForward.forward, _overcomplete_stand_in),
    }
    own, stand_in = forms[kind]
    layer = stand_in()
    flags = forward.__code__.co_varnames[2 : forward.__code__.co_argcount]
    calls: list[dict[str, bool]] = [{}, *({flag: True} for flag in flags)]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for kwargs in calls:
            for batch, n in ((2, 5), (1, 7)):
                x = waves(batch, n, _DIM)
                try:
                    got = forward(layer, x, **kwargs)
                except Exception as error:
                    return f"its forward fails on a trial input: {type(error).__name__}: {error}"
                if not torch.equal(x, waves(batch, n, _DIM)):
                    return "its forward writes into its input"
                if not same(got, own(layer, x, **kwargs)):
                    return f"its forward computes something else than the published {kind.__name__}"
    return None


_DIM, _HEADS, _HEAD_DIM = 10, 3, 4


def _attention_stand_in() -> types.SimpleNamespace:
    """Children as distinct functions, the scale as no formula gives it: none can be left out."""
    w_qkv, w_out = waves(_HEADS * _HEAD_DIM, _DIM), waves(_DIM, _HEADS * _HEAD_DIM)
    return types.SimpleNamespace(
        heads=_HEADS,
        scale=0.37,
        qkv=lambda x: F.linear(x, w_qkv),
        attend=lambda s: torch.softmax(1.1 * s, dim=-1),
        dropout=lambda p: p + 0.1 * torch.cos(9.0 * p),
        to_out=lambda o: F.linear(o, w_out) + 0.2,
    )


def _feed_forward_stand_in() -> types.SimpleNamespace:
    return types.SimpleNamespace(weight=waves(_DIM, _DIM), step_size=0.23, lambd=0.31)


def _overcomplete_stand_in() -> types.SimpleNamespace:
    other = waves(3 * _DIM, _DIM).mT.contiguous()
    return types.SimpleNamespace(D=waves(_DIM, 3 * _DIM), D1=other, eta=0.23, lmbda=0.31)


def waves(*shape: int) -> Tensor:
    """Numbers in [-1, 1] without pattern, the same at every call; on the CPU in float64."""
    steps = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device="cpu")
    return torch.sin(steps * steps * 0.7).view(shape)


def same(got: Any, want: Tensor) -> bool:
    fits = isinstance(got, Tensor) and got.dtype == want.dtype and got.shape == want.shape
    return fits and torch.allclose(got, want, rtol=1e-9, atol=1e-12)
