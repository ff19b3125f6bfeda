"""The stem of CRATE: the patches of an image as tokens, normed before and after the projection.

h = LN1(patch) = gamma zhat + beta,  e = h W^T + b,  t = LN2(e),  x = [cls; t] + pos
  = zhat (W diag(gamma))^T + (b + W beta)                 LN1's weight and bias in the projection
The passes in order, with what each reads and writes:
    forward   img -> zhat | e = zhat W'^T | e -> x
    backward  dx, e -> de | M = de^T zhat | and with no further pass over the tokens
              dW = M diag(gamma) + db beta^T,  dgamma = rowsum(W^T * M^T),  dbeta = W^T db
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_number, check_tensors, refuse
from ..library import autocast_dtype, define, define_gradient, outlives_the_call, sum_over_tokens

PARAMETERS = ("norm1_weight", "norm1_bias", "weight", "bias", "norm2_weight", "norm2_bias")
TOKENS = ("cls_token", "pos_embedding")


def patch_embedding(
    img: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    cls_token: Tensor | None = None,
    pos_embedding: Tensor | None = None,
    *,
    patch_size: tuple[int, int],
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""The tokens of an image: its patches, normed, projected and normed again.

    .. math:: t = \mathrm{LN}_2(\mathrm{LN}_1(\mathrm{patches}(img))\, W^T + b), \qquad
              x = [cls; t] + pos

    Args:
        img: images (B, C, H, W), H and W multiples of the patch's.
        norm1_weight, norm1_bias: of the norm of a patch, (P,) with P = ph*pw*C, channels
            innermost, as the published Rearrange has it.
        weight, bias: of the projection, (D, P) and (D,).
        norm2_weight, norm2_bias: of the norm of a token, (D,).
        cls_token, pos_embedding: (1, 1, D) and (1, 1 + n, D), n = (H/ph) (W/pw); or both None, to
            return t.
        patch_size: (ph, pw) in pixels.
        eps: of both norms, > 0.
        out_dtype: of the tokens; by default that of the GEMM.
        backend: "auto", "cuda", "triton" or "reference"; the passes over rows of "cuda" are
            Triton's, and its GEMM is the vendor's.

    Returns:
        (B, 1 + n, D), or (B, n, D) without the class token; contiguous. The GEMM runs in
        autocast's dtype where it is on, else in that of img; norms and sums in float32.

    Dtypes: float16, bfloat16, float32, float64 (by the reference backend).

    Raises:
        ValueError: shapes, devices, an eps, or a backend that do not fit.
        TypeError: not tensors, not floating, or of mixed dtypes with autocast off.

    Source: the published CRATE model. Derivation: docs/patch_embedding.md.
    """
    parameters = (norm1_weight, norm1_bias, weight, bias, norm2_weight, norm2_bias)
    _check(img, parameters, cls_token, pos_embedding, patch_size)
    check_number("patch_embedding", "eps", eps, above_zero=True)
    dtype = autocast_dtype(img)
    backend = backends.choose("patch_embedding", backend, norm2_weight, dtype, None)
    given = (img, *parameters, cls_token, pos_embedding)
    keeps = outlives_the_call() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    )
    x, *_ = torch.ops.crate_kernels.patch_embedding(
        *given, list(patch_size), float(eps), dtype, out_dtype or dtype, keeps, backend
    )
    return x


def explain_patch_embedding(
    img: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    cls_token: Tensor | None = None,
    pos_embedding: Tensor | None = None,
    *,
    patch_size: tuple[int, int],
    **_: Any,
) -> backends.Explanation:
    """Which backends fit these arguments of :func:`patch_embedding`, and why others do not."""
    parameters = (norm1_weight, norm1_bias, weight, bias, norm2_weight, norm2_bias)
    _check(img, parameters, cls_token, pos_embedding, patch_size)
    return backends.explain("patch_embedding", norm2_weight, autocast_dtype(img), None)


def _check(
    img: Tensor,
    parameters: tuple[Tensor, ...],
    cls_token: Tensor | None,
    pos_embedding: Tensor | None,
    patch_size: Any,
) -> None:
    op, named = "patch_embedding", dict(zip(PARAMETERS, parameters, strict=True))
    added = dict(zip(TOKENS, (cls_token, pos_embedding), strict=True))
    check_tensors(op, {"img": img, **named}, added)
    sizes = list(patch_size) if isinstance(patch_size, (tuple, list)) else [patch_size]
    if len(sizes) != 2 or not all(type(s) is int and s > 0 for s in sizes):
        refuse(op, "patch_size to be two ints > 0", patch_size)
    ph, pw = sizes
    if img.dim() != 4 or img.shape[2] % ph or img.shape[3] % pw or 0 in img.shape[1:]:
        wanted = f"img of shape (B, C, H, W) with H a multiple of {ph} and W of {pw}, none empty"
        refuse(op, wanted, tuple(img.shape))
    if (cls_token is None) != (pos_embedding is None):
        refuse(op, "cls_token and pos_embedding together", "one of them")
    patch, d = img.shape[1] * ph * pw, parameters[2].shape[0]
    n = (img.shape[2] // ph) * (img.shape[3] // pw)
    shapes: dict[str, tuple[int, ...]] = {"norm1_weight": (patch,), "norm1_bias": (patch,)}
    shapes |= {"weight": (d, patch), "bias": (d,), "norm2_weight": (d,), "norm2_bias": (d,)}
    shapes |= {"cls_token": (1, 1, d), "pos_embedding": (1, 1 + n, d)}
    for name, shape in shapes.items():
        t = {**named, **added}[name]
        if t is not None and t.shape != shape:
            refuse(op, f"{name} of shape {shape}", tuple(t.shape))


# ---- registration: crate_kernels::patch_embedding and its backward


def _kernels(backend: str) -> Any:
    """The module of the passes; Triton is imported at the first launch, not before."""
    if backend == "reference":
        from . import torch_kernels

        return torch_kernels
    from . import triton_kernels

    return triton_kernels


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _forward(
    img: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    cls_token: Tensor | None,
    pos_embedding: Tensor | None,
    patch_size: list[int],
    eps: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    keeps: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, then what the backward pass needs: zhat (B, n, P), e (B, n, D), and b + W beta (D,)."""
    kernels, (ph, pw) = _kernels(backend), patch_size
    folded, shift = kernels.fold(norm1_weight, norm1_bias, weight, bias, img.shape[1], dtype)
    zhat = kernels.normalise_patches(img, (ph, pw), eps, dtype)
    e = zhat @ folded.mT
    x = kernels.embed(e, shift, norm2_weight, norm2_bias, cls_token, pos_embedding, eps, out_dtype)
    if not keeps:
        return x, e.new_empty(0), e.new_empty(0), shift.new_empty(0)
    return x, zhat, e, shift


def _backward(
    dx: Tensor,
    zhat: Tensor,
    e: Tensor,
    shift: Tensor,
    img: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    cls_token: Tensor | None,
    pos_embedding: Tensor | None,
    patch_size: list[int],
    eps: float,
    wants: list[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of img and of the rest, in order; empty where not wanted."""
    kernels, (ph, pw) = _kernels(backend), patch_size
    channels, has_cls = weight.shape[1] // (ph * pw), cls_token is not None
    de, db, dnorm2_weight, dpos = kernels.embed_backward(dx, e, shift, norm2_weight, has_cls, eps)
    dnorm2_bias = dpos[int(has_cls) :].sum(0)
    dimg = dnorm1_weight = dnorm1_bias = dweight = None
    wide = _wide(weight)
    if img is not None and wants[0]:
        folded, _ = kernels.fold(norm1_weight, norm1_bias, weight, bias, channels, de.dtype)
        dzhat = de @ folded
        dimg = kernels.normalise_patches_backward(dzhat, img, (ph, pw), eps)
    if wants[1] or wants[3]:
        m = sum_over_tokens(de, zhat, wide.dtype)
        m = m.unflatten(1, (channels, -1)).mT.flatten(1)  # columns as weight has them
        dnorm1_weight = (wide * m).sum(0)
        dweight = torch.addr(m * norm1_weight, db, _wide(norm1_bias))
    if wants[2]:
        dnorm1_bias = db @ wide
    dcls = dpos[:1].clone() if has_cls else None
    found = (
        dimg, dnorm1_weight, dnorm1_bias, dweight, db, dnorm2_weight, dnorm2_bias, dcls, dpos
    )  # fmt: skip
    leaves = (
        img, norm1_weight, norm1_bias, weight, bias, norm2_weight, norm2_bias,
        cls_token, pos_embedding,
    )  # fmt: skip
    return [
        t.to(leaf.dtype).view(leaf.shape)
        if want and t is not None and leaf is not None
        else e.new_empty(0)
        for t, leaf, want in zip(found, leaves, wants, strict=True)
    ]


def _forward_fake(img: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, cls_token = rest[2], rest[6]
    (ph, pw), _, dtype, out_dtype, keeps, _ = rest[8:]
    batch, (d, patch) = img.shape[0], weight.shape
    n = (img.shape[2] // ph) * (img.shape[3] // pw)
    x = img.new_empty(batch, n + (cls_token is not None), d, dtype=out_dtype)
    zhat, e, shift = ((batch, n, patch), (batch, n, d), (d,)) if keeps else ((0,),) * 3
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (
        x,
        x.new_empty(zhat, dtype=dtype),
        x.new_empty(e, dtype=dtype),
        x.new_empty(shift, dtype=wide),
    )


def _backward_fake(dx: Tensor, zhat: Tensor, e: Tensor, shift: Tensor, *rest: Any) -> list[Tensor]:
    leaves, wants = rest[:9], rest[11]
    return [
        leaf.new_empty(leaf.shape) if want and leaf is not None else e.new_empty(0)
        for leaf, want in zip(leaves, wants, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    img, *given = inputs[:9]
    ctx.options = (inputs[9], inputs[10], inputs[14])
    ctx.save_for_backward(*output[1:], img if ctx.needs_input_grad[0] else None, *given)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of the others no zeros are made


def _gradient(ctx: Any, dx: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dx is None:
        return (None,) * 15
    patch_size, eps, backend = ctx.options
    wants = list(ctx.needs_input_grad[:9])
    found = torch.ops.crate_kernels.patch_embedding_backward(
        dx, *ctx.saved_tensors, patch_size, eps, wants, backend
    )
    gradients = [g if want else None for g, want in zip(found, wants, strict=True)]
    return (*gradients, *(None for _ in range(6)))


_GIVEN = (
    " Tensor norm1_weight, Tensor norm1_bias, Tensor weight, Tensor bias, Tensor norm2_weight,"
    " Tensor norm2_bias, Tensor? cls_token, Tensor? pos_embedding, int[] patch_size, float eps,"
)
define(
    f"patch_embedding(Tensor img,{_GIVEN} ScalarType dtype, ScalarType out_dtype, bool keeps,"
    " str backend) -> (Tensor x, Tensor zhat, Tensor e, Tensor shift)",
    _forward,
    _forward_fake,
)
define(
    f"patch_embedding_backward(Tensor dx, Tensor zhat, Tensor e, Tensor shift, Tensor? img,{_GIVEN}"
    " bool[] wants, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
define_gradient("patch_embedding", _gradient, _save)
