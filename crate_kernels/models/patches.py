"""Image patches and their positions, as the self-supervised models (MAE, DINO) have them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) -> tokens (B, H/p * W/p, dim), row by row. Keys ``proj.{weight,bias}``.

    Raises:
        ValueError: an image_size that is no multiple of patch_size; in forward, images of another
            rank, or of sides that are none.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        channels: int,
        dim: int,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if image_size % patch_size != 0:
            raise ValueError(
                f"PatchEmbed: expected image_size to be a multiple of patch_size {patch_size}, "
                f"got {image_size}"
            )
        self.patch_size = (patch_size, patch_size)
        self.grid = image_size // patch_size
        self.num_patches = self.grid**2
        self.proj = nn.Conv2d(
            channels, dim, patch_size, stride=patch_size, device=device, dtype=dtype
        )

    def forward(self, img: Tensor) -> Tensor:
        p = self.patch_size[0]
        if img.dim() != 4 or img.shape[2] % p != 0 or img.shape[3] % p != 0:
            raise ValueError(
                f"PatchEmbed: expected images of shape (B, C, H, W) with H and W multiples of {p}, "
                f"got {tuple(img.shape)}"
            )
        return self.proj(img).flatten(2).transpose(1, 2)


def patchify(img: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, H/p * W/p, p*p*C), row by row, channels innermost."""
    b, c, h, w = img.shape
    parts = img.reshape(b, c, h // p, p, w // p, p)
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(x: Tensor, p: int, channels: int = 3) -> Tensor:
    """The inverse for square images: (B, n*n, p*p*C) -> (B, C, n*p, n*p)."""
    b, count, _ = x.shape
    n = math.isqrt(count)
    parts = x.reshape(b, n, n, p, p, channels)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, n * p, n * p)


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Fixed positions (1, 1 + grid*grid, dim) of a class token (zeros) and a square of patches.

    For frequencies f_k = 10000^(-4k/dim): sin and cos of column * f, then of row * f.

    Raises:
        ValueError: a dim that is no multiple of 4.
    """
    if dim % 4 != 0:
        raise ValueError(f"sincos_positions: expected dim to be a multiple of 4, got {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), frequency)
    one_axis = torch.cat((angle.sin(), angle.cos()), dim=1)  # (grid, dim / 2)
    column = one_axis.repeat(grid, 1)
    row = one_axis.repeat_interleave(grid, dim=0)
    patches = torch.cat((column, row), dim=1)
    return torch.cat((patches.new_zeros(1, dim), patches))[None].float()


def interpolate_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Positions (1, 1 + g*g, dim), trained on a square, for rows x columns patches: bicubic.

    As published, by a factor of (rows + 0.1) / g, which keeps rounding from losing a row.
    """
    count, dim = positions.shape[1] - 1, positions.shape[2]
    grid = math.isqrt(count)
    if (rows, columns) == (grid, grid):
        return positions
    square = positions[:, 1:].reshape(1, grid, grid, dim).permute(0, 3, 1, 2)
    factor = ((rows + 0.1) / grid, (columns + 0.1) / grid)
    square = F.interpolate(square, scale_factor=factor, mode="bicubic")
    return torch.cat((positions[:, :1], square.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
