"""Modules: layers.py, encoder.py, alpha_encoder.py, decoder.py, patch_embedding.py,
patch_projection.py; recognition.py and fusion.py swap them in."""

from .alpha_encoder import AlphaEncoder
from .decoder import Decoder
from .encoder import Encoder
from .fusion import Layer, Report, fuse, unfuse
from .inference import prepare_for_inference
from .layers import (
    ISTA,
    MSSA,
    AlphaStep,
    Attention,
    FeedForward,
    OvercompleteFeedForward,
    OvercompleteISTA,
)
from .patch_embedding import PatchEmbedding
from .patch_projection import PatchProjection

__all__ = [
    "ISTA",
    "MSSA",
    "AlphaEncoder",
    "AlphaStep",
    "Attention",
    "Decoder",
    "Encoder",
    "FeedForward",
    "Layer",
    "OvercompleteFeedForward",
    "OvercompleteISTA",
    "PatchEmbedding",
    "PatchProjection",
    "Report",
    "fuse",
    "prepare_for_inference",
    "unfuse",
]
