"""Fused kernels for CRATE, the white-box transformer (arXiv 2311.13110).

Ops: :func:`mssa`, :func:`ista`, :func:`tied_attention`, :func:`tied_rotary` and a whole layer,
:func:`crate_block`, each with its ``*_reference`` twin.
Models: :func:`fuse` swaps the layers of an existing one, :func:`unfuse` swaps them back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import models, nn
from .backends import Explanation
from .block.op import crate_block, explain_crate_block
from .block.reference import crate_block_reference, crate_block_reference_backward
from .ista.op import explain_ista, ista
from .ista.reference import ista_reference, ista_reference_backward
from .mssa.op import explain_mssa, explain_tied_attention, mssa, tied_attention
from .mssa.reference import (
    mssa_reference,
    mssa_reference_backward,
    tied_attention_reference,
    tied_attention_reference_backward,
)
from .nn.fusion import fuse, unfuse
from .rotary.op import explain_tied_rotary, tied_rotary
from .rotary.reference import tied_rotary_reference, tied_rotary_reference_backward

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "crate_block",
    "crate_block_reference",
    "crate_block_reference_backward",
    "explain",
    "fuse",
    "ista",
    "ista_reference",
    "ista_reference_backward",
    "models",
    "mssa",
    "mssa_reference",
    "mssa_reference_backward",
    "nn",
    "tied_attention",
    "tied_attention_reference",
    "tied_attention_reference_backward",
    "tied_rotary",
    "tied_rotary_reference",
    "tied_rotary_reference_backward",
    "unfuse",
]


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backends fit ``op`` called with these arguments, and why the others do not.

    ``print(crate_kernels.explain("mssa", x, w_qkv, w_out, b_out, heads=12))``. ``op`` is
    "mssa", "tied_attention", "tied_rotary", "ista" or "crate_block"; the other arguments are that
    op's own (without backend). Bad arguments raise as the op itself would.
    """
    explainers: dict[str, Callable[..., Explanation]] = {
        "mssa": explain_mssa,
        "tied_attention": explain_tied_attention,
        "tied_rotary": explain_tied_rotary,
        "ista": explain_ista,
        "crate_block": explain_crate_block,
    }
    if op not in explainers:
        raise ValueError(f"explain: expected op to be one of {sorted(explainers)}, got {op!r}")
    return explainers[op](*args, **kwargs)
