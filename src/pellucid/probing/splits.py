"""Which examples are held out, and how sure is a held-out score?

Examples come in groups that must not be torn apart: the words of a text share its context, the occurrences of a word
share its embedding. Folds, test sets and bootstrap draws therefore take whole groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from pellucid.errors import InputError, one_of
from pellucid.probing.examples import Examples
from pellucid.statistics import interval

By = Literal["text", "type"]


def groups_of(examples: Examples, by: By) -> np.ndarray:
    """[n] the group of each example: the text it lies in, or its type (word types then do not leak)."""
    one_of(by, By, "cannot split by ")
    return np.unique(examples.texts if by == "text" else examples.types, return_inverse=True)[1]


def folds(groups: Any, k: int, seed: int = 0) -> np.ndarray:
    """[n] the fold, 0 to k - 1, of each example: whole groups, drawn by `seed`, about as many examples in each.

    >>> fold = folds([0, 0, 1, 1, 2, 2], 3)
    >>> sorted(fold.tolist()), bool((fold[::2] == fold[1::2]).all())
    ([0, 0, 1, 1, 2, 2], True)
    """
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < k or k < 2:
        raise InputError(f"{len(names)} groups cannot make {k} folds: expected at least 2 folds, and a group for each")
    order = np.random.default_rng(seed).permutation(len(names))
    sizes = np.bincount(group)
    held, chosen = np.zeros(k), np.zeros(len(names), dtype=int)
    for each in order[np.argsort(-sizes[order], kind="stable")]:  # the largest first, each to the emptiest fold
        chosen[each] = int(held.argmin())
        held[chosen[each]] += sizes[each]
    return chosen[group]


def held_out(groups: Any, share: float, seed: int) -> np.ndarray:
    """[n] True on about `share` of the examples, whole groups."""
    if not 0 < share <= 0.5:
        raise InputError(f"a test share of {share} was asked for: expected more than 0 and at most 0.5")
    return folds(groups, round(1 / share), seed) == 0


@dataclass(eq=False)
class Scores:
    """A number for each example that was held out, `values` [seed, layer, n], NaN for one that was not; and the group
    each example belongs to."""

    values: np.ndarray
    groups: np.ndarray

    def mean(self) -> np.ndarray:
        """[layer] over the examples of each split, then over splits."""
        return np.nanmean(np.nanmean(self.values, 2), 0)

    @cached_property
    def tested(self) -> np.ndarray:
        """The groups that were held out in some split: what an interval draws from."""
        return np.unique(self.groups[~np.isnan(self.values).all((0, 1))])

    def at(self, weights: np.ndarray) -> np.ndarray:
        """[draw, layer] the mean where every tested group counts `weights` [draw, group] times."""
        group, made = np.searchsorted(self.tested, self.groups), []
        for split in self.values:
            here = ~np.isnan(split[0])
            sums = [np.bincount(group[here], x, len(self.tested)) for x in (np.ones(here.sum()), *split[:, here])]
            total = weights @ np.stack(sums, 1)  # [draw, 1 + layer]
            made.append(total[:, 1:] / total[:, :1])
        return np.mean(made, 0)

    def interval(self, seed: int = 0, within: tuple[float, float] = (-1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
        """Low and high end [layer] of `mean`, which draws whole groups."""
        return interval(self.at, seed, n=len(self.tested), within=within)
