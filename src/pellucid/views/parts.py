"""Parts of a model, each with a number."""

from __future__ import annotations

from dataclasses import dataclass

from pellucid.views.naming import named as named


@dataclass(frozen=True)
class Part:
    """A head, an MLP ...: its name, its site, and a number that belongs to it."""

    name: str
    site: str
    share: float
