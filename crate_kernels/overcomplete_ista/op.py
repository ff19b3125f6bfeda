"""Two ISTA steps in an overcomplete dictionary, Scaling White-Box Transformers, arXiv 2405.20299.

z1 = relu(eta x D - eta lambda),  r = x - z1 D^T,  z2 = relu(z1 + eta r D - eta lambda)
out = z2 D1^T
e2 = eta (dout D1) * 1[z2 > 0],  dr = e2 D^T,  e1 = (e2 - eta dr D) * 1[z1 > 0]
dx = dr + e1 D^T,  dD = x^T e1 + r^T e2 - dr^T z1,  dD1 = dout^T z2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_number, check_tensors, refuse
from ..cuda_extension import mask_bytes, readable
from ..library import (
    autocast_dtype,
    define,
    define_gradient,
    outlives_the_call,
    sum_over_tokens,
)
from . import torch_kernels

MEMORY = ("default", "low")


def overcomplete_ista(
    x: Tensor,
    dictionary: Tensor,
    decoder: Tensor | None = None,
    *,
    step_size: float = 0.1,
    lambd: float = 0.1,
    memory: str = "default",
    backend: str = "auto",
) -> Tensor:
    r"""Two ISTA steps from zero in a wide dictionary, and a second one that decodes the result.

    .. math:: z_1 = \mathrm{relu}(\eta\, x D - \eta \lambda), \qquad
              z_2 = \mathrm{relu}(z_1 + \eta\, (x - z_1 D^T) D - \eta \lambda), \qquad
              y = z_2 D_1^T

    The second factor is minus the lasso's gradient :math:`(z_1 D^T - x) D`. Without a residual:
    CRATE-alpha adds x outside.

    Args:
        x: tokens (..., D).
        dictionary: D, (D, M), as CRATE-alpha stores it, M = 4 D there. crate-lm stores it
            transposed, ``weight`` (4 D, D): pass ``weight.T``.
        decoder: D1, (D, M); None for the dictionary itself (crate-lm).
        step_size: eta >= 0.
        lambd: sparsity penalty lambda >= 0.
        memory: what is kept for the backward pass. "default": x, r, z1 and z2, 2 D + 2 M elements
            a token (and 2 M bits by CUDA). "low": x and r, 2 D; z1 and z2 are made again by two
            more GEMMs.
        backend: "auto", "cuda", "triton" or "reference"; see :func:`crate_kernels.explain`.

    Returns:
        Shaped as x, contiguous, in the dtype that the published layer returns: autocast's where
        it is on, else that of x. The codes are kept in that dtype, the residual is rounded to it
        from x in its own (by CUDA from x rounded to it).

    Dtypes: float16, bfloat16, float32 (which honours ``torch.get_float32_matmul_precision()``),
    float64 (by the reference backend). The CUDA backend computes in the first two, and takes D and
    M that are multiples of 8.

    Raises:
        ValueError: shapes, devices, a negative step_size or lambd, memory or a backend that do
            not fit.
        TypeError: not tensors, not floating, or of mixed dtypes with autocast off.

    Source: arXiv 2405.20299, ODL block. Derivation, operations, bytes: docs/overcomplete_ista.md.
    """
    _check(x, dictionary, decoder, step_size, lambd, memory)
    xc = x.detach().to(autocast_dtype(x))
    m = dictionary.shape[1]
    backend = backends.choose("overcomplete_ista", backend, x, xc.dtype, None, columns=m)
    wants_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, dictionary, decoder)
    )
    if not wants_gradient and not outlives_the_call():
        memory = "none"
    numbers = (float(step_size), float(lambd))
    out, *_ = torch.ops.crate_kernels.overcomplete_ista(
        x, xc, dictionary, decoder, *numbers, memory, backend
    )
    return out


def explain_overcomplete_ista(
    x: Tensor,
    dictionary: Tensor,
    decoder: Tensor | None = None,
    *,
    step_size: float = 0.1,
    lambd: float = 0.1,
    memory: str = "default",
) -> backends.Explanation:
    """Which backends fit these arguments of :func:`overcomplete_ista`, and why others do not."""
    _check(x, dictionary, decoder, step_size, lambd, memory)
    m = dictionary.shape[1]
    return backends.explain("overcomplete_ista", x, autocast_dtype(x), None, columns=m)


def _check(
    x: Tensor,
    dictionary: Tensor,
    decoder: Tensor | None,
    step_size: float,
    lambd: float,
    memory: str,
) -> None:
    op = "overcomplete_ista"
    check_tensors(op, {"x": x, "dictionary": dictionary}, {"decoder": decoder})
    if dictionary.dim() != 2 or dictionary.numel() == 0:
        refuse(op, "dictionary of shape (D, M) with D > 0 and M > 0", tuple(dictionary.shape))
    if decoder is not None and decoder.shape != dictionary.shape:
        refuse(
            op,
            f"decoder of the shape of dictionary, {tuple(dictionary.shape)}",
            tuple(decoder.shape),
        )
    if x.dim() < 1 or x.shape[-1] != dictionary.shape[0]:
        refuse(op, f"x of shape (..., D) with D = {dictionary.shape[0]}", tuple(x.shape))
    if x.dim() > 2 and x.shape[-2] == 0:
        refuse(op, "x of shape (..., N, D) with N > 0", tuple(x.shape))
    check_number(op, "step_size", step_size)
    check_number(op, "lambd", lambd)
    if memory not in MEMORY:
        refuse(op, f"memory to be one of {MEMORY}", repr(memory))


# ---- the schedule


def _kernels(backend: str) -> Any:
    """The module that runs ``backend``; Triton is imported at the first launch, not before."""
    if backend == "cuda":
        from . import cuda_kernels

        return cuda_kernels
    if backend == "triton":
        from . import triton_kernels

        return triton_kernels
    return torch_kernels


def _rows(t: Tensor) -> Tensor:
    """(rows, columns), contiguous."""
    return t.reshape(-1, t.shape[-1]).contiguous()


def _weight(t: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """A dictionary in the dtype of the GEMMs, as the backend reads it."""
    return readable(t.to(dtype)) if backend == "cuda" else t.to(dtype)


def _new_bits(xc: Tensor, dictionary: Tensor, wanted: bool) -> Tensor:
    """Room for the bits of z1 and z2; none where they are not wanted."""
    d, m = dictionary.shape
    size = mask_bytes(xc.numel() // d, m) if wanted else 0
    return xc.new_empty(2, size, dtype=torch.uint8)


def _forward(
    x: Tensor,
    xc: Tensor,
    dictionary: Tensor,
    decoder: Tensor | None,
    step_size: float,
    lambd: float,
    memory: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, and r, z1, z2 as far as ``memory`` keeps them, with their bits."""
    kernels, dtype, threshold = _kernels(backend), xc.dtype, step_size * lambd
    d = _weight(dictionary, dtype, backend)
    bits = _new_bits(xc, dictionary, backend == "cuda" and memory == "default")
    z1 = kernels.encode(_rows(xc), d, step_size, threshold, bits[0])
    r = kernels.residual(_rows(xc if backend == "cuda" else x), z1, d)
    z2 = kernels.refine(z1, r, d, step_size, threshold, bits[1])
    if memory != "default":
        z1 = xc.new_empty(0)
    if memory == "none":
        r = xc.new_empty(0)
    out = z2 @ (d if decoder is None else decoder.to(dtype)).mT
    return out.view(x.shape), r, z1, (z2 if memory == "default" else xc.new_empty(0)), bits


def _backward(
    dout: Tensor,
    xc: Tensor,
    r: Tensor,
    z1: Tensor,
    z2: Tensor,
    bits: Tensor,
    dictionary: Tensor,
    decoder: Tensor | None,
    wants: list[bool],
    step_size: float,
    lambd: float,
    x_dtype: torch.dtype,
    memory: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of x, dictionary and decoder; empty where not wanted."""
    kernels, dtype, threshold = _kernels(backend), xc.dtype, step_size * lambd
    wants_x, wants_dictionary, wants_decoder = wants
    dx, ddictionary, ddecoder = (xc.new_empty(0) for _ in wants)
    shape, xc, dout = xc.shape, _rows(xc), _rows(dout)
    d = _weight(dictionary, dtype, backend)
    if memory == "low":
        bits = _new_bits(xc, dictionary, backend == "cuda")
        z1 = kernels.encode(xc, d, step_size, threshold, bits[0])
        z2 = kernels.refine(z1, r, d, step_size, threshold, bits[1])
    if wants_decoder and decoder is not None:
        ddecoder = sum_over_tokens(dout, z2, decoder.dtype)
    if wants_x or wants_dictionary:
        d1 = d if decoder is None else _weight(decoder, dtype, backend)
        e2 = kernels.refine_backward(dout, d1, z2, step_size, bits[1])
        dr = e2 @ d.mT
        e1 = kernels.encode_backward(e2, dr, d, z1, step_size, bits[0])
        if wants_x:
            dx = kernels.input_gradient(dr, e1, d, x_dtype).view(shape)
        if wants_dictionary:
            wide = torch.promote_types(dictionary.dtype, torch.float32)
            total = sum_over_tokens(xc, e1, wide)
            _add_over_tokens(total, r, e2)
            _add_over_tokens(total, dr, z1, sign=-1.0)
            if decoder is None:
                _add_over_tokens(total, dout, z2)
            ddictionary = total.to(dictionary.dtype)
    return [dx, ddictionary, ddecoder]


def _add_over_tokens(total: Tensor, a: Tensor, b: Tensor, sign: float = 1.0) -> None:
    """total += sign a^T b"""
    if a.dtype == total.dtype:
        total.addmm_(a.mT, b, alpha=sign)
    else:
        total.add_(sum_over_tokens(a, b, total.dtype), alpha=sign)


# ---- registration: crate_kernels::overcomplete_ista and its backward


def _forward_fake(
    x: Tensor,
    xc: Tensor,
    dictionary: Tensor,
    decoder: Tensor | None,
    step_size: float,
    lambd: float,
    memory: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d, m = dictionary.shape
    rows, kept = x.numel() // d, memory == "default"
    codes = (rows, m) if kept else (0,)
    r = xc.new_empty((0,) if memory == "none" else (rows, d))
    bits = _new_bits(xc, dictionary, backend == "cuda" and kept)
    return xc.new_empty(x.shape), r, xc.new_empty(codes), xc.new_empty(codes), bits


def _backward_fake(
    dout: Tensor,
    xc: Tensor,
    r: Tensor,
    z1: Tensor,
    z2: Tensor,
    bits: Tensor,
    dictionary: Tensor,
    decoder: Tensor | None,
    wants: list[bool],
    step_size: float,
    lambd: float,
    x_dtype: torch.dtype,
    memory: str,
    backend: str,
) -> list[Tensor]:
    leaves = (xc.to(x_dtype), dictionary, decoder)
    return [
        leaf.new_empty(leaf.shape) if want and leaf is not None else xc.new_empty(0)
        for leaf, want in zip(leaves, wants, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, xc, dictionary, decoder, step_size, lambd, memory, backend = inputs
    ctx.options = (step_size, lambd, x.dtype, memory, backend)
    ctx.save_for_backward(xc, *output[1:], dictionary, decoder)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of the others no zeros are made


def _gradient(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    wants_x, _, wants_dictionary, wants_decoder, *_ = ctx.needs_input_grad
    wants = [wants_x, wants_dictionary, wants_decoder]
    found = torch.ops.crate_kernels.overcomplete_ista_backward(
        dout, *ctx.saved_tensors, wants, *ctx.options
    )
    dx, ddictionary, ddecoder = (t if want else None for t, want in zip(found, wants, strict=True))
    return dx, None, ddictionary, ddecoder, None, None, None, None


# xc is x in the dtype of the GEMMs (x itself where that is its own); all gradient goes to x. bits
# has a row for z1 and one for z2, empty but where the backend keeps bits for its backward pass.
define(
    "overcomplete_ista(Tensor x, Tensor xc, Tensor dictionary, Tensor? decoder, float step_size,"
    " float lambd, str memory, str backend)"
    " -> (Tensor out, Tensor r, Tensor z1, Tensor z2, Tensor bits)",
    _forward,
    _forward_fake,
)
define(
    "overcomplete_ista_backward(Tensor dout, Tensor xc, Tensor r, Tensor z1, Tensor z2,"
    " Tensor bits, Tensor dictionary, Tensor? decoder, bool[] wants, float step_size, float lambd,"
    " ScalarType x_dtype, str memory, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
define_gradient("overcomplete_ista", _gradient, _save)
