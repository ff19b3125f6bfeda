"""The published CRATE-alpha image classifier, unfused: keys, shapes, initial values, arithmetic.

``crate_kernels.fuse(model)`` puts its layers on this library's ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_number, refuse
from ..nn.layers import AlphaStep, Attention, OvercompleteFeedForward


class AlphaTransformer(nn.Module):
    """``depth`` layers of ``x = x + MSSA(LN(x))``, ``x = x + ISTA(LN(x))``; x is (B, N, dim).

    ISTA is :class:`crate_kernels.nn.OvercompleteFeedForward`, MSSA has no output bias. DropPath's
    probability grows from 0 at the first layer to ``drop_path`` at the last.

    Keys: ``layers.{i}.0.*`` (MSSA) and ``layers.{i}.1.*`` (ISTA).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        eta: float = 0.1,
        lmbda: float = 0.1,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.depth, self.heads = dim, depth, heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList()
        for i in range(depth):
            fns = (
                Attention(dim, heads, dim_head, dropout, out_bias=False, **factory),
                OvercompleteFeedForward(dim, eta=eta, lmbda=lmbda, **factory),
            )
            drop = drop_path * i / max(depth - 1, 1)
            steps = (AlphaStep(dim, fn, layer_scale, drop, **factory) for fn in fns)
            self.layers.append(nn.ModuleList(steps))

    def forward(self, x: Tensor) -> Tensor:
        layer: Any
        for layer in self.layers:
            attn, ff = layer
            x = attn(x) + x
            x = ff(x) + x
        return x


class CRATEAlpha(nn.Module):
    """CRATE-alpha classifier: patches, class token, :class:`AlphaTransformer`, linear head.

    Args:
        image_size, patch_size: pixels of a side.
        num_classes: width of the logits.
        dim, depth, heads, dim_head: of the transformer.
        channels: of the images.
        dropout, emb_dropout: inside the attention; on the embedded tokens.
        eta, lmbda: step size and penalty of ISTA.
        layer_scale: initial value of a factor on each step and channel; None: no such factors.
        drop_path: probability with which the last layer's steps are left out while training.
        device, dtype: of the parameters; "meta" makes none.

    Raises:
        ValueError: patches that do not tile the image, a negative eta or lmbda, a drop_path
            outside [0, 1); in forward, images with more tokens than there are positions.

    Source: arXiv 2405.20299. Keys: ``conv1.*``, ``pos_embedding``, ``cls_token``,
    ``transformer.layers.*``, ``mlp_head.{0,1}.*``. One seed gives the published initial values.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        eta: float = 0.1,
        lmbda: float = 0.1,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if image_size % patch_size != 0:
            refuse("CRATEAlpha", f"image_size to be a multiple of {patch_size}", image_size)
        check_number("CRATEAlpha", "drop_path", drop_path)
        if drop_path >= 1:
            refuse("CRATEAlpha", "drop_path < 1", drop_path)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        patches = (image_size // patch_size) ** 2
        self.conv1 = nn.Conv2d(channels, dim, patch_size, patch_size, **factory)
        self.pos_embedding = nn.Parameter(torch.randn(1, patches + 1, dim, **factory))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim, **factory))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = AlphaTransformer(
            dim, depth, heads, dim_head, dropout, eta, lmbda, layer_scale, drop_path, **factory
        )
        self.to_latent = nn.Identity()
        self.mlp_head = nn.Sequential(
            nn.LayerNorm(dim, **factory), nn.Linear(dim, num_classes, **factory)
        )

    def forward(self, img: Tensor) -> Tensor:
        """Images (B, channels, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(img))

    def forward_features(self, img: Tensor) -> Tensor:
        """Images (B, channels, H, W) -> tokens (B, 1 + patches, dim), the class token first."""
        x = self.conv1(img).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        if n >= self.pos_embedding.shape[1]:
            refuse("CRATEAlpha", f"at most {self.pos_embedding.shape[1] - 1} patches", n)
        x = torch.cat((self.cls_token.expand(b, -1, -1), x), dim=1)
        x += self.pos_embedding[:, : n + 1]
        return self.transformer(self.dropout(x))

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + patches, dim) -> logits (B, num_classes)."""
        return self.mlp_head(self.to_latent(x[:, 0]))


def crate_alpha_tiny(num_classes: int = 1000, **overrides: Any) -> CRATEAlpha:
    """CRATE-alpha-Ti/16: width 192, depth 12, 3 heads of 64; 4.81 M parameters.

    ``overrides`` are arguments of :class:`CRATEAlpha`, such as image_size (224), patch_size,
    depth, eta, lmbda, layer_scale, drop_path, device.
    """
    return _sized(num_classes, overrides, 16, dim=192, depth=12, heads=3)


def crate_alpha_small(num_classes: int = 1000, **overrides: Any) -> CRATEAlpha:
    """CRATE-alpha-S/16: width 576, depth 12, 12 heads of 48; 40.98 M parameters."""
    return _sized(num_classes, overrides, 16, dim=576, depth=12, heads=12)


def crate_alpha_base(num_classes: int = 1000, **overrides: Any) -> CRATEAlpha:
    """CRATE-alpha-B/16: width 768, depth 12, 12 heads of 64; 72.33 M parameters."""
    return _sized(num_classes, overrides, 16, dim=768, depth=12, heads=12)


def crate_alpha_large(num_classes: int = 1000, **overrides: Any) -> CRATEAlpha:
    """CRATE-alpha-L/14: width 1024, depth 24, 16 heads of 64; 253.65 M parameters."""
    return _sized(num_classes, overrides, 14, dim=1024, depth=24, heads=16)


def crate_alpha_huge(num_classes: int = 1000, **overrides: Any) -> CRATEAlpha:
    """CRATE-alpha-H/14: width 1280, depth 32, 16 heads of 80; 526.82 M parameters."""
    return _sized(num_classes, overrides, 14, dim=1280, depth=32, heads=16)


def _sized(num_classes: int, overrides: dict[str, Any], patch_size: int, **size: int) -> CRATEAlpha:
    options: dict[str, Any] = {"image_size": 224, "patch_size": patch_size, **size, **overrides}
    options.setdefault("dim_head", options["dim"] // options["heads"])
    return CRATEAlpha(num_classes=num_classes, **options)
