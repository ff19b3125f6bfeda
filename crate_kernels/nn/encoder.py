"""The encoder of CRATE on :func:`crate_kernels.crate_block`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..block import of_few
from ..block.op import MEMORY, PARAMETERS, chained_block
from ..checks import refuse
from ..library import autocast_dtype, autocast_is_on
from .encoder_recognition import published_forward, reason_against_step
from .inference import Constants, LayerConstants, layer_constants
from .layers import (
    ISTA,
    MSSA,
    dropout_reason,
    has_hooks,
    is_called_plainly,
    log_once,
    reason_against_dtypes,
    unfused_reason,
)
from .recognition import Verdicts

Observer = Callable[["Layers", int, Tensor, Tensor], None]


class Layers(nn.Module):
    """Pairs of steps, ``layers``, that may be observed: what our stacks have in common."""

    _steps: tuple[type[nn.Module], ...] = ()  # classes known to compute fn(norm(x))
    _observers: tuple[Observer, ...] = ()

    def __init__(self, layers: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in layers)

    def know_steps(self) -> None:
        """The classes of the steps that there are now are known to compute fn(norm(x))."""
        self._steps = tuple({type(step) for step in self._all_steps()})

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Inside the block, ``observer(encoder, i, x, y)`` is called after layer i took x to y.

        x and y are (B, N, D), as they are between the layers. The layers run as without. Under
        DataParallel ``encoder`` is the replica at work. A call with return_attention or return_key
        is not observed.
        """
        self._observers = (*self._observers, observer)
        try:
            yield
        finally:
            rest = list(self._observers)
            rest.remove(observer)
            self._observers = tuple(rest)
            if not rest:
                del self._observers

    def before_attention(self, i: int, x: Tensor) -> tuple[nn.Module, Tensor]:
        """The MSSA of layer i, and what it takes where x enters the layer. No hook is called."""
        layers: Any = self.layers
        attn, _ = layers[i]
        return attn.fn, attn.norm.forward(x)

    def _observe(self, i: int, x: Tensor | None, y: Tensor) -> None:
        for observer in self._observers:
            if x is not None:
                observer(self, i, x, y)

    def _all_steps(self) -> list[nn.Module]:
        layers: Any = self.layers
        return [step for pair in layers for step in pair]


class Blocks(Layers):
    """Layers that run as one op each."""

    _memory = "default"

    @property
    def memory(self) -> str:
        """What each layer keeps for the backward pass; may be set."""
        return self._memory

    @memory.setter
    def memory(self, value: str) -> None:
        check_memory(type(self).__name__, value)
        self._memory = value


class Encoder(Blocks):
    r"""A stack of CRATE layers, ``z = x + MSSA(LN(x))``, ``x = ISTA(LN(z))``; x is (B, N, D).

    Each layer is one :func:`crate_kernels.crate_block`, or its modules one by one where the op
    would pass over something: whatever :class:`MSSA` names, a hook on the norms, on ``fn`` or on
    the modules that hold them, norms that are no plain affine LayerNorm or differ in eps, a step
    size or lambda in a tensor, a step of a class that was not there before, parameters of several
    dtypes without autocast. The log names each such reason once.

    Args:
        layers: pairs of modules with children ``norm`` and ``fn``, the first's fn an
            :class:`MSSA`, the second's an :class:`ISTA`.
        memory: "default" or "low", what each layer keeps for the backward pass
            (:func:`crate_kernels.crate_block`).

    Returns the dtype that the published modules would: under autocast float32 on a GPU, else that
    of x (float32 for float16 x under bfloat16 and the reverse).
    Between the layers x is in autocast's dtype.

    Raises:
        ValueError: memory is none of these, or a step is not ``fn(norm(x))``.

    Keys: ``layers.{i}.0.*`` (MSSA) and ``layers.{i}.1.*`` (ISTA).

    Source: arXiv 2311.13110, section 2.
    """

    constants: Constants | None = None  # of prepare_for_inference

    def __init__(
        self, layers: Iterable[tuple[nn.Module, nn.Module]], memory: str = "default"
    ) -> None:
        super().__init__(layers)
        self.memory = memory
        seen: Verdicts = {}
        for step in self._all_steps():
            reason = reason_against_step(step, seen)
            if reason is not None:
                refuse("Encoder", "steps that compute fn(norm(x))", f"one where {reason}")
        self.know_steps()

    def forward(
        self, x: Tensor, return_attention: bool = False, return_key: bool = False
    ) -> Tensor:
        """x (B, N, D) -> the same; with a flag, what the first MSSA returns for it."""
        if return_attention or return_key:
            return self.plain_forward(x, return_attention, return_key)
        unfused_dtype = torch.promote_types(x.dtype, autocast_dtype(x))
        if x.is_cuda and autocast_is_on("cuda"):
            unfused_dtype = torch.promote_types(x.dtype, torch.float32)
        return self.narrow(x).to(unfused_dtype)

    def narrow(self, x: Tensor) -> Tensor:
        """:meth:`forward` in the dtype that the tokens have between the layers: one pass less."""
        return _run_in_a_row([self], x)

    def train(self, mode: bool = True) -> Encoder:
        if mode:
            vars(self).pop("constants", None)
        return super().train(mode)

    plain_forward = published_forward


def run_encoders(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """``blocks`` one after the other; fused ones that come to nothing but their layers as the
    layers of one :meth:`Encoder.narrow`, in whose dtype x is then returned."""
    wide = torch.promote_types(x.dtype, autocast_dtype(x))
    fused: list[Encoder] = []  # not run yet
    for block in blocks:
        if type(block) is Encoder and is_called_plainly(block):
            fused.append(block)
            continue
        x = _run_in_a_row(fused, x)
        fused = []
        x = block(x.to(torch.promote_types(x.dtype, wide)))
    return _run_in_a_row(fused, x)


def _run_in_a_row(encoders: Iterable[Encoder], x: Tensor) -> Tensor:
    each: list[Any] = list(encoders)
    layers = [(e, i, attn, ff) for e in each for i, (attn, ff) in enumerate(e.layers)]
    reasons = [unfused_block_reason(attn, ff, e._steps, x) for e, _, attn, ff in layers]
    # Between which layers: tokens that no observer sees go from op to op, nowhere else.
    alone = [r is None and not e._observers for r, (e, *_) in zip(reasons, layers, strict=True)]
    if len(each) == 1 and each[0].constants is not None and all(alone):
        y = _all_at_once(each[0].layers, x, each[0].constants)
        if y is not None:
            return y
    pairs = [a and b for a, b in itertools.pairwise(alone)]
    chained = [False, *pairs, False]
    moments = None
    for k, (encoder, i, attn, ff) in enumerate(layers):
        if reasons[k] is None:
            place = {"follows": chained[k], "precedes": chained[k + 1], "memory": encoder.memory}
            y, moments = _run(attn, ff, x, moments, encoder.constants, i, **place)
        else:
            moments = None
            if not torch.compiler.is_compiling():
                log_once(f"a layer of an Encoder runs unfused: {reasons[k]}")
            y = ff(attn(x) + x)
        encoder._observe(i, x, y)
        x = y
    return x


def check_memory(caller: str, memory: Any) -> None:
    if memory not in MEMORY:
        refuse(caller, f"memory to be one of {MEMORY}", repr(memory))


def _run(
    attn: Any,
    ff: Any,
    x: Tensor,
    moments: Tensor | None,
    kept: Constants | None,
    i: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    given = dict(zip(PARAMETERS, _parameters(attn, ff), strict=True))
    heads = attn.fn.heads
    made: dict[str, Any] = {"gram": None}
    constants = None if kept is None else _constants(kept, i, attn, ff, x)
    if constants is not None:
        given |= {"w_qkv": constants.w_qkv, "w_out": constants.w_out}
        made = {k: getattr(constants, k) for k in ("gram", "folded_qkv", "folded_gram")}
    return chained_block(
        x,
        moments,
        *given.values(),
        heads=heads,
        scale=attn.fn.scale,
        causal=False,
        eps=attn.norm.eps,
        step_size=ff.fn.step_size,
        lambd=ff.fn.lambd,
        backend="auto",
        **made,
        **options,
    )


def _constants(kept: Constants, i: int, attn: Any, ff: Any, x: Tensor) -> LayerConstants | None:
    given = dict(zip(PARAMETERS, _parameters(attn, ff), strict=True))
    return layer_constants(kept, i, x, given, ff.fn.step_size, attn.fn.heads)


def _all_at_once(layers: Any, x: Tensor, kept: Constants) -> Tensor | None:
    """All layers as one op; None where that is not the way."""
    options = {(attn.fn.heads, attn.fn.scale, attn.norm.eps) for attn, _ in layers}
    if len(options) != 1 or x.dim() != 3 or x.dtype != autocast_dtype(x):
        return None
    ((heads, scale, eps),) = options
    if not of_few.takes(x, len(layers), heads):
        return None
    found = []
    for i, (attn, ff) in enumerate(layers):
        constants = _constants(kept, i, attn, ff, x)
        if constants is None or constants.of_few is None:
            return None
        found.append(constants.of_few)
    thresholds = [ff.fn.step_size * ff.fn.lambd for _, ff in layers]
    return of_few.encoder_of_few(x, found, thresholds, heads=heads, scale=scale, eps=eps)


def _parameters(attn: Any, ff: Any) -> tuple[Any, ...]:
    """Of a layer, in the order of PARAMETERS."""
    to_out = attn.fn.to_out
    w_out, b_out = None, None
    if type(to_out) is not nn.Identity:
        w_out, b_out = to_out[0].weight, to_out[0].bias
    first, second = (attn.norm.weight, attn.norm.bias), (ff.norm.weight, ff.norm.bias)
    return *first, attn.fn.qkv.weight, w_out, b_out, *second, ff.fn.weight


def unfused_block_reason(
    attn: Any, ff: Any, known: tuple[type[nn.Module], ...], x: Tensor | None = None
) -> str | None:
    """Why a layer must run its modules one by one (on x) right now; None if it need not.

    ``known`` are the classes of steps that compute fn(norm(x)).
    """
    if _has_any_global_hook():
        return "hooks on all modules are registered"
    for side, step, kind in (("attention", attn, MSSA), ("dictionary", ff, ISTA)):
        reason = step_reason(side, step, (kind,), any(type(step) is cls for cls in known))
        if reason is not None:
            return reason
    if any(isinstance(t, Tensor) for t in (ff.fn.step_size, ff.fn.lambd)):
        return "the step size or lambda of its dictionary step is a tensor"
    if attn.norm.eps != ff.norm.eps or attn.norm.eps <= 0:
        return f"the eps of its norms are not one > 0: {attn.norm.eps:g} and {ff.norm.eps:g}"
    reason = unfused_reason(attn.fn) or dropout_reason(attn.fn)
    if reason is not None or x is None:
        return reason
    return reason_against_dtypes(x, *_parameters(attn, ff))


def step_reason(
    side: str,
    step: Any,
    kinds: tuple[type[nn.Module], ...],
    is_known: bool,
    more: frozenset[str] = frozenset(),
) -> str | None:
    """Why calling ``step`` could do other than fn(norm(x)), a plain LayerNorm and then ``kinds``.

    ``is_known``: its class's forward does no more than that, but for the parameters ``more``.
    """
    children: dict[str, Any] = step._modules
    if not is_known:
        return f"its {side} step is a {type(step).__name__}, which was not there before"
    if set(children) != {"norm", "fn"} or set(step._parameters) - more or step._buffers:
        return f"its {side} step holds more or less than norm and fn"
    norm, fn = children["norm"], children["fn"]
    if all(type(fn) is not kind for kind in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        return f"its {side} step is {type(fn).__name__}, not {expected}"
    if type(norm) is not nn.LayerNorm or "forward" in norm.__dict__:
        return f"its {side} norm is no plain nn.LayerNorm"
    if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
        return f"its {side} norm has no weight and bias of shape (D,)"
    if any(has_hooks(m) or "forward" in m.__dict__ for m in (step, norm, fn)):
        return f"its {side} step, norm or fn has hooks or a replaced forward"
    return None
