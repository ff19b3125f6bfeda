"""A whole CRATE layer as one op, White-Box Transformers, arXiv 2311.13110, section 2.

h = LN(x),  z = x + MSSA(h),  u = LN(z),  y = ISTA(u)
The passes in order, with what each reads and writes of (rows, D) tensors between the GEMMs:
    forward   x -> h | w = h U^T | o = attention(w) | p = o V^T | x, p -> z, u | y = ISTA(u)
    backward  du = ISTA'(dy) | du, z -> dz | do = dz V | dw = attention'(do) | dh = dw U
              | dh, x, dz -> dx, h | and the weights' gradients from u, o and h
Where the GEMMs norm their products instead of their rows there is no pass and neither h nor u: the
forward is x -> w -> o -> z -> y, if the layer before says what is to know of x (chained_block).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_heads, check_number, check_tensors, refuse
from ..cuda_extension import moments_shape
from ..ista.gram_cache import cached_gram
from ..ista.op import _kernels as _ista_kernels
from ..library import autocast_dtype, define, define_gradient, outlives_the_call, sum_over_tokens
from ..mssa.op import _check_options
from ..mssa.op import _kernels as _attention_kernels

MEMORY = ("default", "low")
PARAMETERS = (
    "norm1_weight",
    "norm1_bias",
    "w_qkv",
    "w_out",
    "b_out",
    "norm2_weight",
    "norm2_bias",
    "weight",
)


def crate_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None,
    b_out: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    eps: float = 1e-5,
    step_size: float = 0.1,
    lambd: float = 0.1,
    memory: str = "default",
    gram: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""One CRATE layer: a compression step (MSSA) and a sparsification step (ISTA), each normed.

    .. math:: z = x + \mathrm{MSSA}(\mathrm{LN}_1(x)), \qquad y = \mathrm{ISTA}(\mathrm{LN}_2(z))

    Args:
        x: tokens (B, N, D).
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: of the LayerNorms, (D,).
        w_qkv, w_out, b_out, heads, scale, causal: of :func:`crate_kernels.mssa`.
        weight, step_size, lambd: of :func:`crate_kernels.ista`.
        eps: of both norms, > 0.
        memory: what is kept for the backward pass, in tensors of B*N*D elements. "default": x,
            w, o and z (four; the normed h and u are made again). "low": x, o and z (three; w is
            made again too, by one more GEMM). x is the y of the layer before, kept once.
        gram: G = eta (W - W^T W) of ``weight``, (D, D) in the GEMMs' dtype, if it is there already.
            Used where no gradient is wanted; without it G is kept as :func:`crate_kernels.ista`
            keeps it.
        backend: "auto", "cuda", "triton" or "reference", as in the two ops.

    Returns:
        (B, N, D), contiguous, in the dtype the GEMMs run in: autocast's where it is on, else
        that of x. Between two layers nothing else is needed: y replaces x instead of being added
        to it, so that its rounding does not add up over the layers (docs/block.md). Norms, sums
        and thresholds are computed in float32.

    Dtypes: float16, bfloat16, float32, float64 (by the reference backend).

    Raises:
        ValueError: shapes, devices, heads, memory or a backend that do not fit.
        TypeError: not tensors, not floating, or of mixed dtypes with autocast off.

    Source: arXiv 2311.13110, eq. 18 and 19. Derivation and schedule: docs/block.md.
    """
    parameters = (
        norm1_weight, norm1_bias, w_qkv, w_out, b_out, norm2_weight, norm2_bias, weight
    )  # fmt: skip
    y, _ = chained_block(
        x, None, *parameters, follows=False, precedes=False, heads=heads, scale=scale,
        causal=causal, eps=eps, step_size=step_size, lambd=lambd, memory=memory, gram=gram,
        backend=backend,
    )  # fmt: skip
    return y


def chained_block(
    x: Tensor,
    moments: Tensor | None,
    *parameters: Tensor | None,
    follows: bool,
    precedes: bool,
    heads: int,
    scale: float | None,
    causal: bool,
    eps: float,
    step_size: float,
    lambd: float,
    memory: str,
    gram: Tensor | None,
    backend: str,
    folded_qkv: Sequence[Tensor] = (),
    folded_gram: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """:func:`crate_block` in a row of them, where the y of one is the x of the next and goes
    nowhere else: y, and its moments (or an empty tensor), which the next one takes with it.

    Args:
        moments: those that came with x; None or empty where there are none.
        parameters: those of PARAMETERS, in order.
        follows, precedes: whether x is the y of such a layer, and whether y is the x of one. ISTA
            passes no gradient where y = 0: a layer that follows returns its dx with zeros there
            already, so that the one that precedes it need not mask its dy. The gradients are wrong
            if two layers are not told the same of what is between them.
        folded_qkv, folded_gram: what :func:`fold_norms` makes of w_qkv and of G, if it is there
            already; used as gram is.
    """
    _check_block(x, parameters, heads)
    _check_options("crate_block", scale, causal)
    check_number("crate_block", "eps", eps, above_zero=True)
    check_number("crate_block", "step_size", step_size)
    check_number("crate_block", "lambd", lambd)
    if memory not in MEMORY:
        refuse("crate_block", f"memory to be one of {MEMORY}", repr(memory))
    given: Any = dict(zip(PARAMETERS, parameters, strict=True))
    weight: Tensor = given["weight"]
    dtype, head_dim = autocast_dtype(x), given["w_qkv"].shape[0] // heads
    attention = backends.choose("crate_block", backend, x, dtype, head_dim)
    dictionary = backends.choose("ista", backend, x, dtype, None)
    scale = head_dim**-0.5 if scale is None else float(scale)
    if gram is not None:
        found = (gram.shape, gram.dtype, gram.device)
        if found != (weight.shape, dtype, weight.device):
            wanted = f"gram of shape {tuple(weight.shape)} and {dtype} on {weight.device}"
            refuse("crate_block", wanted, f"{tuple(gram.shape)}, {gram.dtype}, {gram.device}")
        gram = gram.contiguous()
    wants_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *parameters)
    )
    if not wants_gradient and not outlives_the_call():
        memory = "none"
        if gram is None and not torch.compiler.is_compiling():
            gram = cached_gram(weight, step_size, dtype, _ista_kernels(dictionary))
    numbers = (heads, scale, causal, float(eps), float(step_size), float(lambd))
    places = (follows, precedes)
    y, moments, *_ = torch.ops.crate_kernels.crate_block(
        x, *parameters, moments, gram, list(folded_qkv), list(folded_gram), dtype, *numbers,
        *places, memory, attention, dictionary,
    )  # fmt: skip
    return y, moments


def explain_crate_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None,
    b_out: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    *,
    heads: int,
    **_: Any,
) -> backends.Explanation:
    """Which backends fit these arguments of :func:`crate_block`, and why the others do not."""
    parameters = (
        norm1_weight, norm1_bias, w_qkv, w_out, b_out, norm2_weight, norm2_bias, weight
    )  # fmt: skip
    _check_block(x, parameters, heads)
    dtype = autocast_dtype(x)
    attention = backends.explain("crate_block", x, dtype, w_qkv.shape[0] // heads)
    dictionary = backends.explain("ista", x, dtype, None)
    chosen = attention.chosen
    if dictionary.chosen != chosen:
        chosen = f"{chosen}, {dictionary.chosen} for ISTA"
    reasons = {
        name: tuple(dict.fromkeys((*against, *dictionary.reasons[name])))
        for name, against in attention.reasons.items()
    }
    return backends.Explanation("crate_block", chosen, reasons)


def _check_block(
    x: Tensor, parameters: tuple[Tensor | None, ...], heads: int, op: str = "crate_block"
) -> None:
    named = dict(zip(PARAMETERS, parameters, strict=True))
    optional = {name: named.pop(name) for name in ("w_out", "b_out")}
    check_tensors(op, {"x": x, **named}, optional)
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] == 0:
        refuse(op, "x of shape (B, N, D) with N > 0 and D > 0", tuple(x.shape))
    d = x.shape[2]
    w_qkv: Any = named["w_qkv"]
    if w_qkv.dim() != 2 or w_qkv.shape[1] != d:
        refuse(op, f"w_qkv of shape (heads*head_dim, D = {d})", tuple(w_qkv.shape))
    inner = w_qkv.shape[0]
    check_heads(op, heads, inner)
    if optional["w_out"] is None and inner != d:
        refuse(op, f"w_out of shape {(d, inner)}, or heads*head_dim = D", "None")
    if optional["w_out"] is None and optional["b_out"] is not None:
        refuse(op, "b_out only together with w_out", "b_out without w_out")
    wanted: dict[str, tuple[int, ...]] = {name: (d,) for name in named if name.startswith("norm")}
    wanted |= {"weight": (d, d), "w_out": (d, inner), "b_out": (d,)}
    for name, shape in wanted.items():
        t = {**named, **optional}[name]
        if t is not None and t.shape != shape:
            refuse(op, f"{name} of shape {shape}", tuple(t.shape))


# ---- the schedule


def _rows(attention: str, dictionary: str) -> Any:
    """The module of the passes over rows that goes with these backends."""
    if attention == dictionary == "reference":
        from . import torch_kernels

        return torch_kernels
    if "cuda" in (attention, dictionary):
        from . import cuda_kernels

        return cuda_kernels
    from . import triton_kernels

    return triton_kernels


def _linear(t: Tensor, weight: Tensor) -> Tensor:
    """t weight^T over the last dimension, in the dtype of t."""
    return torch.nn.functional.linear(t, weight.to(t.dtype))


def _in_gemm_dtype(flat: Tensor, *weights: Tensor | None) -> list[Any]:
    """The weights as ``rounded`` laid them into ``flat``; themselves where it is empty."""
    if flat.numel() == 0:
        return list(weights)
    parts = flat.split([0 if t is None else t.numel() for t in weights])
    return [None if t is None else p.view(t.shape) for t, p in zip(weights, parts, strict=True)]


def fold_norms(
    norm1: tuple[Tensor, Tensor],
    w_qkv: Tensor,
    w_out: Tensor | None,
    norm2: tuple[Tensor, Tensor],
    gram: Tensor,
    attention: str,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the GEMMs that norm their products take in place of w_qkv and of G, for
    :func:`chained_block`; empty where none does."""
    if attention != "cuda":
        return (), ()
    from . import cuda_kernels

    norms_gram = _can_norm_products(gram.shape[0], w_out, attention, "cuda")
    return (
        cuda_kernels.fold(w_qkv, *norm1, gram.dtype),
        cuda_kernels.fold_gram(gram, *norm2) if norms_gram else (),
    )


def _project(
    x: Tensor,
    moments: Tensor | None,
    stats: Tensor | None,
    norm: tuple[Tensor, Tensor],
    w_qkv: Tensor,
    wc_qkv: Tensor,
    folded: Sequence[Tensor],
    eps: float,
    dtype: torch.dtype,
    rows: Any,
    attention: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """x in ``dtype``, h = LN(x) unless w = h U^T is made without it, w, and x's statistics.

    The statistics are those given, or made of x's moments, or of x.
    """
    d = x.shape[-1]
    kernels = _attention_kernels(attention)
    if attention != "cuda" or not kernels.takes_rows(x.numel() // d, w_qkv.shape[0], d):
        xc, h, stats = rows.normalise(x, None, None, *norm, eps, dtype)
        return xc, h, _linear(h, wc_qkv), stats
    xc = x
    if stats is None and moments is not None and moments.numel() > 0 and x.dtype == dtype:
        stats = rows.statistics_of_moments(moments, d, eps)
    if stats is None:
        xc, stats = rows.statistics(x, eps, dtype)
    folded = folded or rows.fold(w_qkv, *norm, dtype)
    return xc, None, kernels.normed_projection(xc, stats, folded), stats


def _can_norm_products(d: int, w_out: Tensor | None, attention: str, dictionary: str) -> bool:
    """Whether y = ISTA(LN(z)) can be made of z and its moments, without the rows of u."""
    return attention == dictionary == "cuda" and w_out is not None and d % 64 == 0


def _forward(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None,
    b_out: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    moments: Tensor | None,
    gram: Tensor | None,
    folded_qkv: list[Tensor],
    folded_gram: list[Tensor],
    dtype: torch.dtype,
    heads: int,
    scale: float,
    causal: bool,
    eps: float,
    step_size: float,
    lambd: float,
    follows: bool,
    precedes: bool,
    memory: str,
    attention: str,
    dictionary: str,
) -> tuple[Tensor, ...]:
    """y and its moments, then what the backward pass needs: xc, stats1, w, o, lse, z, stats2, the
    weights in ``dtype``, G, and y > 0."""
    rows, ista = _rows(attention, dictionary), _ista_kernels(dictionary)
    given, x = x, x.contiguous()
    weights = (w_qkv, w_out, weight)

    def empty(dtype: torch.dtype = dtype) -> Tensor:
        return x.new_empty(0, dtype=dtype)

    if memory != "none":  # the weights may change before the next call
        gram, folded_qkv, folded_gram = None, [], []
    makes_gram = gram is None and _are_rounded(weights, dtype)
    flat = rows.rounded(*weights, dtype) if makes_gram else empty()
    wc_qkv, wc_out, wc = _in_gemm_dtype(flat, *weights)
    norm1, norm2 = (norm1_weight, norm1_bias), (norm2_weight, norm2_bias)
    xc, h, w, stats1 = _project(
        x, moments, None, norm1, w_qkv, wc_qkv, folded_qkv, eps, dtype, rows, attention
    )
    del h
    kernels = _attention_kernels(attention)
    o, lse = kernels.forward(w, heads, scale, causal)
    if memory != "default":
        w = empty()
    gram = ista.make_gram(weight, step_size, dtype, wc) if gram is None else gram
    threshold = step_size * lambd
    wants_mask = dictionary == "cuda" and memory != "none" and not precedes
    d, is_ready = x.shape[-1], x.dtype == dtype and x.numel() > 0
    if is_ready and _can_norm_products(d, w_out, attention, dictionary):
        z, moments = kernels.residual_projection(o, x, wc_out, b_out)
        if memory == "none":
            o = empty()
        stats2 = rows.statistics_of_moments(moments, d, eps)
        folded_gram = folded_gram or rows.fold_gram(gram, *norm2)
        y, mask, moments = ista.apply_normed(
            z, stats2, folded_gram, threshold, wants_mask, precedes
        )
    else:
        p = o if w_out is None else _linear(o, wc_out)
        z, u, stats2 = rows.normalise(x, p, b_out, *norm2, eps, dtype)
        del p
        mask = moments = None
        if wants_mask:
            y, mask = ista.apply_gram_and_mask(u, u, gram, threshold)
        elif dictionary == "cuda" and precedes:
            y, moments = ista.apply_gram_and_moments(u, gram, threshold)
        else:
            y = ista.apply_gram(u, u, gram, threshold)
    mask = empty(torch.uint8) if mask is None else mask
    moments = empty(torch.float32) if moments is None else moments
    if memory == "none":
        return y, moments, *(empty() for _ in range(10))
    xc = empty() if xc is given else xc
    return y, moments, xc, stats1, w, o, lse, z, stats2, flat, gram, mask


def _are_rounded(weights: tuple[Tensor | None, ...], dtype: torch.dtype) -> bool:
    return any(t is not None and t.dtype != dtype for t in weights)


def _backward(
    dy: Tensor,
    xc: Tensor,
    stats1: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    z: Tensor,
    stats2: Tensor,
    flat: Tensor,
    gram: Tensor,
    kept: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None,
    b_out: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    wants: list[bool],
    heads: int,
    scale: float,
    causal: bool,
    eps: float,
    step_size: float,
    follows: bool,
    precedes: bool,
    memory: str,
    attention: str,
    dictionary: str,
) -> list[Tensor]:
    """Gradients of x and of the parameters, in order; empty where not wanted."""
    rows, ista = _rows(attention, dictionary), _ista_kernels(dictionary)
    wanted = dict(zip(("x", *PARAMETERS), wants, strict=True))
    wc_qkv, wc_out, wc = _in_gemm_dtype(flat, w_qkv, w_out, weight)
    h = dweight = dw_out = None
    if dictionary == "cuda" and precedes:
        g = dy.contiguous()
        du = ista.gradient_of_masked(g, gram)
    else:
        du, g = ista.input_gradient(dy, kept, gram)
    dz, u, dnorm2_weight, dnorm2_bias, db_out = rows.normalise_backward(
        du, z, stats2, norm2_weight, norm2_bias, None, wanted["weight"], wanted["b_out"]
    )
    del du, z
    if wanted["weight"]:
        dweight = ista.weight_gradient(u, g, weight, step_size, wc)
    del u, g
    if w_out is not None and wanted["w_out"]:
        dw_out = sum_over_tokens(dz, o, w_out.dtype)
    kernels, sums = _attention_kernels(attention), {}
    if w_out is None:
        do = dz
    elif attention == "cuda":
        do, sums["delta"], _ = kernels.output_gradient(dz, wc_out, o, heads)
    else:
        do = dz @ wc_out
    if memory == "low":
        norm1 = (norm1_weight, norm1_bias)
        _, h, w, _ = _project(
            xc, None, stats1, norm1, w_qkv, wc_qkv, (), eps, xc.dtype, rows, attention
        )
    dw = kernels.backward(do, w, o, lse, heads, scale, causal, **sums)
    del do, w, sums
    dh = dw @ wc_qkv
    wants_h = wanted["w_qkv"] and h is None
    dx, h_again, dnorm1_weight, dnorm1_bias, _ = rows.normalise_backward(
        dh, xc, stats1, norm1_weight, norm1_bias, dz, wants_h, False, follows
    )
    h = h_again if h is None else h
    dw_qkv = sum_over_tokens(dw, h, w_qkv.dtype) if wanted["w_qkv"] else None
    found = (
        dx, dnorm1_weight, dnorm1_bias, dw_qkv, dw_out, db_out, dnorm2_weight, dnorm2_bias, dweight
    )  # fmt: skip
    leaves = (
        xc, norm1_weight, norm1_bias, w_qkv, w_out, b_out, norm2_weight, norm2_bias, weight
    )  # fmt: skip
    return [
        t.to(leaf.dtype) if want and t is not None and leaf is not None else xc.new_empty(0)
        for t, leaf, want in zip(found, leaves, wants, strict=True)
    ]


# ---- registration: crate_kernels::crate_block and its backward


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, w_qkv, w_out, _, _, _, weight = rest[:8]
    _, _, _, _, dtype, heads, *_, precedes, memory, _, dictionary = rest[8:]
    n_rows, d = x.shape[0] * x.shape[1], x.shape[2]
    wide = torch.promote_types(dtype, torch.float32)

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    y, kernels, by_cuda = new(*x.shape), _ista_kernels(dictionary), dictionary == "cuda"
    shape = moments_shape(n_rows, d) if by_cuda and precedes else (0,)
    moments = new(*shape, dtype=torch.float32)
    if memory == "none":
        return y, moments, *(new(0) for _ in range(10))
    xc = new(0) if x.dtype == dtype and x.is_contiguous() else new(*x.shape)
    inner = (*x.shape[:2], w_qkv.shape[0])
    lse = new(x.shape[0], heads, x.shape[1], dtype=wide)
    bits = kernels.mask_bytes(n_rows, d) if by_cuda and not precedes else 0
    weights = (w_qkv, w_out, weight)
    size = sum(t.numel() for t in weights if t is not None) if _are_rounded(weights, dtype) else 0
    end = new(size), new(*weight.shape), new(bits, dtype=torch.uint8)
    stats1, stats2 = (new(n_rows, 2, dtype=wide) for _ in range(2))
    w = new(0) if memory == "low" else new(*inner)
    return y, moments, xc, stats1, w, new(*inner), lse, new(*x.shape), stats2, *end


def _backward_fake(dy: Tensor, xc: Tensor, *rest: Any) -> list[Tensor]:
    parameters, wants = rest[9:17], rest[17]
    gradients = [None if t is None else t.new_empty(t.shape) for t in (xc, *parameters)]
    return [
        t if want and t is not None else xc.new_empty(0)
        for t, want in zip(gradients, wants, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters = inputs[:9]
    y, _, xc, *kept, mask = output
    ctx.x_dtype, ctx.options = x.dtype, (*inputs[14:19], *inputs[20:])  # all but lambd
    positive = mask if inputs[-1] == "cuda" else y
    # An empty xc stands for x itself.
    ctx.save_for_backward(x if xc.shape != x.shape else xc, *kept, positive, *parameters)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of the others no zeros are made


def _gradient(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 25
    wants = list(ctx.needs_input_grad[:9])
    found = torch.ops.crate_kernels.crate_block_backward(
        dy, *ctx.saved_tensors, wants, *ctx.options
    )
    gradients = [g if want else None for g, want in zip(found, wants, strict=True)]
    if gradients[0] is not None:
        gradients[0] = gradients[0].to(ctx.x_dtype)
    return (*gradients, *(None for _ in range(16)))


define(
    "crate_block(Tensor x, Tensor norm1_weight, Tensor norm1_bias, Tensor w_qkv, Tensor? w_out,"
    " Tensor? b_out, Tensor norm2_weight, Tensor norm2_bias, Tensor weight, Tensor? moments,"
    " Tensor? gram, Tensor[] folded_qkv, Tensor[] folded_gram, ScalarType dtype, int heads,"
    " float scale, bool causal, float eps, float step_size, float lambd, bool follows,"
    " bool precedes, str memory, str attention, str dictionary) -> (Tensor y, Tensor y_moments,"
    " Tensor xc, Tensor stats1, Tensor w, Tensor o, Tensor lse, Tensor z, Tensor stats2,"
    " Tensor flat, Tensor made_gram, Tensor mask)",
    _forward,
    _forward_fake,
)
define(
    "crate_block_backward(Tensor dy, Tensor xc, Tensor stats1, Tensor w, Tensor o, Tensor lse,"
    " Tensor z, Tensor stats2, Tensor flat, Tensor gram, Tensor kept, Tensor norm1_weight,"
    " Tensor norm1_bias, Tensor w_qkv, Tensor? w_out, Tensor? b_out, Tensor norm2_weight,"
    " Tensor norm2_bias, Tensor weight, bool[] wants, int heads, float scale, bool causal,"
    " float eps, float step_size, bool follows, bool precedes, str memory, str attention,"
    " str dictionary) -> Tensor[]",
    _backward,
    _backward_fake,
)
define_gradient("crate_block", _gradient, _save)
