"""prepare_for_inference(model): what a fused encoder makes of its weights, made once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..block.of_few import LayerOfFew
from ..block.op import fold_norms
from ..checks import refuse
from ..ista.op import gram_matrix
from ..library import autocast_dtype

_NAME = "prepare_for_inference"
Constants = dict[Any, "LayerConstants"]


@dataclass(frozen=True)
class LayerConstants:
    """Of one layer, in the dtype of its GEMMs: the two projections, G of its dictionary, and the
    first and the last with the norms folded into them where kernels take that."""

    made_from: tuple[Any, ...]
    w_qkv: Tensor
    w_out: Tensor | None
    gram: Tensor
    folded_qkv: tuple[Tensor, ...]
    folded_gram: tuple[Tensor, ...]
    of_few: LayerOfFew | None  # the same as one op of all layers takes it


def prepare_for_inference(model: nn.Module) -> None:
    """Keep, from now on, what the fused encoders in ``model`` make of their weights.

    Without it every call without gradients casts the projections of each layer to autocast's dtype,
    and compares its dictionary W with the one that G = eta (W - W^T W) was made from (a captured
    CUDA graph makes G itself). With it a layer is six kernels: two norms (or what is left of them
    where there are many tokens), two GEMMs, attention and ISTA; of few tokens all layers are one
    kernel, the norms folded into its products. It shows where a batch is small.
    Sets ``model.eval()``; ``model.train()`` ends it. Results do not change, but for their rounding
    where there are few tokens.

    Weights that change in place (an optimizer, ``load_state_dict``) are noticed. Writes through
    ``.data``, those of a CUDA graph and those to inference tensors are not: call this again after
    them. A graph that was captured keeps the weights of its capture. Takes the memory of the
    weights once more, in the dtype of the GEMMs, and of the first projection and the dictionary
    twice.

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
    parameters: Mapping[str, Any],
    step_size: float,
    heads: int,
) -> LayerConstants | None:
    """Those of ``layer`` for x, made where they are missing or their weights have changed.

    ``parameters`` are those of crate_block, by name.

    None where they must not be kept: with gradients, while compiling, and where they would have
    to be made while a CUDA graph is captured.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    dtype = autocast_dtype(x)
    weights = [t for t in parameters.values() if t is not None]
    made_from = (step_size, *((t.data_ptr(), _version(t)) for t in weights))
    found = kept.get((layer, dtype, x.device))
    if found is not None and found.made_from == made_from:
        return found
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    given: Any = {name: None if t is None else t.detach() for name, t in parameters.items()}
    w_qkv, w_out = given["w_qkv"], given["w_out"]
    backend = backends.choose("ista", "auto", x, dtype, None)
    attention = backends.choose("crate_block", "auto", x, dtype, w_qkv.shape[0] // heads)
    gram = gram_matrix(given["weight"], step_size, dtype, backend)
    norms = [(given[f"norm{i}_weight"], given[f"norm{i}_bias"]) for i in (1, 2)]
    folded = fold_norms(norms[0], w_qkv, w_out, norms[1], gram, attention)
    w_out = None if w_out is None else w_out.to(dtype)
    of_few = None
    if all(folded) and w_out is not None and w_out.shape == w_qkv.shape:
        b_out = given["b_out"]
        bias = w_out.new_zeros(len(w_out)) if b_out is None else b_out
        of_few = LayerOfFew._make((*folded[0], w_out, bias.float(), *folded[1]))
    found = LayerConstants(made_from, w_qkv.to(dtype), w_out, gram, *folded, of_few)
    if x.is_cuda:  # another stream may be the next to read them
        torch.cuda.current_stream(x.device).synchronize()
    kept[layer, dtype, x.device] = found
    return found


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version  # an inference tensor has none
