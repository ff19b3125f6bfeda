"""Loading the checkpoints people have: wrapped, prefixed, and either whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# What DataParallel, DistributedDataParallel and torch.compile put into a key.
_WRAPPERS = ("module", "_orig_mod")
_CONTENTS = ("state_dict", "model")
_SHOWN = 10

Model = TypeVar("Model", bound=nn.Module)


def load_checkpoint(
    model: Model,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    weights_only: bool = True,
) -> Model:
    """Load all of ``checkpoint`` into ``model``, or raise and leave ``model`` as it was.

    Keys match whatever ``module.`` and ``_orig_mod.`` either side carries. Values are copied into
    the parameters there are, converted to their dtype and device.

    Args:
        model: on any device but meta. Unexpected keys that match its ``ignored_keys``, a pattern,
            are passed over.
        checkpoint: a path for ``torch.load``, a state dict, or a dict with one under "state_dict"
            or "model".
        weights_only: as for ``torch.load``; False runs code from the file.

    Returns:
        model.

    Raises:
        ValueError: keys that are missing, unexpected, given twice, or of another shape, each
            kind listed; a model with parameters on meta.
        TypeError: checkpoint is, or holds, something else.
    """
    if isinstance(checkpoint, (str, os.PathLike)):
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=weights_only)
    found, problems = _by_plain_key(_unwrap(checkpoint), "in the checkpoint")
    wanted, twice = _by_plain_key(model.state_dict(), "in the model")
    problems += twice
    problems += _listed("missing", sorted(wanted.keys() - found.keys()))
    ignored = getattr(model, "ignored_keys", "")
    unexpected = [k for k in found.keys() - wanted.keys() if not re.fullmatch(ignored, k)]
    problems += _listed("unexpected", sorted(unexpected))
    state, wrong = {}, []
    for plain in wanted.keys() & found.keys():
        (key, old), (_, new) = wanted[plain], found[plain]
        state[key] = new
        if isinstance(old, Tensor) and not isinstance(new, Tensor):
            wrong.append(f"{plain}: expected a tensor, got {type(new).__name__}")
        elif isinstance(old, Tensor) and old.shape != new.shape:
            wrong.append(f"{plain}: expected {tuple(old.shape)}, got {tuple(new.shape)}")
    problems += _listed("wrong shape", sorted(wrong))
    if problems:
        raise ValueError(
            "load_checkpoint: expected the keys and shapes of the model, got\n  "
            + "\n  ".join(problems)
        )
    meta = [key for key, (_, old) in wanted.items() if isinstance(old, Tensor) and old.is_meta]
    if meta:
        raise ValueError(
            f"load_checkpoint: expected a model with storage, got {len(meta)} tensors on meta; "
            "call model.to_empty(device=...) first"
        )
    model.load_state_dict(state)
    return model


def plain_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that :func:`load_checkpoint` finds in ``checkpoint``, keys without wrappers.

    Raises TypeError where there is none, ValueError where two keys become one.
    """
    found, twice = _by_plain_key(_unwrap(checkpoint), "in the checkpoint")
    if twice:
        raise ValueError(f"load_checkpoint: expected each key once, got {twice[0]}")
    return {key: value for key, (_, value) in found.items()}


def _unwrap(checkpoint: Any) -> Mapping[str, Any]:
    for name in _CONTENTS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(name), Mapping):
            return _unwrap(checkpoint[name])
    if not isinstance(checkpoint, Mapping) or not all(isinstance(key, str) for key in checkpoint):
        raise TypeError(
            "load_checkpoint: expected a path, a state dict or a dict with one under "
            f"{' or '.join(_CONTENTS)}, got {type(checkpoint).__name__}"
        )
    return checkpoint


def _by_plain_key(
    state: Mapping[str, Any], where: str
) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """{key without wrappers: (key, value)}, and the plain keys that two keys share."""
    plain: dict[str, tuple[str, Any]] = {}
    twice = []
    for key, value in state.items():
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in plain:
            twice.append(f"{name} ({plain[name][0]}, {key})")
        plain[name] = (key, value)
    return plain, _listed(f"twice {where}", twice)


def _listed(label: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = [f"and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    return [f"{label} ({len(entries)}): " + "; ".join(entries[:_SHOWN] + more)]
