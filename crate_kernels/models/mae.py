"""The published CRATE-MAE, a masked autoencoder, unfused: keys, initial values and arithmetic.

``crate_kernels.fuse(model)`` puts its encoder and its decoder on this library's ops.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import refuse
from ..library import autocast_dtype, autocast_is_on
from ..masked.op import masked_loss, masked_tokens
from ..masked.reference import masked_tokens_reference
from ..nn.decoder import Decoder, run_decoders
from ..nn.encoder import Encoder, run_encoders
from ..nn.layers import Attention, is_called_plainly
from ..nn.steps import normed
from .crate import PreNorm, block
from .patches import PatchEmbed, interpolate_positions, patchify, sincos_positions, unpatchify


class MAEEncoderBlock(nn.Module):
    """One layer, ``x = x + MSSA(LN(x))``, ``x = ISTA(LN(x))``, with lambda 0.5; x is (B, N, dim).

    Keys: ``layers.0.0.{norm,fn}.*`` (MSSA) and ``layers.0.1.{norm,fn}.*`` (ISTA).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        step_size: float = 0.1,
        lambd: float = 0.5,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        steps = block(dim, heads, dim_head, dropout, step_size, lambd, device=device, dtype=dtype)
        self.layers = nn.ModuleList([steps])

    def forward(
        self, x: Tensor, return_attention: bool = False, return_key: bool = False
    ) -> Tensor:
        """x (B, N, dim) -> the same, or what MSSA returns for these flags."""
        layer: Any
        for layer in self.layers:
            attn, ff = layer
            if return_attention or return_key:
                return attn(x, return_attention=return_attention, return_key=return_key)
            x = ff(attn(x) + x)
        return x


class Dictionary(nn.Module):
    """``y = x A^T``: from codes back to signals, the inverse of ISTA. Key ``weight`` (dim, dim)."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class MAEDecoderBlock(nn.Module):
    """One layer of the decoder, ``h = LN(x) A^T``, ``x = h - MSSA(LN(h))``; x is (B, N, dim).

    The steps of the encoder undone in reverse order: a dictionary in place of the sparse code,
    and a step away from the subspaces, hence the minus sign.

    Keys: ``layers.0.0.{norm,fn}.*`` (A) and ``layers.0.1.{norm,fn}.*`` (MSSA).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        steps = [
            PreNorm(dim, Dictionary(dim, **factory), **factory),
            PreNorm(dim, Attention(dim, heads, dim_head, dropout, **factory), **factory),
        ]
        self.layers = nn.ModuleList([nn.ModuleList(steps)])

    def forward(self, x: Tensor) -> Tensor:
        layer: Any
        for layer in self.layers:
            dictionary, attn = layer
            h = dictionary(x)
            x = h - attn(h)
        return x


class MaskedAutoencoder(nn.Module):
    r"""CRATE-MAE: reconstruct the patches that were hidden.

    .. math:: \hat p = \mathrm{decoder}(\mathrm{encoder}(\mathrm{masked}(p) + P)), \qquad
              \mathrm{loss} = \mathrm{mean}_{\mathrm{hidden}} |\hat p - p|^2

    Unlike in a ViT-MAE, the encoder sees all tokens, a mask token in place of each hidden patch.

    Args:
        image_size, patch_size, channels: of square images, in pixels.
        dim, depth, heads: of the encoder; heads of dim / heads.
        decoder_depth, decoder_heads: of the decoder, of the same width.
        norm_pix_loss: compare patches of mean 0 and variance 1 each.
        step_size, lambd: of ISTA in the encoder.
        device, dtype: of the parameters; "meta" makes none.

    Raises:
        ValueError: patches that do not tile the image, heads that do not divide dim, a dim that is
            no multiple of 4; in forward, images of another size, or a mask_ratio that hides no
            patch, or more than there are.

    Source: Masked Completion via Structured Diffusion with White-Box Transformers,
    arXiv 2404.02446. Keys: ``patch_embed.proj.*``, ``cls_token``, ``mask_token``,
    ``decoder_pos_embed`` (fixed), ``blocks.{i}.layers.0.*``, ``norm.*``,
    ``decoder_blocks.{i}.layers.0.*``, ``decoder_norm.*``, ``decoder_pred.*``; and ``pos_embed`` and
    ``decoder_embed.*``, which the published model carries and does not use. One seed gives the
    published initial values (the fixed positions to rounding), and the published masks.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        norm_pix_loss: bool = False,
        step_size: float = 0.1,
        lambd: float = 0.5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, count in (("heads", heads), ("decoder_heads", decoder_heads)):
            if count < 1 or dim % count != 0:
                refuse("MaskedAutoencoder", f"{name} to divide dim = {dim}", count)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.depth, self.patch_size = heads, depth, patch_size
        self.patch_embed = PatchEmbed(image_size, patch_size, channels, dim, **factory)
        tokens = self.patch_embed.num_patches + 1

        def fixed() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, tokens, dim, **factory), requires_grad=False)

        # Made, and drawn below, in the published order.
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        self.pos_embed = fixed()
        self.blocks = nn.ModuleList(
            MAEEncoderBlock(dim, heads, dim // heads, 0.0, step_size, lambd, **factory)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.decoder_embed = nn.Linear(dim, dim, **factory)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        self.decoder_pos_embed = fixed()
        self.decoder_blocks = nn.ModuleList(
            MAEDecoderBlock(dim, decoder_heads, dim // decoder_heads, **factory)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.decoder_pred = nn.Linear(dim, patch_size**2 * channels, **factory)
        self.norm_pix_loss = norm_pix_loss
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        positions = sincos_positions(self.pos_embed.shape[2], self.patch_embed.grid)
        self.pos_embed.copy_(positions)
        self.decoder_pos_embed.copy_(positions)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        img: Tensor,
        mask_ratio: float = 0.75,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) -> loss, predicted patches (B, n, p*p*C), mask (B, n), 1 = hidden.

        ``generator`` draws the masks, on the device of img; a given ``mask`` is taken as it is.
        """
        latent, mask = self.forward_encoder(img, mask_ratio, generator, mask, narrow=True)
        predicted = self.forward_decoder(latent)
        return self.forward_loss(img, predicted, mask), predicted, mask

    def forward_encoder(
        self,
        img: Tensor,
        mask_ratio: float,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        narrow: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Images -> codes (B, 1 + n, dim), the class token first, and the mask (B, n).

        ``narrow`` leaves the codes in the dtype in which a fused encoder has its tokens.
        """
        x = self.patch_embed(img)
        if x.shape[1] != self.patch_embed.num_patches:
            wanted = f"images of {self.patch_embed.num_patches} patches of {self.patch_size}"
            refuse("MaskedAutoencoder", wanted, tuple(img.shape))
        if mask is None:
            mask = self._mask(x, mask_ratio, generator)
        elif mask.shape != x.shape[:2]:
            refuse("MaskedAutoencoder", f"mask of shape {tuple(x.shape[:2])}", tuple(mask.shape))
        return self._encode(self._hidden(x, mask), narrow), mask

    def _hidden(self, x: Tensor, mask: Tensor) -> Tensor:
        """Patches (B, n, dim) -> what enters the encoder, (B, 1 + n, dim)."""
        given = (x, mask, self.mask_token, self.cls_token, self.decoder_pos_embed)
        first = next(iter(self.blocks), None)
        is_fused = type(first) is Encoder and is_called_plainly(first)
        if not is_fused or self.decoder_pos_embed.requires_grad:
            return masked_tokens_reference(*given)
        # Before a swapped encoder the sum may be in autocast's dtype.
        narrow = x.is_cuda and autocast_is_on("cuda")
        return masked_tokens(*given, dtype=autocast_dtype(x) if narrow else None)

    def _mask(self, x: Tensor, ratio: float, generator: torch.Generator | None) -> Tensor:
        """(B, n): in each item a part ``ratio`` of the patches, those of largest random noise."""
        batch, n, _ = x.shape
        kept = int(n * (1 - ratio))
        if not 0 <= kept < n:
            refuse("MaskedAutoencoder", "mask_ratio in (0, 1] that hides a patch", ratio)
        noise = torch.rand(batch, n, device=x.device, generator=generator)
        rank = noise.argsort(dim=1).argsort(dim=1)
        return (rank >= kept).float()

    def _encode(self, x: Tensor, narrow: bool) -> Tensor:
        x = run_encoders(self.blocks, x)
        if not any(type(block) is Encoder for block in self.blocks):
            return self.norm(x)
        if narrow:
            return normed("CRATE-MAE", "norm", self.norm, x)
        return self.norm(x.to(torch.promote_types(x.dtype, self.cls_token.dtype)))

    def forward_decoder(self, x: Tensor) -> Tensor:
        """Codes (B, 1 + n, dim) -> predicted patches (B, n, p*p*C)."""
        x = run_decoders(self.decoder_blocks, x)
        is_fused = any(type(block) is Decoder for block in self.decoder_blocks)
        x = (
            normed("CRATE-MAE", "decoder_norm", self.decoder_norm, x)
            if is_fused
            else self.decoder_norm(x)
        )
        predicted = self.decoder_pred(x)
        # The gradient of a part of a split needs no zeros to be written into, but torch.compile
        # (2.11) of a training step had not got past it after 100 s, for 25 s otherwise.
        if torch.compiler.is_compiling():
            return predicted[:, 1:]
        return predicted.split((1, x.shape[1] - 1), dim=1)[1]

    def forward_loss(self, img: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
        """Mean squared difference of the patches that ``mask`` (B, n) counts."""
        is_fused = any(type(block) is Decoder for block in self.decoder_blocks)
        if is_fused and not (img.requires_grad or mask.requires_grad):
            size, norm_pix = self.patch_size, self.norm_pix_loss
            return masked_loss(predicted, img, mask, patch_size=size, norm_pix=norm_pix)
        target = self.patchify(img)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        loss = ((predicted - target) ** 2).mean(dim=-1)
        return (loss * mask).sum() / mask.sum()

    def patchify(self, img: Tensor) -> Tensor:
        """Images (B, C, H, W) -> patches (B, n, p*p*C)."""
        return patchify(img, self.patch_size)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches (B, n, p*p*C) of square images -> images (B, C, H, W)."""
        return unpatchify(x, self.patch_size, x.shape[2] // self.patch_size**2)

    # ---- what published analyses look at: unmasked images of any size

    def prepare_tokens(self, img: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, 1 + n, dim), with positions interpolated to their size."""
        x = self.patch_embed(img)
        rows, columns = (side // self.patch_size for side in img.shape[2:])
        positions = interpolate_positions(self.decoder_pos_embed, rows, columns)
        return torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + positions

    def get_selfattention_enc(self, img: Tensor, layer: int = 10) -> Tensor:
        """The attention map (B, heads, 1 + n, 1 + n) of an encoder layer."""
        return self._before(img, layer, return_attention=True)

    def get_last_key_enc(self, img: Tensor, layer: int = 10) -> Tensor:
        """The projected tokens w (B, 1 + n, dim) of an encoder layer."""
        return self._before(img, layer, return_key=True)

    def _before(self, img: Tensor, layer: int, **flag: bool) -> Tensor:
        if not 0 <= layer < len(self.blocks):
            refuse("MaskedAutoencoder", f"layer from 0 to {len(self.blocks) - 1}", layer)
        x = self.prepare_tokens(img)
        for before in self.blocks[:layer]:
            x = before(x)
        return self.blocks[layer](x, **flag)


def crate_mae_tiny(**overrides: Any) -> MaskedAutoencoder:
    """CRATE-MAE-T: width 384, depth 12 + 12, 6 heads of 64.

    ``overrides`` are arguments of :class:`MaskedAutoencoder`.
    """
    return _sized(overrides, dim=384, depth=12, heads=6)


def crate_mae_small(**overrides: Any) -> MaskedAutoencoder:
    """CRATE-MAE-S: width 576, depth 12 + 12, 12 heads of 48. As :func:`crate_mae_tiny`."""
    return _sized(overrides, dim=576, depth=12, heads=12)


def crate_mae_base(**overrides: Any) -> MaskedAutoencoder:
    """CRATE-MAE-B: width 768, depth 12 + 12, 12 heads of 64. As :func:`crate_mae_tiny`."""
    return _sized(overrides, dim=768, depth=12, heads=12)


def crate_mae_large(**overrides: Any) -> MaskedAutoencoder:
    """CRATE-MAE-L: width 1024, depth 24 + 24, 16 heads of 64. As :func:`crate_mae_tiny`."""
    return _sized(overrides, dim=1024, depth=24, heads=16)


def _sized(overrides: dict[str, Any], *, dim: int, depth: int, heads: int) -> MaskedAutoencoder:
    sizes = {"dim": dim, "depth": depth, "heads": heads}
    decoder = {"decoder_depth": depth, "decoder_heads": heads}
    return MaskedAutoencoder(**{**sizes, **decoder, **overrides})
