"""A workload with its tensors: what one call is, and what it must compute in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ista.reference import ista_reference, ista_reference_backward
from ..mssa.reference import (
    mssa_reference,
    mssa_reference_backward,
    tied_attention_reference,
    tied_attention_reference_backward,
)
from ..overcomplete_ista.reference import (
    overcomplete_ista_reference,
    overcomplete_ista_reference_backward,
)
from . import masks
from .check import Outputs
from .decode_case import DecodeCase
from .model_cases import EncoderCase, MaskedCase, ModelCase, PaddedCase, TextCase, autocast
from .peers import LAMBD, STEP_SIZE, Candidate
from .roofline import cost
from .timing import Step, input_sets
from .workloads import RATIO, Workload

MAX_SCORES = 1 << 27  # score elements of one step of the float64 reference (1 GiB)
LEAVES = {
    "core": ("w",),
    "mssa": ("x", "w_qkv", "w_out", "b_out"),
    "ista": ("x", "weight"),
    "overcomplete": ("x", "dictionary", "decoder"),
    "masks": ("w",),
}

ISTAS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "ista": (ista_reference, ista_reference_backward),
    "overcomplete": (overcomplete_ista_reference, overcomplete_ista_reference_backward),
}


def _at_once(w: Workload) -> int:
    return max(1, MAX_SCORES // (w.heads * w.tokens**2))


def _chunks(w: Workload) -> Iterator[slice]:
    per_chunk = _at_once(w)
    for start in range(0, w.batch, per_chunk):
        yield slice(start, start + per_chunk)


# ---- layers


@dataclass
class LayerCase:
    """A layer's weights, and pairs of input and upstream gradient to rotate among."""

    w: Workload
    device: torch.device
    weights: list[Tensor]
    inputs: list[Tensor]
    upstream: list[Tensor]
    others: list[Tensor] = field(default_factory=list)  # arguments without a gradient
    built: dict[str, Callable[..., Tensor]] = field(default_factory=dict)

    @staticmethod
    def make(w: Workload, device: torch.device, generator: torch.Generator) -> LayerCase:
        def uniform(bound: float, *shape: int) -> Tensor:
            t = torch.rand(shape, device=device, generator=generator)
            return ((2 * t - 1) * bound).to(w.storage_dtype).requires_grad_()

        def normal(dtype: torch.dtype, *shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(shape, device=device, generator=generator)).to(dtype)

        inner = w.heads * w.head_dim
        rows: tuple[int, ...] = (w.batch, w.tokens)
        if w.sequences == "packed":
            rows = (sum(masks.lengths_of(w)),)
        # As initialised and normed in a model: Linear's and kaiming's bounds, w of variance 1/3.
        weights = {
            "core": lambda: [],
            "masks": lambda: [],
            "mssa": lambda: [
                uniform(w.width**-0.5, inner, w.width),
                uniform(inner**-0.5, w.width, inner),
                uniform(inner**-0.5, w.width),
            ],
            "ista": lambda: [uniform((6 / w.width) ** 0.5, w.width, w.width)],
            "overcomplete": lambda: [
                uniform((6 / (RATIO * w.width)) ** 0.5, w.width, RATIO * w.width) for _ in range(2)
            ],
        }[w.suite]()
        core = w.suite in ("core", "masks")
        width, std = (inner, 3**-0.5) if core else (w.width, 1.0)
        sets = input_sets(cost(w).bytes, device)
        y_dtype = w.storage_dtype if w.suite == "ista" else w.torch_dtype
        inputs = [
            normal(w.storage_dtype, *rows, width, std=std).requires_grad_() for _ in range(sets)
        ]
        upstream = [normal(y_dtype, *rows, width) for _ in range(sets)]
        case = LayerCase(w, device, weights, inputs, upstream)
        if w.sequences:
            case.others = [masks.sequences_of(w, device)]
            for dy in upstream:  # padding has no gradient
                case._without_padding(dy)
        return case

    @property
    def sets(self) -> int:
        return len(self.inputs)

    def resident(self, candidate: Candidate) -> int:
        """Bytes of the tensors one call is given."""
        tensors = [*self.weights, self.inputs[0]]
        tensors += [] if self.w.mode == "forward" else [self.upstream[0]]
        return sum(t.numel() * t.element_size() for t in tensors)

    def function(self, candidate: Candidate) -> Callable[..., Tensor]:
        if candidate.name not in self.built:
            self.built[candidate.name] = candidate.build_layer(self.w)
        return self.built[candidate.name]

    def step(self, candidate: Candidate, i: int) -> Step:
        """One timed call on input set i."""
        function = self.function(candidate)
        leaves, dy = [self.inputs[i], *self.weights], self.upstream[i]

        def forward() -> Tensor:
            with autocast(self.w, self.device):
                return function(*leaves, *self.others)

        def inference() -> Tensor:
            with torch.no_grad():
                return forward()

        if self.w.mode == "forward":
            return inference
        if self.w.mode == "backward":
            y = forward()
            return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    def outputs(self, candidate: Candidate) -> Outputs:
        """What the gate compares: the output and, if the mode has them, all gradients (set 0)."""
        function = self.function(candidate)
        leaves, dy = [self.inputs[0], *self.weights], self.upstream[0]
        with_gradients = self.w.mode != "forward"
        with torch.set_grad_enabled(with_gradients), autocast(self.w, self.device):
            y = function(*leaves, *self.others)
        if not with_gradients:
            return {"output": self._without_padding(y)}
        gradients = torch.autograd.grad(y, leaves, dy)
        output = self._without_padding(y.detach())
        return {"output": output, **dict(zip(self._gradient_names(), gradients, strict=True))}

    def _without_padding(self, t: Tensor) -> Tensor:
        """``t``, its rows past the lengths made zero in place: peers leave there what they like."""
        past = masks.past_the_lengths(self.w, self.others[0]) if self.w.sequences else None
        return t if past is None else t.masked_fill_(past, 0)

    def _gradient_names(self) -> list[str]:
        return [f"d{name}" for name in LEAVES[self.w.suite]]

    @torch.no_grad()
    def reference(self) -> Outputs:
        """The same from the reference formulas in float64, a part of the batch at a time."""
        weights = [t.double() for t in self.weights]
        if self.w.suite == "ista":
            self._keep_off_the_threshold(weights[0])
        if self.w.suite == "overcomplete" and self.w.torch_dtype.itemsize >= 4:
            self._keep_off_the_thresholds(weights[0])
        y, gradients = [], []
        for part, options in self._parts():
            x, dy = self.inputs[0][part].double(), self.upstream[0][part].double()
            y.append(self._reference_forward(x, *weights, **options))
            if self.w.mode != "forward":
                gradients.append(self._reference_backward(dy, x, *weights, **options))
        result = {"output": torch.cat(y)}
        for i, name in enumerate(self._gradient_names() if gradients else ()):
            parts = [g[i] for g in gradients]
            result[name] = torch.cat(parts) if i == 0 else torch.stack(parts).sum(0)
        return result

    def _parts(self) -> Iterator[tuple[slice, dict[str, Any]]]:
        if self.w.sequences:
            yield from masks.parts(self.w, self.others[0], _at_once(self.w))
        else:
            yield from ((part, {}) for part in _chunks(self.w))

    def _keep_off_the_threshold(self, weight: Tensor) -> None:
        """No gradient where the ReLU's input is within rounding of 0: either side is right."""
        x = self.inputs[0].double()
        before = x + STEP_SIZE * ((x - x @ weight.T) @ weight) - STEP_SIZE * LAMBD
        near = before.abs() < 16 * torch.finfo(self.w.torch_dtype).eps
        self.upstream[0].masked_fill_(near, 0)

    def _keep_off_the_thresholds(self, dictionary: Tensor) -> None:
        """The same for overcomplete ISTA, by whole tokens: in half precision none would be left."""
        threshold = STEP_SIZE * LAMBD
        for x, dy in zip(self.inputs[0].unbind(), self.upstream[0].unbind(), strict=True):
            x = x.double()
            first = STEP_SIZE * (x @ dictionary) - threshold
            z = F.relu(first)
            second = z + STEP_SIZE * ((x - z @ dictionary.mT) @ dictionary) - threshold
            nearest = torch.minimum(first.abs(), second.abs()).amin(-1, keepdim=True)
            dy.masked_fill_(nearest < 16 * torch.finfo(self.w.torch_dtype).eps, 0)

    def _reference_forward(self, x: Tensor, *weights: Tensor, **masks: Any) -> Tensor:
        if self.w.suite in ISTAS:
            return ISTAS[self.w.suite][0](x, *weights, step_size=STEP_SIZE, lambd=LAMBD)
        options: Any = {"heads": self.w.heads, "causal": self.w.causal, **masks}
        function = mssa_reference if self.w.suite == "mssa" else tied_attention_reference
        return function(x, *weights, **options)

    def _reference_backward(
        self, dy: Tensor, x: Tensor, *weights: Tensor, **masks: Any
    ) -> tuple[Tensor, ...]:
        if self.w.suite in ISTAS:
            return ISTAS[self.w.suite][1](dy, x, *weights, step_size=STEP_SIZE, lambd=LAMBD)
        options: Any = {"heads": self.w.heads, "causal": self.w.causal, **masks}
        if self.w.suite != "mssa":
            return (tied_attention_reference_backward(dy, x, **options),)
        gradients = mssa_reference_backward(dy, x, *weights, **options)
        return tuple(g for g in gradients if g is not None)


Case = LayerCase | DecodeCase | ModelCase


def make_case(w: Workload, device: torch.device, seed: int) -> Case:
    generator = torch.Generator(device).manual_seed(seed)
    if w.suite == "model":
        kinds = {"crate_mae_base": MaskedCase, "crate_gpt": TextCase, "crate_bert": PaddedCase}
        return kinds.get(w.model, ModelCase).make(w, device, generator)
    if w.suite == "encoder":
        return EncoderCase.make(w, device, generator)
    if w.suite == "decode":
        return DecodeCase.make(w, device, generator)
    return LayerCase.make(w, device, generator)
