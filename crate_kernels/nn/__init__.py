"""Modules: layers.py (plain and on our ops), recognition.py and fusion.py (swap them in)."""

from .fusion import Layer, Report, fuse, unfuse
from .layers import ISTA, MSSA, Attention, FeedForward

__all__ = ["ISTA", "MSSA", "Attention", "FeedForward", "Layer", "Report", "fuse", "unfuse"]
