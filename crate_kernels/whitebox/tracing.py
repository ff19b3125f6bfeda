"""The context manager: what it is told, what it does at each layer, and what it found."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_number, refuse
from ..library import autocast_dtype
from ..nn.encoder import Layers
from ..nn.fusion import Layer
from . import measures, places
from .places import Place
from .report import Row, Table

SAMPLES = 16
# Gram matrices wait for their determinants, which cost less together, up to this many bytes.
PENDING = 1 << 28
# What values() knows; each is (samples,) but for the terms of the heads, (samples, H).
MEASURES = ("coding_rate", "compressed_rate", "rate_reduction", "sparsity", "compressed_rates")

_RATE, _RATES, _ZEROS, _ROWS = "coding_rate", "compressed_rates", "sparsity", "attention"


@dataclass(frozen=True)
class AttentionRows:
    """Which rows of the attention maps to keep; None: all heads, all layers."""

    heads: tuple[int, ...] | None = None
    queries: tuple[int, ...] = (0,)
    layers: tuple[int, ...] | None = None

    @staticmethod
    def of(option: Any) -> AttentionRows | None:
        if option is None or option is False:
            return None
        if option is True:
            return AttentionRows()
        known = ("heads", "queries", "layers")
        if not isinstance(option, Mapping) or not set(option) <= set(known):
            got = sorted(option) if isinstance(option, Mapping) else type(option).__name__
            refuse("trace", f"attention to be True or a dict with some of {known}", got)
        chosen = {}
        for name, value in option.items():
            if value is None and name != "queries":
                continue
            whole = isinstance(value, Sequence) and not isinstance(value, str)
            if not whole or not value or not all(type(i) is int for i in value):
                refuse("trace", f"attention's {name} to be a list of ints", repr(value))
            chosen[name] = tuple(value)
        return AttentionRows(**chosen)


@dataclass
class _Store:
    """What was found on one device, in the order in which it was found."""

    found: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    pending: list[tuple[int, str, Tensor, float]] = field(default_factory=list)
    bytes: int = 0

    def add(self, layer: int, measure: str, value: Tensor) -> None:
        self.found.setdefault((layer, measure), []).append(value)

    def postpone(self, layer: int, measure: str, gram: Tensor, factor: float) -> None:
        """To become ``measures.half_logdet(gram, factor)``."""
        self.pending.append((layer, measure, gram, factor))
        self.bytes += gram.numel() * gram.element_size()
        if self.bytes > PENDING:
            self.flush()

    def flush(self) -> None:
        """All determinants that are due, those of one size in one call."""
        waiting, self.pending, self.bytes = self.pending, [], 0
        alike: dict[Any, list[int]] = {}
        for i, (_, _, gram, factor) in enumerate(waiting):
            alike.setdefault((gram.shape[-1], gram.dtype, factor), []).append(i)
        results: dict[int, Tensor] = {}
        for (_, _, factor), several in alike.items():
            grams = [waiting[i][2] for i in several]
            flat = torch.cat([gram.flatten(0, -3) for gram in grams])
            found = measures.half_logdet(flat, factor)
            parts = found.split([gram.shape[:-2].numel() for gram in grams])
            for i, gram, part in zip(several, grams, parts, strict=True):
                results[i] = part.view(gram.shape[:-2])
        for i, (layer, measure, _, _) in enumerate(waiting):
            self.add(layer, measure, results[i])


class _Turns:
    """The layers that share a module, in turn: which of them its next call is."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.calls: dict[torch.device, int] = {}

    def take(self, device: torch.device) -> int:
        calls = self.calls.get(device, 0)
        self.calls[device] = calls + 1
        return self.layers[calls % len(self.layers)]


class Trace:
    """What :func:`trace` returns; results are kept after the block and over several blocks."""

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: bool,
        sparsity: bool,
        coherence: bool,
        attention: AttentionRows | None,
        samples: int | None,
        eps: float,
        normalise: bool,
    ) -> None:
        self.model, self.samples, self.eps, self.normalise = model, samples, eps, normalise
        self.rate, self.sparsity, self.coherence_wanted = rate, sparsity, coherence
        self.attention_wanted = attention
        found = places.find(model)
        self._places: list[Place] = found.places
        self.skipped: list[Layer] = found.skipped
        if not self._places:
            reasons = "; ".join(str(layer) for layer in self.skipped[:3])
            refuse("trace", "a model with layers that fuse recognises", reasons or "none")
        self._watched = self._layers_of_attention()
        self._stores: dict[torch.device, _Store] = {}
        self._coherence: dict[int, Tensor] = {}
        self._exits: contextlib.ExitStack | None = None

    def _layers_of_attention(self) -> set[int]:
        wanted, count = self.attention_wanted, len(self._places)
        if wanted is None:
            return set()
        layers = range(count) if wanted.layers is None else wanted.layers
        for layer in layers:
            if not -count <= layer < count:
                refuse("trace", f"attention's layers among the {count} of the model", layer)
            heads = self._places[layer].heads
            for head in wanted.heads or ():
                if not -heads <= head < heads:
                    refuse("trace", f"attention's heads among {heads}", head)
        return {layer % count for layer in layers}

    @property
    def layers(self) -> list[str]:
        """The names of the layers, in the order of the model's modules."""
        return [place.name for place in self._places]

    # ---- the block

    def __enter__(self) -> Trace:
        if self._exits is not None:
            refuse("trace", "a trace that is not active", "one inside its own block")
        reason = places.unreadable(self.model)
        if reason is not None:
            refuse("trace", "a model with whole parameters on a device", reason)
        found = places.find(self.model)  # it may have been fused since
        if [place.name for place in found.places] != self.layers:
            refuse("trace", f"the model as it was, with layers {self.layers}", "others")
        self._places, self.skipped = found.places, found.skipped
        with contextlib.ExitStack() as exits:
            exits.enter_context(torch.compiler.set_stance("force_eager"))
            self._attach(exits)
            if self.coherence_wanted:
                self._measure_coherence()
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        exits, self._exits = self._exits, None
        if exits is not None:
            exits.close()

    def _attach(self, exits: contextlib.ExitStack) -> None:
        encoders: dict[Layers, dict[int, _Turns]] = {}
        modules: dict[tuple[nn.Module, bool], _Turns] = {}
        for layer, place in enumerate(self._places):
            if place.encoder is not None:
                turns = encoders.setdefault(place.encoder, {})
                turns.setdefault(place.index, _Turns()).layers.append(layer)
                continue
            for module, after in ((place.attention, False), (place.dictionary, True)):
                if module is not None:
                    modules.setdefault((module, after), _Turns()).layers.append(layer)
        for encoder, turns in encoders.items():
            observer = functools.partial(self._after_layer, turns)
            exits.enter_context(encoder.observed(observer))
        for (module, after), turn in modules.items():
            if after:
                handle = module.register_forward_hook(functools.partial(self._after_ista, turn))
            else:
                hook: Any = functools.partial(self._before_mssa, turn)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            exits.callback(handle.remove)

    def _measure_coherence(self) -> None:
        for layer, place in enumerate(self._places):
            if place.subspaces is not None:
                self._coherence[layer] = measures.subspace_coherence(place.subspaces)

    # ---- what is called while the model runs; nothing here waits for the device

    def _after_layer(
        self, turns: dict[int, _Turns], encoder: Any, index: int, x: Tensor, y: Tensor
    ) -> None:
        if index not in turns or _recomputing():
            return
        layer = turns[index].take(x.device)
        with torch.no_grad():
            if self.rate or layer in self._watched:
                # No hook is called: the layer has run.
                self._see_normed(layer, *encoder.before_attention(index, x[: self.samples]))
            if self._places[layer].dictionary is not None:
                self._see_output(layer, y)

    def _before_mssa(self, turn: _Turns, module: Any, args: Any, kwargs: Any) -> None:
        h = args[0] if args else next(iter(kwargs.values()))
        if _recomputing():
            return
        layer = turn.take(h.device)
        with torch.no_grad():
            if self.rate or layer in self._watched:
                self._see_normed(layer, module, h[: self.samples])

    def _after_ista(self, turn: _Turns, module: Any, args: Any, y: Tensor) -> None:
        if _recomputing():
            return
        with torch.no_grad():
            self._see_output(turn.take(y.device), y)

    def _see_normed(self, layer: int, attention: Any, h: Tensor) -> None:
        """h (B, N, D), what MSSA takes."""
        store, h = self._store(h), h.to(autocast_dtype(h))  # as its GEMM takes it
        w = places.project(attention, h)
        if self.rate:
            for measure, z in ((_RATE, h), (_RATES, w)):
                gram = measures.gram(z, normalise=self.normalise)
                store.postpone(layer, measure, gram, measures.gram_factor(z, self.eps))
        wanted = self.attention_wanted
        if wanted is not None and layer in self._watched:
            if wanted.heads is not None:
                w = torch.stack([w.select(1, head) for head in wanted.heads], dim=1)
            rows = measures.attention_rows(w, wanted.queries, **places.options_of(attention))
            store.add(layer, _ROWS, rows)

    def _see_output(self, layer: int, y: Tensor) -> None:
        if self.sparsity:
            self._store(y).add(layer, _ZEROS, measures.sparsity(y.detach()[: self.samples]))

    def _store(self, t: Tensor) -> _Store:
        return self._stores.setdefault(t.device, _Store())

    # ---- what was found; this waits for the device

    def values(self, measure: str, layer: int) -> Tensor:
        """One number for each sample, as the batches came: (samples,), float64 on the CPU.

        Args:
            measure: "coding_rate", "compressed_rate", "rate_reduction" (their difference),
                "sparsity", or "compressed_rates", (samples, H), whose sum over the heads is the
                compressed rate.
            layer: its number, as in the table; negative from the end.

        Raises:
            ValueError: an unknown measure or layer, or one that was not measured.
        """
        if measure not in MEASURES:
            refuse("values", f"measure to be one of {MEASURES}", repr(measure))
        found = self._values(measure, self._number(layer))
        if found is None:
            refuse("values", f"a layer with {measure} measured", f"layer {layer}, without")
        return found

    def attention(self, layer: int) -> Tensor:
        """The kept rows of a layer's attention maps: (samples, heads, queries, N), on the CPU.

        Raises:
            ValueError: none were kept, or batches differ in N.
        """
        pieces = self._pieces(self._number(layer), _ROWS)
        if not pieces:
            refuse("attention", "a layer of which rows were kept", f"layer {layer}, without")
        lengths = {rows.shape[-1] for rows in pieces}
        if len(lengths) > 1:
            refuse("attention", "batches of one N", sorted(lengths))
        return torch.cat(pieces)

    def coherence(self, layer: int) -> Tensor:
        """:func:`measures.subspace_coherence` of a layer's U as it was entering the block: (H, H).

        Raises:
            ValueError: it was not asked for.
        """
        number = self._number(layer)
        if number not in self._coherence:
            refuse("coherence", "trace(coherence=True) and a block", "none")
        return self._coherence[number].cpu()

    def table(self) -> Table:
        """A row for each layer that ran; print it.

        Raises:
            ValueError: no layer ran inside the block.
        """
        rows = [row for layer in range(len(self._places)) if (row := self._row(layer)) is not None]
        if not rows:
            refuse(
                "trace",
                "a forward pass of the model inside the block",
                "none (a replayed CUDA graph is none)",
            )
        return Table(rows, self.skipped)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """The table as a picture: rates, and the fraction of nonzeros, over the layers.

        Needs matplotlib; the format goes by the ending of ``path``.
        """
        self.table().plot(path)

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """The table with numbers in full, a line for each layer."""
        self.table().write_csv(path)

    def _number(self, layer: int) -> int:
        count = len(self._places)
        if not isinstance(layer, int) or not -count <= layer < count:
            refuse("trace", f"layer to be one of {count}", layer)
        return layer % count

    def _pieces(self, layer: int, measure: str) -> list[Tensor]:
        """On the CPU; of several devices one of each in turn, as DataParallel splits batches."""
        several = []
        for device in sorted(self._stores, key=lambda d: d.index or 0):
            self._stores[device].flush()
            several.append(self._stores[device].found.get((layer, measure), []))
        turns = itertools.zip_longest(*several)
        return [piece.cpu() for turn in turns for piece in turn if piece is not None]

    def _values(self, measure: str, layer: int) -> Tensor | None:
        if measure == "compressed_rate":
            rates = self._values(_RATES, layer)
            return None if rates is None else rates.sum(-1)
        if measure == "rate_reduction":
            rate, compressed = (self._values(m, layer) for m in (_RATE, "compressed_rate"))
            return None if rate is None or compressed is None else rate - compressed
        pieces = self._pieces(layer, measure)
        return torch.cat(pieces).double() if pieces else None

    def _row(self, layer: int) -> Row | None:
        values = {m: self._values(m, layer) for m in MEASURES[:4]}
        count = max((len(v) for v in values.values() if v is not None), default=0)
        rows = self._pieces(layer, _ROWS)
        count = count or sum(len(piece) for piece in rows)
        if count == 0:
            return None
        coherence = self._coherence.get(layer)
        return Row.of(layer, self._places[layer].name, count, values, coherence)


def trace(
    model: nn.Module,
    *,
    rate: bool = True,
    sparsity: bool = True,
    coherence: bool = False,
    attention: bool | Mapping[str, Sequence[int] | None] | None = None,
    samples: int | None = SAMPLES,
    eps: float = measures.EPS,
    normalise: bool = True,
) -> Trace:
    """Measure the layers of ``model`` in every forward pass inside a with block.

    ``with trace(model) as t: model(x)``, then ``print(t.table())``. A fused encoder keeps running
    each layer as one op; results stay on the device until they are asked for. Leaving the block,
    also by an exception, leaves the model as it was.

    Args:
        model: with layers that :func:`crate_kernels.fuse` recognises, fused or not, or a
            :class:`crate_kernels.models.CRATEGPT`; on its own or inside DataParallel or
            DistributedDataParallel (each process measures its own batches). What only looks
            like such a layer is in ``skipped``, with the reason.
        rate: R(Z), R^c(Z; U) and their difference, of the tokens that enter MSSA, Z = LN(x).
        sparsity: fraction of exact zeros in what leaves ISTA.
        coherence: overlap of the heads' subspaces, of the weights as they are entering the block.
        attention: True, or a dict of lists: ``heads`` (all), ``queries`` (the class token, [0])
            and ``layers`` (all), for ``Trace.attention``.
        samples: how many of each batch are measured, the first; None: all.
        eps, normalise: of :func:`coding_rate`.

    Inside the block what ``torch.compile`` made runs eagerly. Recomputation by
    ``torch.utils.checkpoint`` is not measured again. Replayed CUDA graphs run no Python and are not
    seen.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: no layer is recognised, an option does not fit, or, entering the block,
            parameters on meta or in shards (FSDP); in the forward pass a query that is no token.
    """
    if not isinstance(model, nn.Module):
        refuse("trace", "model to be a torch.nn.Module", type(model).__name__, TypeError)
    if samples is not None and (type(samples) is not int or samples < 1):
        refuse("trace", "samples to be an int > 0, or None", repr(samples))
    check_number("trace", "eps", eps, above_zero=True)
    if not (rate or sparsity or coherence or attention):
        refuse("trace", "something to measure", "nothing")
    return Trace(
        model,
        rate=rate,
        sparsity=sparsity,
        coherence=coherence,
        attention=AttentionRows.of(attention),
        samples=samples,
        eps=eps,
        normalise=normalise,
    )


def _recomputing() -> bool:
    """Whether this call is part of a backward pass: torch.utils.checkpoint at work."""
    return torch._C._current_graph_task_id() != -1
