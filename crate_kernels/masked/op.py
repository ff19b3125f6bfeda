"""What CRATE-MAE does around its layers, arXiv 2404.02446, a pass each: hiding patches, the loss.

x = [cls; e, or where hidden the mask token] + pos
loss = sum_i m_i mean_k (p_ik - target_ik)^2 / sum_i m_i
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import FLOATS, refuse
from ..library import define, define_gradient, wide_dtype
from . import torch_kernels


def masked_tokens(
    x: Tensor,
    mask: Tensor,
    mask_token: Tensor,
    cls_token: Tensor,
    positions: Tensor,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Embedded patches, those that are hidden replaced, behind a class token, and positions.

    .. math:: y = [cls;\ \mathrm{where}(m > 0, token, x)] + pos

    Args:
        x: patches (B, n, D).
        mask: (B, n), of any dtype: what is above 0 is hidden.
        mask_token, cls_token: (1, 1, D).
        positions: (1, 1 + n, D), fixed: no gradient.
        dtype: of the result; None: that of the sum.
        backend: "auto", "triton" or "reference".

    Returns:
        (B, 1 + n, D), contiguous. The mask token is rounded to x's dtype, the sum is in float32 or
        better and rounded once. Patches that are hidden are not read. The backward pass keeps the
        mask.

    Dtypes: float16, bfloat16, float32, float64 (by the reference backend).

    Raises:
        ValueError: shapes, devices or a backend that do not fit.
        TypeError: not floating.

    Source: arXiv 2404.02446. Bytes: docs/masked.md.
    """
    op = "masked_tokens"
    if x.dim() != 3:
        refuse(op, "x of shape (B, n, D)", tuple(x.shape))
    batch, n, d = x.shape
    wanted: dict[str, Any] = {"mask": (batch, n), "mask_token": (1, 1, d)}
    wanted |= {"cls_token": (1, 1, d), "positions": (1, 1 + n, d)}
    given = (mask, mask_token, cls_token, positions)
    _check(op, x, dict(zip(wanted, given, strict=True)), wanted)
    if dtype is None:
        dtype = torch.promote_types(torch.promote_types(x.dtype, cls_token.dtype), positions.dtype)
    widest = torch.promote_types(torch.promote_types(dtype, x.dtype), positions.dtype)
    backend = backends.choose(op, backend, x, widest, None)
    weights = mask.detach().to(torch.float32)
    y: Tensor = torch.ops.crate_kernels.masked_tokens(
        x, weights, mask_token, cls_token, positions.detach(), dtype, backend
    )
    return y


def masked_loss(
    predicted: Tensor,
    img: Tensor,
    mask: Tensor,
    *,
    patch_size: int,
    norm_pix: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Mean squared difference of predicted patches and an image's, where the mask counts them.

    .. math:: \mathrm{loss} = \frac{1}{\sum_i m_i} \sum_i m_i\,
              \mathrm{mean}_k (p_{ik} - \mathrm{target}_{ik})^2

    Args:
        predicted: (B, n, p*p*C), pixels row by row, channels innermost.
        img: (B, C, H, W) of n patches of p x p pixels; no gradient.
        mask: (B, n), weights, of any dtype; no gradient.
        patch_size: p.
        norm_pix: targets of mean 0 and variance 1 in each patch: less the mean, over
            sqrt(unbiased variance + 1e-6).
        backend: "auto", "triton" or "reference".

    Returns:
        A scalar in float32, float64 where predicted or img are; NaN where the mask counts nothing.
        Patches of weight 0 are not looked at, not even for NaN. The gradient is contiguous, in the
        dtype of predicted. The backward pass keeps predicted, which must not be changed in place
        before, img and mask.

    Raises:
        ValueError: shapes, devices or a backend that do not fit.
        TypeError: not floating.

    Source: arXiv 2404.02446. Bytes: docs/masked.md.
    """
    op = "masked_loss"
    if img.dim() != 4 or patch_size < 1 or img.shape[2] % patch_size or img.shape[3] % patch_size:
        refuse(op, f"img (B, C, H, W) of whole patches of {patch_size}", tuple(img.shape))
    batch, channels, height, width = img.shape
    n = (height // patch_size) * (width // patch_size)
    shape = (batch, n, channels * patch_size**2)
    named = {"predicted": predicted, "mask": mask}
    _check(op, img, named, {"predicted": shape, "mask": (batch, n)})
    dtype = torch.promote_types(predicted.dtype, img.dtype)
    backend = backends.choose(op, backend, img, dtype, None)
    loss, _ = torch.ops.crate_kernels.masked_loss(
        predicted, img.detach(), mask.detach(), patch_size, norm_pix, backend
    )
    return loss


def _check(op: str, like: Tensor, named: dict[str, Tensor], shapes: dict[str, Any]) -> None:
    for name, t in named.items():
        if t.shape != shapes[name]:
            refuse(op, f"{name} of shape {shapes[name]}", tuple(t.shape))
        if t.device != like.device:
            refuse(op, f"{name} on {like.device}", t.device)
    for t in (like, *(t for name, t in named.items() if name != "mask")):
        if t.dtype not in FLOATS:
            refuse(op, "tensors of dtype float16, bfloat16, float32 or float64", t.dtype, TypeError)


# ---- registration: crate_kernels::masked_tokens, masked_loss, and their backwards


def _kernels(backend: str) -> Any:
    """The module that runs ``backend``; Triton is imported at the first launch, not before."""
    if backend == "triton":
        from . import triton_kernels

        return triton_kernels
    return torch_kernels


def _tokens(
    x: Tensor,
    mask: Tensor,
    mask_token: Tensor,
    cls_token: Tensor,
    positions: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    given = (t.contiguous() for t in (x, mask, mask_token, cls_token, positions))
    y: Tensor = _kernels(backend).tokens_forward(*given, dtype)
    return y


def _tokens_backward(
    dy: Tensor, mask: Tensor, x_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the mask token and the class token, of these (D,)."""
    found: tuple[Tensor, Tensor, Tensor] = _kernels(backend).tokens_backward(
        dy.contiguous(), mask.contiguous(), x_dtype
    )
    return found


def _tokens_fake(x: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    batch, n, d = x.shape
    return x.new_empty(batch, 1 + n, d, dtype=rest[3])


def _tokens_backward_fake(
    dy: Tensor, mask: Tensor, x_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, d = dy.shape
    dmask_token, dcls = (dy.new_empty(d, dtype=wide_dtype(dy.dtype)) for _ in range(2))
    return dy.new_empty(batch, tokens - 1, d, dtype=x_dtype), dmask_token, dcls


def _save_tokens(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, mask_token, cls_token, _, _, ctx.backend = inputs
    ctx.save_for_backward(mask)
    ctx.dtypes = (x.dtype, mask_token.dtype, cls_token.dtype)


def _tokens_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    dtypes = ctx.dtypes
    found = torch.ops.crate_kernels.masked_tokens_backward(dy, mask, dtypes[0], ctx.backend)
    wants = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
    dx, dmask_token, dcls = (
        t.to(dtype) if want else None for t, dtype, want in zip(found, dtypes, wants, strict=True)
    )
    sums = (None if t is None else t.view(1, 1, -1) for t in (dmask_token, dcls))
    return dx, None, *sums, *(None,) * 3


def _loss(
    predicted: Tensor, img: Tensor, mask: Tensor, patch_size: int, norm_pix: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The loss, and the sum of the mask."""
    dtype = wide_dtype(torch.promote_types(predicted.dtype, img.dtype))
    weights = mask.to(dtype).contiguous()
    count = weights.sum()
    options = (_rows(predicted), img, weights, count, patch_size, norm_pix)
    return _kernels(backend).loss_forward(*options), count


def _loss_backward(
    dloss: Tensor,
    predicted: Tensor,
    img: Tensor,
    mask: Tensor,
    count: Tensor,
    patch_size: int,
    norm_pix: bool,
    backend: str,
) -> Tensor:
    weights = mask.to(count.dtype).contiguous()
    dp: Tensor = _kernels(backend).loss_backward(
        dloss, _rows(predicted), img, weights, count, patch_size, norm_pix
    )
    return dp


def _rows(predicted: Tensor) -> Tensor:
    return predicted if predicted.stride(2) == 1 else predicted.contiguous()


def _loss_fake(predicted: Tensor, img: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(torch.promote_types(predicted.dtype, img.dtype))
    return predicted.new_empty((), dtype=dtype), predicted.new_empty((), dtype=dtype)


def _loss_backward_fake(dloss: Tensor, predicted: Tensor, *_: Any) -> Tensor:
    return predicted.new_empty(predicted.shape)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    predicted, img, mask, *ctx.options = inputs
    ctx.save_for_backward(predicted, img, mask, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _loss_gradient(ctx: Any, dloss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 6
    saved = (dloss, *ctx.saved_tensors, *ctx.options)
    return torch.ops.crate_kernels.masked_loss_backward(*saved), *(None,) * 5


define(
    "masked_tokens(Tensor x, Tensor mask, Tensor mask_token, Tensor cls_token, Tensor positions,"
    " ScalarType dtype, str backend) -> Tensor",
    _tokens,
    _tokens_fake,
)
define(
    "masked_tokens_backward(Tensor dy, Tensor mask, ScalarType x_dtype, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _tokens_backward,
    _tokens_backward_fake,
)
define_gradient("masked_tokens", _tokens_gradient, _save_tokens)
define(
    "masked_loss(Tensor predicted, Tensor img, Tensor mask, int patch_size, bool norm_pix,"
    " str backend) -> (Tensor loss, Tensor count)",
    _loss,
    _loss_fake,
)
define(
    "masked_loss_backward(Tensor dloss, Tensor predicted, Tensor img, Tensor mask, Tensor count,"
    " int patch_size, bool norm_pix, str backend) -> Tensor",
    _loss_backward,
    _loss_backward_fake,
)
define_gradient("masked_loss", _loss_gradient, _save_loss)
