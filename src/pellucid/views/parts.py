"""Parts of a model by the names people use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A head, an MLP ...: its name, its site, and a number that belongs to it."""

    name: str
    site: str
    share: float


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
