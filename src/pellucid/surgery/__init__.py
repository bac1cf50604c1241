"""Layers as parts: taken out, repeated, swapped; what each of them does, and for what. Facts, rewritten where they sit."""

from pellucid.surgery.arranging import Arranged, parallel, remove, reorder, repeat, swap
from pellucid.surgery.covariance import KeyCovariance
from pellucid.surgery.draft import draft_and_verify
from pellucid.surgery.early import generate_early
from pellucid.surgery.editing import Edited, edit
from pellucid.surgery.exit_calibration import calibrate, chosen_policy
from pellucid.surgery.exit_head import ExitHead
from pellucid.surgery.exit_policy import Exit
from pellucid.surgery.exits import exits
from pellucid.surgery.gate import Gate
from pellucid.surgery.importance import layer_importance
from pellucid.surgery.keys import Fact
from pellucid.surgery.remix import Recipe, remix, take
from pellucid.surgery.removal import removal
from pellucid.surgery.scoreboard import editing_by_layer, scoreboard, traced_again
from pellucid.surgery.similarity import similarity
from pellucid.surgery.splice import splice
from pellucid.surgery.stitch import Stitch
from pellucid.surgery.stitching import stitching
from pellucid.surgery.values import Search
from pellucid.surgery.variants import chosen_variants, ensemble

__all__ = [
    "Arranged",
    "Edited",
    "Exit",
    "ExitHead",
    "Fact",
    "Gate",
    "KeyCovariance",
    "Recipe",
    "Search",
    "Stitch",
    "calibrate",
    "chosen_policy",
    "chosen_variants",
    "draft_and_verify",
    "edit",
    "editing_by_layer",
    "ensemble",
    "exits",
    "generate_early",
    "layer_importance",
    "parallel",
    "remix",
    "removal",
    "remove",
    "reorder",
    "repeat",
    "scoreboard",
    "similarity",
    "splice",
    "stitching",
    "swap",
    "take",
    "traced_again",
]
