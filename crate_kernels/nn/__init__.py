"""Modules: layers.py, encoder.py, patch_embedding.py; recognition.py and fusion.py swap them in."""

from .encoder import Encoder
from .fusion import Layer, Report, fuse, unfuse
from .inference import prepare_for_inference
from .layers import (
    ISTA,
    MSSA,
    Attention,
    FeedForward,
    OvercompleteFeedForward,
    OvercompleteISTA,
)
from .patch_embedding import PatchEmbedding

__all__ = [
    "ISTA",
    "MSSA",
    "Attention",
    "Encoder",
    "FeedForward",
    "Layer",
    "OvercompleteFeedForward",
    "OvercompleteISTA",
    "PatchEmbedding",
    "Report",
    "fuse",
    "prepare_for_inference",
    "unfuse",
]
