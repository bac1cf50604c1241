"""What a report has found so far, part by part: what later sections compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pellucid.results import Result
from pellucid.statistics import spearman
from pellucid.views.naming import Part


@dataclass(frozen=True)
class Fall:
    """The strongest part: the answer's probability with and without it, and the change of the metric in both ways."""

    name: str
    before: float
    after: float
    zero: float
    mean: float


@dataclass(frozen=True)
class Foreign:
    """Over the places that bring half of the answer back or more: what they bring back, and what states of unrelated
    prompts put in the same places do, on average."""

    places: int
    own: float
    other: float
    prompts: int


@dataclass
class Evidence:
    """Filled in by the sections in their order; what a model cannot have stays empty."""

    words: dict[str, Result] = field(default_factory=dict)  # by method: a number per token
    completeness: float | None = None  # of integrated gradients: the gap as a share of the shares' size
    settled: str = ""  # the layer after which the answer stays the top guess
    leads: dict[str, list[bool]] = field(
        default_factory=dict
    )  # by control prompt: whether it leads there, from that layer on
    written: list[Part] = field(default_factory=list)  # heads and MLPs by what they write directly
    zero: list[Part] = field(default_factory=list)  # heads by what their absence changes
    mean: dict[str, float] = field(default_factory=dict)  # the same with heads at their mean, by site
    restored: float | None = None  # the largest share of the answer that one patched state brings back
    foreign: Foreign | None = None  # the same places patched from prompts that have nothing to do with it
    arrives: int | None = None  # the layer before which patching brings the answer back where it is read
    fell: Fall | None = None
    verdicts: dict[str, str] = field(default_factory=dict)  # by section: how far its finding can be trusted

    def heads(self) -> Mapping[str, Mapping[str, float]]:
        """Heads by method and site: their direct share, and the fall of the answer when they are off."""
        return {
            "writes directly": {p.site: p.share for p in self.written if ".heads." in p.site},
            "needed (zero)": {p.site: -p.share for p in self.zero},
            "needed (mean)": {site: -v for site, v in self.mean.items()},
        }


def agreement(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Rank correlation over the parts that both know."""
    both = [site for site in a if site in b]
    return spearman(np.array([a[s] for s in both]), np.array([b[s] for s in both]))


def top(found: Mapping[str, float], n: int) -> list[str]:
    """The sites with the largest values, the largest first."""
    return sorted((s for s in found if np.isfinite(found[s])), key=lambda s: -found[s])[:n]
