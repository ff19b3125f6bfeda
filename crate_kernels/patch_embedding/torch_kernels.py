"""The passes of the stem by torch's own kernels, on any device and dtype.

Patches lie in the order of the image here, (C, ph, pw) flattened, and zhat is without the norm's
weight and bias: op.py has both in the projection. Sums are in float32 or better.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold(
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    channels: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """W' = W diag(gamma) in ``dtype``, columns in the order of the image; b + W beta."""
    wide = _wide(weight)
    folded = (wide * norm_weight).unflatten(1, (-1, channels)).mT.flatten(1)
    return folded.to(dtype), torch.addmv(_wide(bias), wide, _wide(norm_bias))


def normalise_patches(
    img: Tensor, patch_size: tuple[int, int], eps: float, dtype: torch.dtype
) -> Tensor:
    """zhat (B, n, C*ph*pw) in ``dtype``: the patches of img (B, C, H, W), less mean, over sigma."""
    patches = _wide(_in_image_order(img, patch_size))
    return torch.nn.functional.layer_norm(patches, patches.shape[-1:], eps=eps).to(dtype)


def normalise_patches_backward(
    dzhat: Tensor, img: Tensor, patch_size: tuple[int, int], eps: float
) -> Tensor:
    """The gradient of img, in its dtype."""
    ph, pw = patch_size
    b, c, height, width = img.shape
    patches = _wide(_in_image_order(img, patch_size))
    _, mean, rstd = torch.native_layer_norm(patches, patches.shape[-1:], None, None, eps)
    dp, _, _ = torch.ops.aten.native_layer_norm_backward(
        dzhat.to(patches.dtype), patches, patches.shape[-1:], mean, rstd, None, None,
        [True, False, False],
    )  # fmt: skip
    grid = dp.to(img.dtype).view(b, height // ph, width // pw, c, ph, pw)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(img.shape)


def embed(
    e: Tensor,
    shift: Tensor,
    gamma: Tensor,
    beta: Tensor,
    cls_token: Tensor | None,
    pos_embedding: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """[cls; LN(e + shift)] + pos, (B, 1 + n, D) in ``dtype``; LN(e + shift), (B, n, D), without."""
    wide = _wide(e) + shift
    gamma, beta = gamma.to(wide.dtype), beta.to(wide.dtype)
    t = torch.nn.functional.layer_norm(wide, wide.shape[-1:], gamma, beta, eps)
    if cls_token is not None and pos_embedding is not None:
        t = torch.cat((cls_token.to(wide.dtype).expand(len(t), -1, -1), t), dim=1) + pos_embedding
    return t.to(dtype)


def embed_backward(
    dx: Tensor, e: Tensor, shift: Tensor, gamma: Tensor, has_cls: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """de like e, its sum over all rows (D,), dgamma (D,), and dx summed over the batch."""
    wide = _wide(e) + shift
    given = dx[:, 1:] if has_cls else dx
    _, mean, rstd = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
    de, dgamma, _ = torch.ops.aten.native_layer_norm_backward(
        given.to(wide.dtype).contiguous(), wide, wide.shape[-1:], mean, rstd,
        gamma.to(wide.dtype), torch.zeros_like(gamma, dtype=wide.dtype), [True, True, False],
    )  # fmt: skip
    return de.to(e.dtype), de.sum((0, 1)), dgamma, dx.sum(0, dtype=wide.dtype)


def _in_image_order(img: Tensor, patch_size: tuple[int, int]) -> Tensor:
    ph, pw = patch_size
    b, c, height, width = img.shape
    grid = img.reshape(b, c, height // ph, ph, width // pw, pw).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(b, (height // ph) * (width // pw), c * ph * pw)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
