"""Layers as parts: taken out, repeated, swapped; what each of them does, and for what."""

from pellucid.surgery.arranging import Arranged, remove, reorder, repeat, swap

__all__ = ["Arranged", "remove", "reorder", "repeat", "swap"]
