"""The decoder of CRATE-MAE on an op for each layer, block/decoder.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..block.decoder import decoder_block
from ..checks import refuse
from .encoder import Blocks, _parameters
from .encoder_recognition import published_decoder_forward, reason_against_decoder_layers
from .layers import MSSA, dropout_reason, is_called_plainly, log_once, reason_against_dtypes
from .steps import added, run_step, unfused_step_reason


class Decoder(Blocks):
    r"""A stack of layers of CRATE-MAE's decoder, ``h = LN(x) A^T``, ``x = h - MSSA(LN(h))``.

    Each layer is one op, or its steps one by one where that would pass over something: each norm,
    with the difference before it where there is one, is one :func:`crate_kernels.residual_norm`
    then; A and MSSA run as by themselves; and the step itself runs as its modules, called one by
    one, for the reasons that :class:`AlphaEncoder` names. An active dropout, norms that differ in
    eps and an MSSA without output projection are no such reasons, and not in the op either. The log
    names each reason once.

    Args:
        layers: pairs of modules that compute ``fn(norm(x))`` with children ``norm`` and ``fn``, the
            first's fn a dictionary, ``F.linear(x, weight)``, the second's an :class:`MSSA`.

    ``memory``, "default" or "low", is what each op keeps for the backward pass, in tensors of
    B*N*D elements: x, h, MSSA's projection and its heads' results, or these without the projection,
    which one more GEMM makes again. x is the result of the layer before, kept once.

    x is (B, N, D). Returns the dtype that the published modules would: autocast's, else that of x.

    Raises:
        ValueError: a step is no such module.

    Keys: ``layers.{i}.0.*`` (A) and ``layers.{i}.1.*`` (MSSA).

    Source: arXiv 2404.02446.
    """

    _dictionaries: tuple[type[nn.Module], ...] = ()  # classes known to compute F.linear(x, weight)

    def __init__(self, layers: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__(layers)
        reason = reason_against_decoder_layers(self, {})
        if reason is not None:
            expected = "pairs of fn(norm(x)), of a dictionary and of an MSSA"
            refuse("Decoder", expected, f"one where {reason}")
        self.know_steps()

    def know_steps(self) -> None:
        super().know_steps()
        layers: Any = self.layers
        self._dictionaries = tuple({type(dictionary.fn) for dictionary, _ in layers})

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> the same."""
        h, y, _, before = self._run(x, None, None)
        x = _difference(h, y)
        self._observe(len(self.layers) - 1, before, x)
        return x

    def _run(
        self, x: Tensor, y: Tensor | None, moments: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """:meth:`forward` of x - y up to its last difference, of the first two that it returns;
        y may be None. Moments are the op's, of x, where it made x.

        The fourth is what enters the last layer.
        """
        layers: Any = self.layers
        before = None
        for i, (dictionary, attn) in enumerate(layers):
            reason = self._unfused_reason(dictionary, attn, x)
            if reason is None:
                z, moments = _difference(x, y), moments if y is None else None
                self._observe(i - 1, before, z)
                x, moments = decoder_block(
                    z, moments, *_parameters(attn, dictionary), heads=attn.fn.heads,
                    scale=attn.fn.scale, eps=attn.norm.eps, memory=self.memory,
                )  # fmt: skip
                y = None
            else:
                if not torch.compiler.is_compiling():
                    log_once(f"Decoder: a layer runs step by step: {reason}")
                stream = (x, y, None if y is None else -1.0)
                z, h, _ = run_step(self, "dictionary", dictionary, self._dictionaries, *stream)
                self._observe(i - 1, before, z)
                x, y, _ = run_step(self, "attention", attn, (MSSA,), h, None, None)
                moments = None
            before = z
        return x, y, moments, before

    def _unfused_reason(self, dictionary: Any, attn: Any, x: Tensor) -> str | None:
        """Why a layer is not one op on x right now; None if it is."""
        for side, step, kinds in (
            ("dictionary", dictionary, self._dictionaries),
            ("attention", attn, (MSSA,)),
        ):
            reason = unfused_step_reason(side, step, kinds, self._steps)
            if reason is not None:
                return reason
        if type(attn.fn.to_out) is nn.Identity:
            return "its attention has no output projection"
        if attn.norm.eps != dictionary.norm.eps:
            return f"its norms differ in eps: {dictionary.norm.eps:g} and {attn.norm.eps:g}"
        parameters = _parameters(attn, dictionary)
        return dropout_reason(attn.fn) or reason_against_dtypes(x, *parameters)

    def before_attention(self, i: int, x: Tensor) -> tuple[nn.Module, Tensor]:
        layers: Any = self.layers
        dictionary, attn = layers[i]
        h = dictionary.fn.forward(dictionary.norm.forward(x))
        return attn.fn, attn.norm.forward(h)

    plain_forward = published_decoder_forward


def run_decoders(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """``blocks`` one after the other; what the op of a fused one knows of the rows that it made, or
    the difference that one run by steps ends with, goes to the next one's first norm."""
    y = moments = None
    for block in blocks:
        if type(block) is Decoder and is_called_plainly(block) and not block._observers:
            x, y, moments, _ = block._run(x, y, moments)
        else:
            x, y, moments = block(_difference(x, y)), None, None
    return _difference(x, y)


def _difference(x: Tensor, y: Tensor | None) -> Tensor:
    return added(x, y, -1.0)
