"""Fused kernels for CRATE, the white-box transformer (arXiv 2311.13110).

Ops: :func:`mssa`, :func:`ista`, :func:`tied_attention`, what comes before it,
:func:`tied_rotary`, and its step of generation, :func:`tied_attention_decode`, a whole layer,
:func:`crate_block`, the stem, :func:`patch_embedding`, and of CRATE-alpha its ISTA,
:func:`overcomplete_ista`, and what is between its steps, :func:`residual_norm`, and of the
language models the embeddings, :func:`tied_embedding`, and the loss, :func:`cross_entropy`, each
with its ``*_reference`` twin.
Models: :func:`fuse` swaps the layers of an existing one, :func:`unfuse` swaps them back,
:func:`prepare_for_inference` makes once what a call makes of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import models, nn, whitebox
from .backends import Explanation
from .block.op import crate_block, explain_crate_block
from .block.reference import crate_block_reference, crate_block_reference_backward
from .cross_entropy.op import cross_entropy, explain_cross_entropy
from .cross_entropy.reference import cross_entropy_reference, cross_entropy_reference_backward
from .decode.op import explain_tied_attention_decode, tied_attention_decode
from .decode.reference import tied_attention_decode_reference
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
from .nn.inference import prepare_for_inference
from .overcomplete_ista.op import explain_overcomplete_ista, overcomplete_ista
from .overcomplete_ista.reference import (
    overcomplete_ista_reference,
    overcomplete_ista_reference_backward,
)
from .patch_embedding.op import explain_patch_embedding, patch_embedding
from .patch_embedding.reference import (
    patch_embedding_reference,
    patch_embedding_reference_backward,
)
from .residual_norm.op import explain_residual_norm, residual_norm
from .residual_norm.reference import residual_norm_reference, residual_norm_reference_backward
from .rotary.op import explain_tied_rotary, tied_rotary
from .rotary.reference import tied_rotary_reference, tied_rotary_reference_backward
from .tied_embedding.op import explain_tied_embedding, tied_embedding
from .tied_embedding.reference import (
    tied_embedding_reference,
    tied_embedding_reference_backward,
)

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "crate_block",
    "crate_block_reference",
    "crate_block_reference_backward",
    "cross_entropy",
    "cross_entropy_reference",
    "cross_entropy_reference_backward",
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
    "overcomplete_ista",
    "overcomplete_ista_reference",
    "overcomplete_ista_reference_backward",
    "patch_embedding",
    "patch_embedding_reference",
    "patch_embedding_reference_backward",
    "prepare_for_inference",
    "residual_norm",
    "residual_norm_reference",
    "residual_norm_reference_backward",
    "tied_attention",
    "tied_attention_decode",
    "tied_attention_decode_reference",
    "tied_attention_reference",
    "tied_attention_reference_backward",
    "tied_embedding",
    "tied_embedding_reference",
    "tied_embedding_reference_backward",
    "tied_rotary",
    "tied_rotary_reference",
    "tied_rotary_reference_backward",
    "unfuse",
    "whitebox",
]


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backends fit ``op`` called with these arguments, and why the others do not.

    ``print(crate_kernels.explain("mssa", x, w_qkv, w_out, b_out, heads=12))``. ``op`` is the name
    of an op of this package; the other arguments are that op's own (without backend). Bad arguments
    raise as the op itself would.
    """
    explainers: dict[str, Callable[..., Explanation]] = {
        "mssa": explain_mssa,
        "tied_attention": explain_tied_attention,
        "tied_attention_decode": explain_tied_attention_decode,
        "tied_rotary": explain_tied_rotary,
        "ista": explain_ista,
        "crate_block": explain_crate_block,
        "patch_embedding": explain_patch_embedding,
        "overcomplete_ista": explain_overcomplete_ista,
        "residual_norm": explain_residual_norm,
        "cross_entropy": explain_cross_entropy,
        "tied_embedding": explain_tied_embedding,
    }
    if op not in explainers:
        raise ValueError(f"explain: expected op to be one of {sorted(explainers)}, got {op!r}")
    return explainers[op](*args, **kwargs)
