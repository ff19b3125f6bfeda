"""The stem of CRATE-alpha, -MAE and -DINO: a convolution by whole patches, as one GEMM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..library import autocast_dtype


class PatchProjection(nn.Conv2d):
    r"""A ``nn.Conv2d`` whose kernel is its stride: each patch of an image, flattened, times W^T.

    .. math:: y_{b, :, i, j} = W\, \mathrm{patch}_{ij}(img_b) + bias

    One pass cuts the patches, in autocast's dtype where it is on, and one GEMM projects them;
    cuDNN's convolution takes the image through two more layouts. Patches are kept for the backward
    pass. On the CPU, and for images that are no whole number of patches, the convolution's own
    forward.

    Returns (B, D, H / p, W / p) as Conv2d does, but in the strides of tokens (B, n, D): what
    flattens and transposes it gets these, contiguous. In float32 the GEMM is as
    ``torch.get_float32_matmul_precision()`` says, not as cuDNN's convolutions are told.

    Keys: as of the convolution. :func:`crate_kernels.fuse` makes one of the module that is there.
    """

    def forward(self, img: Tensor) -> Tensor:
        ph, pw = self.kernel_size
        whole = img.dim() == 4 and img.shape[2] % ph == 0 and img.shape[3] % pw == 0
        fits = whole and img.is_floating_point() and 0 not in img.shape[1:]
        if not (fits and img.is_cuda and img.shape[1] == self.in_channels):
            return super().forward(img)
        return self.project(img)

    def project(self, img: Tensor) -> Tensor:
        """By a GEMM, on any device; img (B, C, H, W) of whole patches."""
        ph, pw = self.kernel_size
        b, c, height, width = img.shape
        grid = img.reshape(b, c, height // ph, ph, width // pw, pw).permute(0, 2, 4, 1, 3, 5)
        patches = grid.to(autocast_dtype(img), memory_format=torch.contiguous_format)
        y = F.linear(patches.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)
        return y.mT.unflatten(2, (height // ph, width // pw))


def looks_like_patch_projection(module: nn.Module) -> bool:
    """Whether it is a convolution by whole patches of more than one pixel, to be swapped."""
    if not isinstance(module, nn.Conv2d) or module.kernel_size != module.stride:
        return False
    return module.kernel_size != (1, 1) and module.groups == 1


def reason_against_patch_projection(module: nn.Conv2d) -> str | None:
    """Why such a convolution is not nn.Conv2d without padding; None if it is."""
    if type(module) is not nn.Conv2d:
        return f"{type(module).__name__} is a subclass of Conv2d"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return "the forward of this instance was replaced"
    if module.padding not in ((0, 0), "valid") or module.dilation != (1, 1):
        return "it has padding or dilation"
    return None
