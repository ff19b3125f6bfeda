"""The stem of CRATE on :func:`crate_kernels.patch_embedding`, and how it is recognised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..library import autocast_dtype, autocast_is_on
from ..patch_embedding.op import patch_embedding
from ..patch_embedding.reference import patches_of
from .layers import _not_plain, has_hooks, log_once, reason_against_dtypes
from .recognition import same, waves


class Patches(nn.Module):
    """Images (B, C, H, W) -> patches (B, n, ph*pw*C), row by row, channels innermost."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, img: Tensor) -> Tensor:
        ph, pw = self.height, self.width
        if img.dim() != 4 or img.shape[2] % ph != 0 or img.shape[3] % pw != 0:
            raise ValueError(
                f"CRATE: expected images of shape (B, C, H, W) with H a multiple of {ph} and W of "
                f"{pw}, got {tuple(img.shape)}"
            )
        return patches_of(img, (ph, pw))

    def extra_repr(self) -> str:
        return f"{self.height}, {self.width}"


class PatchEmbedding(nn.Sequential):
    r"""The published ``to_patch_embedding``: patches, LayerNorm, Linear, LayerNorm, as one op.

    .. math:: t = \mathrm{LN}_2(\mathrm{LN}_1(\mathrm{patches}(img))\, W^T + b)

    Runs its children one by one where the op would pass over something: hooks on them or on all
    modules, children that are no longer plain, norms of different eps, parameters of several
    dtypes without autocast. The log names each such reason once.

    Keys: ``1.*`` and ``3.*`` of the norms, ``2.*`` of the projection. :func:`crate_kernels.fuse`
    makes one of the module that is there.
    """

    # What fuse found child 0 to cut, in pixels.
    patch_size: tuple[int, int]

    def forward(self, img: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, n, D), in the dtype that the children would give."""
        reason = self.unfused_reason(img)
        if reason is not None:
            if not torch.compiler.is_compiling():
                log_once(f"a PatchEmbedding runs unfused: {reason}")
            return super().forward(img)
        wide = img.is_cuda and autocast_is_on("cuda")  # where autocast norms in float32
        return self._run(img, None, None, torch.float32 if wide else None)

    def embed(self, img: Tensor, cls_token: Tensor, pos_embedding: Tensor) -> Tensor:
        """[cls; forward(img)] + pos, (B, 1 + n, D), in one pass more than forward has.

        In the dtype of the sum, but under autocast on a GPU in autocast's. Not where there is an
        :meth:`unfused_reason`, or a hook on this module.
        """
        dtype = autocast_dtype(img)
        if not (img.is_cuda and autocast_is_on("cuda")):
            dtype = torch.promote_types(dtype, cls_token.dtype)
        return self._run(img, cls_token, pos_embedding, dtype)

    def _run(
        self, img: Tensor, cls: Tensor | None, pos: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        children: Any = self._modules
        _, norm1, project, norm2 = children.values()
        given = (*_parameters(norm1, project, norm2), cls, pos)
        return patch_embedding(
            img,
            *given,
            patch_size=self.patch_size,
            eps=norm1.eps,
            out_dtype=dtype,
        )

    def unfused_reason(self, img: Tensor) -> str | None:
        """Why the children must run one by one on ``img`` right now; None if they need not."""
        if _has_any_global_hook():
            return "hooks on all modules are registered"
        if "patch_size" not in vars(self):
            return "it was not made by fuse"
        reason = _against_children(self)
        if reason is not None:
            return reason
        children: Any = self._modules
        patches, norm1, project, norm2 = children.values()
        if has_hooks(patches) or "forward" in patches.__dict__:
            return "its first module has hooks or a replaced forward"
        ph, pw = self.patch_size
        if img.dim() != 4 or img.shape[2] % ph or img.shape[3] % pw or 0 in img.shape[1:]:
            return f"images of shape {tuple(img.shape)}"  # which the children refuse
        return reason_against_dtypes(img, *_parameters(norm1, project, norm2))


def _parameters(norm1: Any, project: Any, norm2: Any) -> tuple[Any, ...]:
    """In the order of patch_embedding's arguments."""
    first, last = (norm1.weight, norm1.bias), (norm2.weight, norm2.bias)
    return *first, project.weight, project.bias, *last


def looks_like_stem(module: nn.Module) -> bool:
    """Whether it is a Sequential of something that cuts patches, a norm, a Linear and a norm."""
    kinds = [type(child) for child in module._modules.values()]
    expected = [nn.LayerNorm, nn.Linear, nn.LayerNorm]
    return isinstance(module, nn.Sequential) and len(kinds) == 4 and kinds[1:] == expected


def reason_against_stem(module: nn.Module) -> str | None:
    """Why ``module`` is not the published to_patch_embedding; None if it is."""
    if type(module) is not nn.Sequential:
        return f"{type(module).__name__} is a subclass of Sequential"
    if "forward" in vars(module):
        return "the forward of this instance was replaced"
    return _against_children(module) or _against_patches(module)


def patch_size_of(module: nn.Module) -> tuple[int, int]:
    """Of a module that there is no :func:`reason_against_stem`."""
    size = _claimed_size(module[0])  # type: ignore[index]
    assert size is not None
    return size


def _against_children(module: nn.Module) -> str | None:
    if not looks_like_stem(module):
        return "its children are no longer patches, LayerNorm, Linear and LayerNorm"
    children: list[Any] = list(module._modules.values())
    kinds = (nn.LayerNorm, nn.Linear, nn.LayerNorm)
    for name, child, kind in zip("123", children[1:], kinds, strict=True):
        reason = _not_plain(name, child, kind)
        if reason is not None:
            return reason
        if child.weight is None or child.bias is None:
            return f"module {name} has no weight and bias"
    _, norm1, project, norm2 = children
    widths = (norm1.normalized_shape, norm2.normalized_shape)
    if widths != ((project.in_features,), (project.out_features,)):
        return f"its norms are of {widths}, its projection from {project.in_features} features"
    if norm1.eps != norm2.eps or norm1.eps <= 0:
        return f"the eps of its norms are not one > 0: {norm1.eps:g} and {norm2.eps:g}"
    return None


def _claimed_size(patches: nn.Module) -> tuple[int, int] | None:
    """What a module that cuts patches says of their size: ours, or einops' Rearrange."""
    axes = getattr(patches, "axes_lengths", None)
    sizes = [getattr(patches, "height", None), getattr(patches, "width", None)]
    if isinstance(axes, dict):
        sizes = [axes.get("p1"), axes.get("p2")]
    if not all(isinstance(s, int) and s > 0 for s in sizes):
        return None
    return sizes[0], sizes[1]  # type: ignore[return-value]


def _against_patches(module: nn.Module) -> str | None:
    children: dict[str, Any] = module._modules
    patches, _, project, _ = children.values()
    own = type(patches) is Patches or type(patches).__module__.startswith("einops.")
    if not own:
        return f"{type(patches).__name__} is neither einops' Rearrange nor Patches"
    if has_hooks(patches) or "forward" in patches.__dict__:
        return "its first module has hooks or a replaced forward"
    size = _claimed_size(patches)
    features = project.in_features
    if size is None or features % (size[0] * size[1]) != 0:
        return f"its patches are of size {size}, its projection of {features} features"
    img = waves(1, features // (size[0] * size[1]), 2 * size[0], 3 * size[1])
    with torch.no_grad():
        try:
            got = patches(img)
        except Exception as error:
            return f"its first module fails on a trial image: {type(error).__name__}: {error}"
    if not same(got, patches_of(img, size)):
        return "its patches are not in the published order"
    return None
