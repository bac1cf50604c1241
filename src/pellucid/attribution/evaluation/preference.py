"""Which method should be preferred, and is that more than chance?

Methods are compared on the same prompts, so that the interval is that of the difference of two methods on each prompt
(paired bootstrap). The best one is compared with every other; as there are several, each difference is given at the level
1 - 0.05 / comparisons (Bonferroni). Where no difference to the next one is clear, the sentence says so and names the
cheapest of those that cannot be told apart. A method that is above random scores for a tenth of the cost is named too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pellucid.attribution.evaluation.scores import RANDOM
from pellucid.statistics import interval

FEWEST = 5  # prompts, below which nothing is said


@dataclass(frozen=True)
class Preference:
    """The method to prefer ("" for none), why in one sentence, and the difference of the best to each method with its
    interval, [method] each."""

    method: str
    sentence: str
    best: str
    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray


def prefer(
    names: Sequence[str], values: np.ndarray, cost: Sequence[float], what: str = "faithfulness", seed: int = 0
) -> Preference:
    """From `values` [example, method], more is better, `random` among the methods; `cost` [method] in forward passes."""
    names, n = list(names), len(values)
    means = values.mean(0)
    own = [i for i, name in enumerate(names) if name != RANDOM]
    best = max(own, key=lambda i: means[i])
    differences = values[:, [best]] - values
    low, high = interval(differences, seed, level=1 - 0.05 / max(1, len(names) - 1))

    def above(i: int) -> str:
        return f"{differences[:, i].mean():.3g} [{low[i]:.3g}, {high[i]:.3g}]"

    def said(method: str, sentence: str) -> Preference:
        return Preference(method, sentence, names[best], differences.mean(0), low, high)

    def frugal(dear: int) -> str:
        cheap = [i for i in own if cost[i] <= cost[dear] / 10 and over[i] > 0]
        if not cheap:
            return ""
        i = max(cheap, key=lambda i: means[i])
        return f" {names[i]} reaches {means[i]:.3g} for {cost[i]:.0f}."

    chance = names.index(RANDOM)
    over, _ = interval(values - values[:, [chance]], seed, level=1 - 0.05 / max(1, len(names) - 1))
    tied = [i for i in own if i == best or not low[i] > 0]
    if n < FEWEST:
        return said("", f"{n} prompts are too few to prefer a method: give {FEWEST} or more.")
    if not low[chance] > 0:
        which = f"the best by {what}, {names[best]}, cannot be told from random scores ({above(chance)})"
        return said("", f"Trust none of them here: on {n} prompts {which}.")
    if len(tied) == 1:
        others = sorted((i for i in own if i != best), key=lambda i: -means[i])
        second = f"{above(others[0])} above the next, {names[others[0]]}, and " if others else ""
        why = f"its {what} is {means[best]:.3g}, {second}{above(chance)} above random scores, on {n} prompts"
        price = f"it costs {cost[best]:.0f} forward passes a prompt"
        return said(names[best], f"Prefer {names[best]} on this model: {why}; {price}.{frugal(best)}")
    cheapest = min(tied, key=lambda i: cost[i])
    listed = ", ".join(names[i] for i in sorted(tied, key=lambda i: -means[i]))
    take = f"take the cheapest, {names[cheapest]} ({cost[cheapest]:.0f} forward passes a prompt)"
    chances = f"the first is {above(chance)} above random scores"
    which = f"No difference in {what} between {listed} on {n} prompts: {take}; {chances}."
    return said(names[cheapest], f"{which}{frugal(cheapest)}")
