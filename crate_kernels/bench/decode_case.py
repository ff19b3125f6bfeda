"""A step of generation with its caches: ours of one tensor, the peers' of keys and of values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..decode.reference import tied_attention_decode_reference
from ..mssa.reference import split_heads
from .check import Outputs
from .peers import OURS, Candidate
from .roofline import cost
from .timing import Step, input_sets
from .workloads import Workload


@dataclass
class DecodeCase:
    """Sets of (w, cache, lengths, keys, values) to rotate among.

    w (B, 1, heads*head_dim) is the last of ``tokens`` tokens. ``cache`` and ``lengths`` hold the
    others. ``keys`` and ``values`` (B, heads, tokens, head_dim), in one piece each, hold it
    already: what a peer would take to write it there is not counted.
    """

    w: Workload
    device: torch.device
    tensors: list[tuple[Tensor, ...]]
    built: dict[str, Callable[..., Tensor]] = field(default_factory=dict)

    @staticmethod
    def make(w: Workload, device: torch.device, generator: torch.Generator) -> DecodeCase:
        tensors: list[tuple[Tensor, ...]] = []
        for _ in range(input_sets(cost(w).bytes, device)):
            shape = (w.batch, w.tokens, w.heads * w.head_dim)
            rows = torch.randn(shape, device=device, generator=generator)
            cache = (3**-0.5 * rows).to(w.torch_dtype)
            keys = split_heads(cache, w.heads).contiguous()
            lengths = torch.full((w.batch,), w.tokens - 1, dtype=torch.int32, device=device)
            tensors.append((cache[:, -1:].clone(), cache, lengths, keys, keys.clone()))
        return DecodeCase(w, device, tensors)

    @property
    def sets(self) -> int:
        return len(self.tensors)

    def resident(self, candidate: Candidate) -> int:
        """Bytes of the tensors one call is given."""
        w, cache, lengths, *theirs = self.tensors[0]
        given = [w, cache, lengths] if candidate.name.startswith(OURS) else [w, *theirs]
        return sum(t.numel() * t.element_size() for t in given)

    def _call(self, candidate: Candidate, i: int) -> Tensor:
        if candidate.name not in self.built:
            self.built[candidate.name] = candidate.build_layer(self.w)
        with torch.no_grad():
            return self.built[candidate.name](*self.tensors[i])

    def step(self, candidate: Candidate, i: int) -> Step:
        """One timed call on input set i."""
        return lambda: self._call(candidate, i)

    def outputs(self, candidate: Candidate) -> Outputs:
        """What the gate compares, of set 0. Our cache is without the new token before."""
        cache = self.tensors[0][1]
        cache[:, -1].fill_(float("nan"))
        return {"output": self._call(candidate, 0)}

    @torch.no_grad()
    def reference(self) -> Outputs:
        """The same from the reference formulas in float64, an item at a time."""
        w, cache, lengths, *_ = self.tensors[0]
        parts = [
            tied_attention_decode_reference(
                w[b : b + 1].double(),
                cache[b : b + 1].double(),
                lengths[b : b + 1],
                heads=self.w.heads,
            )
            for b in range(self.w.batch)
        ]
        return {"output": torch.cat(parts)}
