"""Layers as parts: taken out, repeated, swapped; what each of them does, and for what."""

from pellucid.surgery.arranging import Arranged, parallel, remove, reorder, repeat, swap
from pellucid.surgery.importance import layer_importance
from pellucid.surgery.remix import Recipe, remix, take
from pellucid.surgery.splice import splice
from pellucid.surgery.stitch import Stitch, stitching

__all__ = [
    "Arranged",
    "Recipe",
    "Stitch",
    "layer_importance",
    "parallel",
    "remix",
    "remove",
    "reorder",
    "repeat",
    "splice",
    "stitching",
    "swap",
    "take",
]
