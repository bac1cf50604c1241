"""Layers as parts: taken out, repeated, swapped; what each of them does, and for what."""

from pellucid.surgery.arranging import Arranged, parallel, remove, reorder, repeat, swap
from pellucid.surgery.importance import layer_importance
from pellucid.surgery.splice import splice

__all__ = ["Arranged", "layer_importance", "parallel", "remove", "reorder", "repeat", "splice", "swap"]
