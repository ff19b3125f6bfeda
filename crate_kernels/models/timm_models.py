"""CRATE in timm's registry, fused: importing this module registers the four published sizes.

    import crate_kernels.models.timm_models
    model = timm.create_model("crate_base_patch16_224", num_classes=10)

``python -m crate_kernels timm train.py ...`` does so before timm's script. In timm's naming a
``.tag`` names pretrained weights; there are none to download, so these names have no tag.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from ..checks import refuse
from ..nn import fuse
from .crate import CRATE

POOLS = {"token": "cls", "avg": "mean"}  # timm's names for those of CRATE

# As the published models were trained and evaluated on ImageNet-1K.
default_cfgs = generate_default_cfgs(
    {
        f"crate_{size}_patch16_224": {
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "num_classes": 1000,
            "classifier": "mlp_head.1",
            "license": "mit",
            "paper_ids": "arXiv:2311.13110",
        }
        for size in ("tiny", "small", "base", "large")
    }
)


class TimmCRATE(CRATE):
    """:class:`CRATE` with the arguments and methods that timm expects; the published keys.

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depth, num_heads: as in timm's
            VisionTransformer; heads are embed_dim / num_heads wide. num_classes 0: no classifier.
        global_pool: "token" or "avg".
        drop_rate: dropout before the classifier.
        attn_drop_rate: dropout inside the attention; while training it runs on Triton or unfused.
        pos_drop_rate: dropout on the embedded tokens.
        step_size, lambd: of ISTA.
        fused: run the layers on this library's ops (:func:`crate_kernels.fuse`).
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        step_size: float = 0.1,
        lambd: float = 0.1,
        fused: bool = True,
    ) -> None:
        super().__init__(
            image_size=_pair(img_size),
            patch_size=_pair(patch_size),
            num_classes=num_classes or 1,  # replaced below where there is to be none
            dim=embed_dim,
            depth=depth,
            heads=num_heads,
            dim_head=embed_dim // num_heads,
            channels=in_chans,
            dropout=attn_drop_rate,
            emb_dropout=pos_drop_rate,
            step_size=step_size,
            lambd=lambd,
        )
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.reset_classifier(num_classes, global_pool)
        if fused:
            fuse(self)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, 1 + patches, embed_dim) -> logits, or the pooled, normed features."""
        x = x.mean(dim=1) if self.pool == "mean" else x[:, 0]
        x = self.mlp_head[0](self.to_latent(x))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.mlp_head[1](x)

    def get_classifier(self) -> nn.Module:
        return self.mlp_head[1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, where the number of classes changes, and another pooling."""
        if global_pool is not None:
            if global_pool not in POOLS:
                refuse("TimmCRATE", f"global_pool to be one of {list(POOLS)}", repr(global_pool))
            self.pool = POOLS[global_pool]
            self.global_pool = global_pool
        self.num_classes = num_classes
        old = self.mlp_head[1]
        if num_classes == 0:
            self.mlp_head[1] = nn.Identity()
        elif getattr(old, "out_features", None) != num_classes:
            like = self.mlp_head[0].weight
            self.mlp_head[1] = nn.Linear(
                self.embed_dim, num_classes, device=like.device, dtype=like.dtype
            )

    def no_weight_decay(self) -> set[str]:
        return {"pos_embedding", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the parameters by depth, for timm's layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embedding|to_patch_embedding",
            "blocks": [(r"^transformer\.layers\.(\d+)", None), (r"^mlp_head\.0", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            refuse("TimmCRATE", "no gradient checkpointing, which is not implemented", "it enabled")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _create(variant: str, pretrained: bool, size: dict[str, int], kwargs: dict[str, Any]) -> Any:
    asked = {k: kwargs.get(k) for k in ("pretrained_cfg", "pretrained_cfg_overlay")}
    cfg = resolve_pretrained_cfg(variant, **asked)
    if pretrained and not cfg.has_weights and cfg.state_dict is None:
        refuse(
            variant,
            "pretrained=False, or weights of your own as pretrained_cfg_overlay={'file': ...}",
            "pretrained=True; there are no weights to download",
        )
    return build_model_with_cfg(
        TimmCRATE, variant, pretrained, pretrained_filter_fn=_plain_keys, **{**size, **kwargs}
    )


def _plain_keys(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Without what DataParallel, DistributedDataParallel and torch.compile put into a key."""
    return {re.sub(r"(^|\.)(module|_orig_mod)\.", r"\1", key): t for key, t in state.items()}


@register_model
def crate_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> TimmCRATE:
    """CRATE-T: width 384, depth 12, 6 heads of 64."""
    size = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("crate_tiny_patch16_224", pretrained, size, kwargs)


@register_model
def crate_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> TimmCRATE:
    """CRATE-S: width 576, depth 12, 12 heads of 48."""
    size = {"embed_dim": 576, "depth": 12, "num_heads": 12}
    return _create("crate_small_patch16_224", pretrained, size, kwargs)


@register_model
def crate_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> TimmCRATE:
    """CRATE-B: width 768, depth 12, 12 heads of 64."""
    size = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("crate_base_patch16_224", pretrained, size, kwargs)


@register_model
def crate_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> TimmCRATE:
    """CRATE-L: width 1024, depth 24, 16 heads of 64."""
    size = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create("crate_large_patch16_224", pretrained, size, kwargs)
