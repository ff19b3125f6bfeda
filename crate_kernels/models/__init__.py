"""Published models: crate.py, alpha.py, mae.py, dino.py, unfused; gpt.py, bert.py on the ops.

checkpoint.py loads what people have; timm_models.py, not imported here, registers with timm.
"""

from .alpha import (
    CRATEAlpha,
    crate_alpha_base,
    crate_alpha_huge,
    crate_alpha_large,
    crate_alpha_small,
    crate_alpha_tiny,
)
from .bert import CRATEBERT, crate_bert
from .checkpoint import load_checkpoint
from .crate import CRATE, PreNorm, Transformer, crate_base, crate_large, crate_small, crate_tiny
from .dino import (
    DINO,
    DINOBackbone,
    DINOHead,
    DINOLoss,
    MultiCropWrapper,
    crate_dino_base,
    crate_dino_small,
)
from .gpt import CRATEGPT, KVCache, crate_gpt
from .mae import (
    MAEDecoderBlock,
    MAEEncoderBlock,
    MaskedAutoencoder,
    crate_mae_base,
    crate_mae_large,
    crate_mae_small,
    crate_mae_tiny,
)

__all__ = [
    "CRATE",
    "CRATEBERT",
    "CRATEGPT",
    "DINO",
    "CRATEAlpha",
    "DINOBackbone",
    "DINOHead",
    "DINOLoss",
    "KVCache",
    "MAEDecoderBlock",
    "MAEEncoderBlock",
    "MaskedAutoencoder",
    "MultiCropWrapper",
    "PreNorm",
    "Transformer",
    "crate_alpha_base",
    "crate_alpha_huge",
    "crate_alpha_large",
    "crate_alpha_small",
    "crate_alpha_tiny",
    "crate_base",
    "crate_bert",
    "crate_dino_base",
    "crate_dino_small",
    "crate_gpt",
    "crate_large",
    "crate_mae_base",
    "crate_mae_large",
    "crate_mae_small",
    "crate_mae_tiny",
    "crate_small",
    "crate_tiny",
    "load_checkpoint",
]
