"""The decoder of CRATE-MAE on :func:`crate_kernels.residual_norm`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..checks import refuse
from .encoder import Layers
from .encoder_recognition import published_decoder_forward, reason_against_decoder_layers
from .layers import MSSA, is_called_plainly
from .steps import added, run_step


class Decoder(Layers):
    r"""A stack of layers of CRATE-MAE's decoder, ``h = LN(x) A^T``, ``x = h - MSSA(LN(h))``.

    Each norm, with the difference before it where there is one, is one
    :func:`crate_kernels.residual_norm`; A and MSSA run as by themselves. A step runs as its
    modules, called one by one, for the reasons that :class:`AlphaEncoder` names.

    Args:
        layers: pairs of modules that compute ``fn(norm(x))`` with children ``norm`` and ``fn``, the
            first's fn a dictionary, ``F.linear(x, weight)``, the second's an :class:`MSSA`.

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
        h, y, before = self._run(x, None)
        x = _difference(h, y)
        self._observe(len(self.layers) - 1, before, x)
        return x

    def _run(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """:meth:`forward` of x - y up to its last difference, of the first two that it returns.

        The third is what enters the last layer.
        """
        layers: Any = self.layers
        before = None
        for i, (dictionary, attn) in enumerate(layers):
            stream = (x, y, None if y is None else -1.0)
            z, h, _ = run_step(self, "dictionary", dictionary, self._dictionaries, *stream)
            self._observe(i - 1, before, z)
            x, y, _ = run_step(self, "attention", attn, (MSSA,), h, None, None)
            before = z
        return x, y, before

    def before_attention(self, i: int, x: Tensor) -> tuple[nn.Module, Tensor]:
        layers: Any = self.layers
        dictionary, attn = layers[i]
        h = dictionary.fn.forward(dictionary.norm.forward(x))
        return attn.fn, attn.norm.forward(h)

    plain_forward = published_decoder_forward


def run_decoders(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """``blocks`` one after the other; one op has the difference that a fused one ends with and the
    norm that the next begins with."""
    y = None
    for block in blocks:
        if type(block) is Decoder and is_called_plainly(block) and not block._observers:
            x, y, _ = block._run(x, y)
        else:
            x, y = block(_difference(x, y)), None
    return _difference(x, y)


def _difference(x: Tensor, y: Tensor | None) -> Tensor:
    return added(x, y, -1.0)
