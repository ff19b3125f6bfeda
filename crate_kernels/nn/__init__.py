"""Modules: layers.py and encoder.py; recognition.py and fusion.py swap them in."""

from .encoder import Encoder
from .fusion import Layer, Report, fuse, unfuse
from .layers import (
    ISTA,
    MSSA,
    Attention,
    FeedForward,
    OvercompleteFeedForward,
    OvercompleteISTA,
)

__all__ = [
    "ISTA",
    "MSSA",
    "Attention",
    "Encoder",
    "FeedForward",
    "Layer",
    "OvercompleteFeedForward",
    "OvercompleteISTA",
    "Report",
    "fuse",
    "unfuse",
]
