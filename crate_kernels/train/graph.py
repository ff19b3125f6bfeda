"""The forward and backward pass of a step as one launch: a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

WARM_UPS = 3  # kernels are compiled and allocations settle before the capture


class CapturedPass:
    """``run(x, y)``, captured once and replayed on other batches of the same shapes and dtypes.

    Args:
        run: a forward and a backward pass. What it adds to is to be static: ``sums``, and the
            gradients of ``parameters``, which this class makes and keeps.
        parameters: whose gradients it adds to.
        sums: a tensor that it adds to; comes out of the capture as it was.
        x, y: a first batch.
        accumulates: whether several passes make up a step: gradients are then added to zeros,
            else written where they go.

    The activations of the pass stay allocated as long as this object.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Tensor], None],
        parameters: Iterable[nn.Parameter],
        sums: Tensor,
        x: Tensor,
        y: Tensor,
        accumulates: bool,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.x, self.y, self.accumulates = x.clone(), y.clone(), accumulates
        before = sums.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run(self.x, self.y)
        torch.cuda.current_stream().wait_stream(side)
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if accumulates else None
        self.graph = torch.cuda.CUDAGraph()
        # The threads that load data may go on calling CUDA meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            run(self.x, self.y)
        sums.copy_(before)
        self.gradients = [p.grad for p in self.parameters]

    def __call__(self, x: Tensor, y: Tensor, first: bool) -> None:
        """The pass on x and y, the ``first`` of a step or one more."""
        for static, given in ((self.x, x), (self.y, y)):
            if (static.shape, static.dtype) != (given.shape, given.dtype):
                raise ValueError(
                    f"train: expected batches of {static.dtype} {tuple(static.shape)} for --graph, "
                    f"got {given.dtype} {tuple(given.shape)}"
                )
            static.copy_(given, non_blocking=True)
        if first:
            for p, gradient in zip(self.parameters, self.gradients, strict=True):
                p.grad = gradient
            if self.accumulates:
                torch._foreach_zero_([g for g in self.gradients if g is not None])
        self.graph.replay()
