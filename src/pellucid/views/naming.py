"""Parts of a model by the names people use, and by the sites views know them by."""

from __future__ import annotations

import re
from dataclasses import dataclass


def named(layer: int, part: str, unit: int = -1, stack: str = "") -> str:
    """
    >>> named(9, "attn.heads", 6), named(4, "mlp.out"), named(1, "cross.heads", 0, "decoder")
    ('head 9.6', 'MLP 4', 'decoder cross head 1.0')
    """
    area = part.partition(".")[0]
    kind = {"attn": "attention", "mlp": "MLP", "cross": "cross-attention"}.get(area, area)
    if unit >= 0:
        kind = {"attn": "head", "cross": "cross head"}.get(area, kind)
    where = f"{layer}.{unit}" if unit >= 0 else str(layer)
    return " ".join(filter(None, (stack, kind, where)))


def site_of(name: str) -> str:
    """One name for each part: a head is a head whether it was met as its output or as what its projection reads.

    >>> site_of("layers.3.attn.z_out.2"), site_of("layers.3.attn.heads.2.out"), site_of("layers.*.mlp.out")
    ('layers.3.attn.heads.2', 'layers.3.attn.heads.2', 'layers.*.mlp.out')
    """
    name = re.sub(r"\.(attn|cross)(#\d+)?\.z_out\.(\d+)$", r".\1\2.heads.\3", name)
    return re.sub(r"\.heads\.(\d+|\*)\.out$", r".heads.\1", name)


@dataclass(frozen=True)
class Part:
    """A head, an MLP ...: its name, its site, and a number that belongs to it."""

    name: str
    site: str
    share: float
