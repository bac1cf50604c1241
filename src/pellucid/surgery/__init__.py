"""Layers as parts: taken out, repeated, swapped; what each of them does, and for what."""

from pellucid.surgery.arranging import Arranged, parallel, remove, reorder, repeat, swap
from pellucid.surgery.early import draft_and_verify, generate_early
from pellucid.surgery.exits import Exit, ExitHead, calibrate, chosen_policy, exits
from pellucid.surgery.importance import layer_importance
from pellucid.surgery.remix import Recipe, remix, take
from pellucid.surgery.similarity import similarity
from pellucid.surgery.splice import splice
from pellucid.surgery.stitch import Stitch, stitching

__all__ = [
    "Arranged",
    "Exit",
    "ExitHead",
    "Recipe",
    "Stitch",
    "calibrate",
    "chosen_policy",
    "draft_and_verify",
    "exits",
    "generate_early",
    "layer_importance",
    "parallel",
    "remix",
    "remove",
    "reorder",
    "repeat",
    "similarity",
    "splice",
    "stitching",
    "swap",
    "take",
]
