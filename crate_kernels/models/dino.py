"""CRATE-DINO: self-distillation without labels (arXiv 2104.14294) with CRATE as its network.

The CRATE paper (arXiv 2311.13110) reports models trained by DINO; of its code for them nothing was
found. This is the published DINO, keys and arithmetic, with the blocks of CRATE where its ViT has
its own. Left out: stochastic depth (an ISTA step has no residual to drop) and batch norm in the
head. ``crate_kernels.fuse(model)`` puts student and teacher on this library's ops.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import refuse
from .mae import MAEEncoderBlock
from .patches import PatchEmbed, interpolate_positions


class DINOBackbone(nn.Module):
    """Images of any size (B, C, H, W) -> their class tokens (B, dim).

    Args:
        image_size: what the positions are learned for; they are interpolated to other sizes.
        patch_size, channels: of the images.
        dim, depth, heads, step_size, lambd: of the CRATE blocks, heads of dim / heads.
        device, dtype: of the parameters; "meta" makes none.

    Raises:
        ValueError: patches that do not tile the image, heads that do not divide dim.

    Keys: ``cls_token``, ``pos_embed``, ``patch_embed.proj.*``, ``blocks.{i}.layers.0.*``,
    ``norm.*``.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        step_size: float = 0.1,
        lambd: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads != 0:
            refuse("DINOBackbone", f"heads to divide dim = {dim}", heads)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.patch_size = dim, patch_size
        self.patch_embed = PatchEmbed(image_size, patch_size, channels, dim, **factory)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        tokens = self.patch_embed.num_patches + 1
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim, **factory))
        self.blocks = nn.ModuleList(
            MAEEncoderBlock(dim, heads, dim // heads, 0.0, step_size, lambd, **factory)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, **factory)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        _initialise(self)

    def prepare_tokens(self, img: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, 1 + n, dim), with positions interpolated to their size."""
        x = self.patch_embed(img)
        rows, columns = (side // self.patch_size for side in img.shape[2:])
        positions = interpolate_positions(self.pos_embed, rows, columns)
        return torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + positions

    def forward(self, img: Tensor) -> Tensor:
        x = self.prepare_tokens(img)
        for layer in self.blocks:
            x = layer(x)
        return self.norm(x)[:, 0]

    def get_last_selfattention(self, img: Tensor) -> Tensor:
        """The attention map (B, heads, 1 + n, 1 + n) of the last layer."""
        x = self.prepare_tokens(img)
        for layer in self.blocks[:-1]:
            x = layer(x)
        return self.blocks[-1](x, return_attention=True)


class WeightNormLinear(nn.Module):
    """``y = x W^T`` with rows ``W_i = g_i v_i / |v_i|``.

    Keys: ``weight_g`` (out, 1), ``weight_v`` (out, width).
    """

    def __init__(self, width: int, out: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out, 1, device=device, dtype=dtype))
        self.weight_v = nn.Parameter(torch.empty(out, width, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DINOHead(nn.Module):
    """``WeightNormLinear(normalize(mlp(x)))``: (B, dim) -> (B, out_dim).

    Keys: ``mlp.{0,2,4}.*``, ``last_layer.{weight_g,weight_v}``; weight_g is 1 and fixed where
    ``norm_last_layer``.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        norm_last_layer: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim, **factory),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim, **factory),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim, **factory),
        )
        _initialise(self)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, **factory)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class MultiCropWrapper(nn.Module):
    """A backbone on crops of several sizes, and a head on what it gives. Keys ``backbone.*``,
    ``head.*``."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        """Crops, each (B, C, H, W) -> (crops * B, out_dim), in order."""
        given = [crops] if isinstance(crops, Tensor) else list(crops)
        return self.head(self._features(given))

    def _features(self, crops: list[Tensor]) -> Tensor:
        """One pass for each run of crops of one size.

        A backbone that takes packed sequences (mssa with cu_seqlens) would replace this loop.
        """
        parts, first = [], 0
        for end in range(1, len(crops) + 1):
            if end == len(crops) or crops[end].shape[2:] != crops[first].shape[2:]:
                parts.append(self.backbone(torch.cat(crops[first:end])))
                first = end
        return torch.cat(parts)


class DINOLoss(nn.Module):
    r"""Cross-entropy of the student's crops with the teacher's of other crops.

    .. math:: -\sum_i q_i \log p_i, \qquad q = \mathrm{softmax}((t - c) / \tau_t), \qquad
              p = \mathrm{softmax}(s / \tau_s)

    averaged over the batch and over pairs of a teacher's crop, the first two, and another one of
    the student's. The center c follows the teacher's mean output, over all processes.

    Args:
        out_dim: width of the outputs.
        ncrops: crops the student sees.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: the teacher's temperature
            goes in a line from the one to the other over so many epochs.
        student_temp: the student's.
        center_momentum: what is kept of the center at each step.

    Key: ``center`` (1, out_dim).
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 0,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        device: Any = None,
    ) -> None:
        super().__init__()
        if ncrops < 2:
            refuse("DINOLoss", "at least the 2 crops of the teacher", ncrops)
        self.ncrops, self.student_temp, self.center_momentum = ncrops, student_temp, center_momentum
        self.temperatures = (warmup_teacher_temp, teacher_temp)
        self.warmup_epochs = warmup_teacher_temp_epochs
        self.register_buffer("center", torch.zeros(1, out_dim, device=device))

    def teacher_temp(self, epoch: int) -> float:
        start, end = self.temperatures
        if epoch >= self.warmup_epochs:
            return end
        return start + (end - start) * epoch / max(1, self.warmup_epochs - 1)

    def forward(self, student: Tensor, teacher: Tensor, epoch: int = 0) -> Tensor:
        """Outputs (ncrops * B, out_dim) and (2 * B, out_dim) -> the loss. Moves the center."""
        if len(student) * 2 != len(teacher) * self.ncrops:
            wanted = f"outputs of {self.ncrops} crops and of 2, as many images in each"
            refuse("DINOLoss", wanted, f"{tuple(student.shape)} and {tuple(teacher.shape)}")
        teacher = teacher.detach()
        q = torch.softmax((teacher - self.center) / self.teacher_temp(epoch), dim=-1).chunk(2)
        log_p = torch.log_softmax(student / self.student_temp, dim=-1).chunk(self.ncrops)
        terms = [
            -(q[i] * log_p[j]).sum(-1).mean()
            for i in range(2)
            for j in range(self.ncrops)
            if i != j
        ]
        self.update_center(teacher)
        return torch.stack(terms).mean()

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        center = teacher.mean(0, keepdim=True).to(self.center.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(center)
            center /= torch.distributed.get_world_size()
        self.center.lerp_(center, 1 - self.center_momentum)


class DINO(nn.Module):
    """A student, its slow copy the teacher, and their loss.

    Keys: ``student.{backbone,head}.*``, ``teacher.{backbone,head}.*``, ``dino_loss.center``; the
    published checkpoints hold the three under these names.

    A training step: ``model(crops).backward()``, the optimizer's on the student's parameters, then
    ``update_teacher``.
    """

    def __init__(self, student: MultiCropWrapper, dino_loss: DINOLoss) -> None:
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.dino_loss = dino_loss

    def forward(self, crops: Sequence[Tensor], epoch: int = 0) -> Tensor:
        """Crops (B, C, H, W) each, the two large ones first -> the loss."""
        with torch.no_grad():
            target = self.teacher(crops[:2])
        return self.dino_loss(self.student(crops), target, epoch)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum teacher + (1 - momentum) student."""
        student, teacher = (tuple(m.parameters()) for m in (self.student, self.teacher))
        torch._foreach_lerp_(teacher, student, 1 - momentum)


def teacher_momentum(step: int, steps: int, base: float = 0.996) -> float:
    """From ``base`` up a cosine to 1 at the last of ``steps``."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * step / steps)) / 2


def crate_dino_small(out_dim: int = 65536, ncrops: int = 10, **overrides: Any) -> DINO:
    """CRATE-DINO of CRATE-S: width 576, depth 12, 12 heads of 48; patch 16.

    Args:
        out_dim, ncrops: of the head and of the loss, whose other arguments keep their defaults.
        overrides: arguments of :class:`DINOBackbone`, and ``norm_last_layer`` of the head.
    """
    return _sized(out_dim, ncrops, overrides, dim=576, depth=12, heads=12)


def crate_dino_base(out_dim: int = 65536, ncrops: int = 10, **overrides: Any) -> DINO:
    """CRATE-DINO of CRATE-B: width 768, depth 12, 12 heads of 64. As :func:`crate_dino_small`."""
    return _sized(out_dim, ncrops, overrides, dim=768, depth=12, heads=12)


def _sized(out_dim: int, ncrops: int, overrides: dict[str, Any], **size: int) -> DINO:
    options: dict[str, Any] = {**size, **overrides}
    norm_last_layer = options.pop("norm_last_layer", True)
    backbone = DINOBackbone(**options)
    factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
    head = DINOHead(backbone.embed_dim, out_dim, norm_last_layer, **factory)
    loss = DINOLoss(out_dim, ncrops, device=options.get("device"))
    return DINO(MultiCropWrapper(backbone, head), loss)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
