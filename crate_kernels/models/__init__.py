"""Models in published, unfused form: crate.py, mae.py; checkpoint.py loads what people have."""

from .checkpoint import load_checkpoint
from .crate import CRATE, PreNorm, Transformer, crate_base, crate_large, crate_small, crate_tiny
from .mae import MAEEncoderBlock

__all__ = [
    "CRATE",
    "MAEEncoderBlock",
    "PreNorm",
    "Transformer",
    "crate_base",
    "crate_large",
    "crate_small",
    "crate_tiny",
    "load_checkpoint",
]
