"""The published CRATE image classifier, unfused: keys, shapes, initial values and arithmetic.

``crate_kernels.fuse(model)`` puts its layers on this library's ops.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..nn.encoder import Encoder
from ..nn.layers import Attention, FeedForward, is_called_plainly
from ..nn.patch_embedding import PatchEmbedding, Patches


class PreNorm(nn.Module):
    """``fn(LayerNorm(x), **kwargs)``; keys ``norm.*`` and ``fn.*``."""

    def __init__(self, dim: int, fn: nn.Module, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fn(self.norm(x), **kwargs)


def block(
    dim: int,
    heads: int,
    dim_head: int,
    dropout: float = 0.0,
    step_size: float = 0.1,
    lambd: float = 0.1,
    *,
    device: Any = None,
    dtype: Any = None,
) -> nn.ModuleList:
    """The two steps of one layer, each behind its norm: [MSSA, ISTA]."""
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    attn = PreNorm(dim, Attention(dim, heads, dim_head, dropout, **factory), **factory)
    ff = PreNorm(dim, FeedForward(dim, step_size, lambd, **factory), **factory)
    return nn.ModuleList([attn, ff])


class Transformer(nn.Module):
    """``depth`` layers of ``x = x + MSSA(LN(x))``, ``x = ISTA(LN(x))``; x is (B, N, dim).

    Keys: ``layers.{i}.0.*`` (MSSA) and ``layers.{i}.1.*`` (ISTA).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        step_size: float = 0.1,
        lambd: float = 0.1,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.depth, self.heads = dim, depth, heads
        options = (dim, heads, dim_head, dropout, step_size, lambd)
        self.layers = nn.ModuleList(
            block(*options, device=device, dtype=dtype) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        layer: Any
        for layer in self.layers:
            attn, ff = layer
            x = ff(attn(x) + x)
        return x


class CRATE(nn.Module):
    """CRATE classifier: patches, class token, :class:`Transformer`, linear head.

    Args:
        image_size, patch_size: pixels, an int or (height, width).
        num_classes: width of the logits.
        dim, depth, heads, dim_head: of the transformer.
        pool: "cls" (the class token) or "mean" (over all tokens).
        channels: of the images.
        dropout, emb_dropout: inside the attention; on the embedded tokens.
        step_size, lambd: of ISTA.
        device, dtype: of the parameters; "meta" makes none.

    Raises:
        ValueError: patches that do not tile the image, an unknown pool, a negative step_size or
            lambd; in forward, images of another rank or more tokens than there are positions.

    Source: arXiv 2311.13110. Keys: ``to_patch_embedding.{1,2,3}.*``, ``pos_embedding``,
    ``cls_token``, ``transformer.layers.*``, ``mlp_head.{0,1}.*``.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        step_size: float = 0.1,
        lambd: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        height, width = _pair(image_size)
        ph, pw = _pair(patch_size)
        if height % ph != 0 or width % pw != 0:
            raise ValueError(
                f"CRATE: expected image_size to be a multiple of patch_size {(ph, pw)}, "
                f"got {(height, width)}"
            )
        if pool not in ("cls", "mean"):
            raise ValueError(f"CRATE: expected pool to be 'cls' or 'mean', got {pool!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        patches, patch_dim = (height // ph) * (width // pw), channels * ph * pw
        # Drawn in the published order: one seed gives the published initial values.
        self.to_patch_embedding = nn.Sequential(
            Patches(ph, pw),
            nn.LayerNorm(patch_dim, **factory),
            nn.Linear(patch_dim, dim, **factory),
            nn.LayerNorm(dim, **factory),
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, patches + 1, dim, **factory))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim, **factory))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = Transformer(
            dim, depth, heads, dim_head, dropout, step_size, lambd, **factory
        )
        self.pool = pool
        self.to_latent = nn.Identity()
        self.mlp_head = nn.Sequential(
            nn.LayerNorm(dim, **factory), nn.Linear(dim, num_classes, **factory)
        )

    def forward(self, img: Tensor) -> Tensor:
        """Images (B, channels, H, W) -> logits (B, num_classes)."""
        # The head's norm takes one token of them as it is; a mean is better of float32.
        return self.forward_head(self.forward_features(img, narrow=self.pool == "cls"))

    def forward_features(self, img: Tensor, narrow: bool = False) -> Tensor:
        """Images (B, channels, H, W) -> tokens (B, 1 + patches, dim), the class token first.

        ``narrow`` leaves them in the dtype in which a fused encoder has them between its layers.
        """
        x = self.dropout(self._embedded(img))
        encoder: nn.Module = self.transformer
        if narrow and type(encoder) is Encoder and x.is_cuda and is_called_plainly(encoder):
            return encoder.narrow(x)
        return encoder(x)

    def _embedded(self, img: Tensor) -> Tensor:
        embedding: nn.Module = self.to_patch_embedding
        if self._embeds_at_once(embedding, img):
            return embedding.embed(img, self.cls_token, self.pos_embedding)
        x = embedding(img)
        b, n, _ = x.shape
        if n >= self.pos_embedding.shape[1]:
            raise ValueError(
                f"CRATE: expected at most {self.pos_embedding.shape[1] - 1} patches, got {n}"
            )
        x = torch.cat((self.cls_token.expand(b, -1, -1), x), dim=1)
        x += self.pos_embedding[:, : n + 1]
        return x

    def _embeds_at_once(self, embedding: nn.Module, img: Tensor) -> TypeGuard[PatchEmbedding]:
        """Whether class token and positions are added in the swapped stem's last pass.

        Only before a swapped encoder: the sum may be in autocast's dtype.
        """
        encoder: nn.Module = self.transformer
        if type(embedding) is not PatchEmbedding or type(encoder) is not Encoder:
            return False
        if not is_called_plainly(embedding) or embedding.unfused_reason(img) is not None:
            return False
        ph, pw = embedding.patch_size
        patches = (img.shape[2] // ph) * (img.shape[3] // pw)
        return self.pos_embedding.shape[1] == 1 + patches

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + patches, dim) -> logits (B, num_classes)."""
        x = x.mean(dim=1) if self.pool == "mean" else x[:, 0]
        return self.mlp_head(self.to_latent(x))


def crate_tiny(num_classes: int = 1000, **overrides: Any) -> CRATE:
    """CRATE-T: width 384, depth 12, 6 heads of 64; 6.09 M parameters.

    ``overrides`` are arguments of :class:`CRATE`, such as image_size (224), patch_size (16),
    depth, step_size, lambd, dropout, device.
    """
    return _sized(num_classes, overrides, dim=384, depth=12, heads=6)


def crate_small(num_classes: int = 1000, **overrides: Any) -> CRATE:
    """CRATE-S: width 576, depth 12, 12 heads of 48; 13.12 M parameters. As :func:`crate_tiny`."""
    return _sized(num_classes, overrides, dim=576, depth=12, heads=12)


def crate_base(num_classes: int = 1000, **overrides: Any) -> CRATE:
    """CRATE-B: width 768, depth 12, 12 heads of 64; 22.80 M parameters. As :func:`crate_tiny`."""
    return _sized(num_classes, overrides, dim=768, depth=12, heads=12)


def crate_large(num_classes: int = 1000, **overrides: Any) -> CRATE:
    """CRATE-L: width 1024, depth 24, 16 heads of 64; 77.64 M parameters. As :func:`crate_tiny`."""
    return _sized(num_classes, overrides, dim=1024, depth=24, heads=16)


def _sized(num_classes: int, overrides: dict[str, Any], **size: int) -> CRATE:
    options: dict[str, Any] = {"image_size": 224, "patch_size": 16, **size, **overrides}
    options.setdefault("dim_head", options["dim"] // options["heads"])
    return CRATE(num_classes=num_classes, **options)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)
