"""prepare_for_inference(model): what a fused encoder makes of its weights, made once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..block.op import fold
from ..checks import refuse
from ..ista.op import gram_matrix
from ..library import autocast_dtype

_NAME = "prepare_for_inference"
Constants = dict[Any, "LayerConstants"]


@dataclass(frozen=True)
class LayerConstants:
    """Of one layer, in the dtype of its GEMMs: the two projections, the first with its norm folded
    into it where a kernel takes that, and G of its dictionary."""

    made_from: tuple[Any, ...]
    w_qkv: Tensor
    folded: tuple[Tensor, ...]
    w_out: Tensor | None
    gram: Tensor


def prepare_for_inference(model: nn.Module) -> None:
    """Keep, from now on, what the fused encoders in ``model`` make of their weights.

    Without it every call without gradients casts the projections of each layer to autocast's dtype,
    and compares its dictionary W with the one that G = eta (W - W^T W) was made from (a captured
    CUDA graph makes G itself). With it a layer is six kernels: two norms, two GEMMs, attention and
    ISTA. It shows where a batch is small. Sets ``model.eval()``; ``model.train()`` ends it. Results
    do not change.

    Weights that change in place (an optimizer, ``load_state_dict``) are noticed. Writes through
    ``.data``, and those of a CUDA graph, are not: call this again after them. A graph that was
    captured keeps the weights of its capture. Takes the memory of the weights once more, in the
    dtype of the GEMMs, and of the first projection twice.

    Args:
        model: a module after :func:`crate_kernels.fuse`.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: it has no fused encoder.
    """
    from .encoder import Encoder

    if not isinstance(model, nn.Module):
        refuse(_NAME, "model to be a torch.nn.Module", type(model).__name__, TypeError)
    encoders = [m for m in model.modules() if isinstance(m, Encoder)]
    if not encoders:
        refuse(_NAME, "a model with a fused Encoder (fuse(model))", "none")
    model.eval()
    for encoder in encoders:
        encoder.constants = {}


def layer_constants(
    kept: Constants,
    layer: Any,
    x: Tensor,
    norm1: tuple[Tensor, Tensor],
    w_qkv: Tensor,
    w_out: Tensor | None,
    ff: Any,
    heads: int,
) -> LayerConstants | None:
    """Those of ``layer`` for x, made where they are missing or their weights have changed.

    None where they must not be kept: with gradients, while compiling, and where they would have
    to be made while a CUDA graph is captured.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    dtype = autocast_dtype(x)
    weights = [t for t in (*norm1, w_qkv, w_out, ff.weight) if t is not None]
    made_from = (ff.step_size, *((t.data_ptr(), _version(t)) for t in weights))
    found = kept.get((layer, dtype, x.device))
    if found is not None and found.made_from == made_from:
        return found
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    backend = backends.choose("ista", "auto", x, dtype, None)
    attention = backends.choose("crate_block", "auto", x, dtype, w_qkv.shape[0] // heads)
    found = LayerConstants(
        made_from,
        w_qkv.detach().to(dtype),
        fold(w_qkv.detach(), norm1[0].detach(), norm1[1].detach(), dtype, attention),
        None if w_out is None else w_out.detach().to(dtype),
        gram_matrix(ff.weight.detach(), ff.step_size, dtype, backend),
    )
    kept[layer, dtype, x.device] = found
    return found


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version  # an inference tensor has none
