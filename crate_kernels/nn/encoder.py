"""The encoder of CRATE on :func:`crate_kernels.crate_block`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..block.op import MEMORY, crate_block
from ..checks import refuse
from ..library import autocast_is_on
from .layers import ISTA, MSSA, has_hooks, log_once, unfused_reason


class Encoder(nn.Module):
    r"""A stack of CRATE layers, ``z = x + MSSA(LN(x))``, ``x = ISTA(LN(z))``; x is (B, N, D).

    Each layer is one :func:`crate_kernels.crate_block`, or its modules one by one where the op
    would pass over something: whatever :class:`MSSA` names, a hook on the norms, on ``fn`` or on
    the modules that hold them, norms that are no plain affine LayerNorm or differ in eps. The log
    names each such reason once.

    Args:
        layers: pairs of modules with children ``norm`` and ``fn``, the first's fn an
            :class:`MSSA`, the second's an :class:`ISTA`.
        memory: "default" or "low", what each layer keeps for the backward pass
            (:func:`crate_kernels.crate_block`).

    Returns, like the published modules: float32 under autocast on a GPU, else the dtype of x.
    Between the layers x is in autocast's dtype.

    Keys: ``layers.{i}.0.*`` (MSSA) and ``layers.{i}.1.*`` (ISTA).

    Source: arXiv 2311.13110, section 2.
    """

    memory = "default"

    def __init__(
        self, layers: Iterable[tuple[nn.Module, nn.Module]], memory: str = "default"
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in layers)
        check_memory("Encoder", memory)
        self.memory = memory

    def forward(
        self, x: Tensor, return_attention: bool = False, return_key: bool = False
    ) -> Tensor:
        """x (B, N, D) -> the same; with a flag, what the first MSSA returns for it."""
        if return_attention or return_key:
            return self.plain_forward(x, return_attention, return_key)
        unfused_dtype = torch.float32 if x.is_cuda and autocast_is_on("cuda") else x.dtype
        layers: Any = self.layers
        for attn, ff in layers:
            reason = unfused_block_reason(attn, ff)
            if reason is None:
                x = _run(attn, ff, x, self.memory)
            else:
                if not torch.compiler.is_compiling():
                    log_once(f"a layer of an Encoder runs unfused: {reason}")
                x = ff(attn(x) + x)
        return x if x.dtype == torch.float64 else x.to(unfused_dtype)

    def plain_forward(
        self, x: Tensor, return_attention: bool = False, return_key: bool = False
    ) -> Tensor:
        """The published forward: what :meth:`forward` computes, module by module."""
        layers: Any = self.layers
        for attn, ff in layers:
            if return_attention:
                return attn(x, return_attention=True)
            if return_key:
                return attn(x, return_key=True)
            x = ff(attn(x) + x)
        return x


def check_memory(caller: str, memory: Any) -> None:
    if memory not in MEMORY:
        refuse(caller, f"memory to be one of {MEMORY}", repr(memory))


def _run(attn: Any, ff: Any, x: Tensor, memory: str) -> Tensor:
    mssa, ista = attn.fn, ff.fn
    out = None if type(mssa.to_out) is nn.Identity else mssa.to_out[0]
    return crate_block(
        x,
        attn.norm.weight,
        attn.norm.bias,
        mssa.qkv.weight,
        None if out is None else out.weight,
        None if out is None else out.bias,
        ff.norm.weight,
        ff.norm.bias,
        ista.weight,
        heads=mssa.heads,
        scale=mssa.scale,
        eps=attn.norm.eps,
        step_size=ista.step_size,
        lambd=ista.lambd,
        memory=memory,
    )


def unfused_block_reason(attn: Any, ff: Any) -> str | None:
    """Why a layer must run its modules one by one right now; None if it need not."""
    if _has_any_global_hook():
        return "hooks on all modules are registered"
    for side, step, kind in (("attention", attn, MSSA), ("dictionary", ff, ISTA)):
        children: dict[str, Any] = step._modules
        if set(children) != {"norm", "fn"}:
            return f"its {side} step holds {sorted(children)}, not norm and fn"
        norm, fn = children["norm"], children["fn"]
        if type(fn) is not kind:
            return f"its {side} step is {type(fn).__name__}, not {kind.__name__}"
        if type(norm) is not nn.LayerNorm or "forward" in norm.__dict__:
            return f"its {side} norm is no plain nn.LayerNorm"
        if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
            return f"its {side} norm has no weight and bias of shape (D,)"
        if any(has_hooks(m) or "forward" in m.__dict__ for m in (step, norm, fn)):
            return f"its {side} step, norm or fn has hooks or a replaced forward"
    if attn.norm.eps != ff.norm.eps:
        return f"its norms differ in eps, {attn.norm.eps:g} and {ff.norm.eps:g}"
    return unfused_reason(attn.fn)
