"""What the ops require of their arguments, and how they say it: expected and got."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .library import autocast_is_on

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse(op: str, expected: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: expected {expected}, got {got}")


def check_tensors(op: str, tensors: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
    """All tensors, of one device and (but under autocast) one floating dtype; optional or None.

    The first names the device and dtype that the others must share.
    """
    given = tensors
    if optional:
        given = {**tensors, **{name: t for name, t in optional.items() if t is not None}}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            refuse(op, f"{name} to be a torch.Tensor", type(t).__name__, TypeError)
    first_name, first = next(iter(tensors.items()))
    for name, t in given.items():
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError(
                f"{op}: forward-mode AD is not implemented; expected {name} without a tangent, "
                f"got one with (use {op}_reference)"
            )
        if t.dtype not in FLOATS:
            refuse(op, f"{name} of dtype float16, bfloat16, float32 or float64", t.dtype, TypeError)
        if t.device != first.device:
            refuse(op, f"{name} on the device of {first_name}, {first.device}", t.device)
        if t.dtype != first.dtype and not _autocast_unites(t, first):
            refuse(
                op,
                f"{name} of the dtype of {first_name}, {first.dtype}, when autocast is off",
                t.dtype,
                TypeError,
            )


def _autocast_unites(a: Tensor, b: Tensor) -> bool:
    return autocast_is_on(a.device.type) and torch.float64 not in (a.dtype, b.dtype)


def check_heads(op: str, heads: Any, width: int) -> None:
    if not isinstance(heads, int) or isinstance(heads, bool):
        refuse(op, "heads to be an int", type(heads).__name__, TypeError)
    if heads < 1 or width % heads != 0 or width == 0:
        refuse(op, f"heads to divide the projected width {width}", heads)


def check_number(op: str, name: str, value: Any, *, above_zero: bool = False) -> None:
    """A finite real number, at least zero (above it where zero has no meaning)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        refuse(op, f"{name} to be a float", type(value).__name__, TypeError)
    if not 0 <= value < math.inf or (above_zero and value == 0):
        refuse(op, f"{name} to be finite and {'> 0' if above_zero else '>= 0'}", value)
