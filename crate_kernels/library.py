"""How every op of this package reaches torch: one ``torch.library`` entry each.

An op is a schema, an implementation, a shape rule (the "fake" implementation that
``torch.compile`` traces) and its hand-written gradient. Importing this registers names only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("crate_kernels", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``crate_kernels::<schema>`` on all devices."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _in_its_own_dtypes(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"crate_kernels::{name}", fake, lib=LIBRARY)


def define_gradient(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
    public: str | None = None,
) -> None:
    """Give ``crate_kernels::<name>`` a gradient, and its backward op a refusal of a second.

    ``backward`` and ``setup_context`` are those of torch.library.register_autograd, which would do
    the same, but asks the schema for each argument at each call: a tenth of the host's time for a
    training step. ``public`` is the function that users know it by, if that has another name.
    """
    public = public or name
    op = getattr(torch.ops.crate_kernels, name).default

    def call(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            output = call(keyset, tuple(inputs))
            setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return (*backward(ctx, *grads), None)

    def with_gradient(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return Gradient.apply(*args, keyset)
        return call(keyset, args)

    LIBRARY.impl(name, with_gradient, "Autograd", with_keyset=True)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{public}: double backward is not implemented; expected first-order gradients, "
            f"got create_graph=True (use {public}_reference for higher orders)"
        )

    torch.library.register_autograd(f"crate_kernels::{name}_backward", refuse, lib=LIBRARY)


def _in_its_own_dtypes(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run with autocast off: the public functions have already chosen every dtype."""

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        device_type = next(a.device.type for a in args if isinstance(a, Tensor))
        # An output may be a view of what was made in here, without being one to autograd.
        with torch._C._AutoDispatchBelowADInplaceOrView(), autocast_off(device_type):
            return implementation(*args)

    return run


def autocast_dtype(t: Tensor) -> torch.dtype:
    """The dtype a GEMM would take ``t`` in here: autocast's, or its own (float64 always)."""
    if t.dtype != torch.float64 and autocast_is_on(t.device.type):
        return torch.get_autocast_dtype(t.device.type)
    return t.dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: what sums and statistics are kept in."""
    return torch.promote_types(dtype, torch.float32)


def autocast_is_on(device_type: str) -> bool:
    """torch.is_autocast_enabled, which does not know meta."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_off(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Nothing where it is off already, as it mostly is."""
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def outlives_the_call() -> bool:
    """Whether this call is captured in a graph that may be asked for a gradient later."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def on_device_of(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device that holds ``t``, whichever is current."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()


def stream_of(t: Tensor) -> int:
    """The current stream of the device of ``t``, as launchers take it."""
    return torch._C._cuda_getCurrentRawStream(t.device.index)


def sum_over_tokens(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b for (..., A) and (..., B): (A, B) in ``dtype``, summed in float32 or better."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    if a.dtype == dtype:
        return a.mT @ b
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a.mT, b, out_dtype=dtype)
    wide = wide_dtype(a.dtype)
    return (a.to(wide).mT @ b.to(wide)).to(dtype)
