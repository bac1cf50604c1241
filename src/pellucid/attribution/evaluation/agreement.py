"""Do methods agree on which players matter?

For two methods and the k players each holds largest in size (Krishna et al. 2022):

    feature agreement        share of the k that both name
    rank agreement           share of the k that both name in the same place
    sign agreement           share of the k that both name with the same sign
    signed rank agreement    share of the k that both name in the same place with the same sign

over all players, by signed score:

    spearman, kendall        correlation of the ranks (tau-b for ties)

and for m methods at once Kendall's W, the concordance of their ranks: 0 for none, 1 for the same order,

    W = 12 S / (m^2 (n^3 - n) - m T),   S = sum over players of (rank sum - its mean)^2,   T = sum over ties of (t^3 - t)

That methods agree does not make them right: agreement is no faithfulness.

Which method should be preferred, and is that more than chance?

Methods are compared on the same prompts, so that the interval is that of the difference of two methods on each prompt
(paired bootstrap). The best one is compared with every other; as there are several, each difference is given at the level
1 - 0.05 / comparisons (Bonferroni). Where no difference to the next one is clear, the sentence says so and names the
cheapest of those that cannot be told apart. A method that is above random scores for a tenth of the cost is named too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pellucid.attribution.evaluation.scores import RANDOM
from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.statistics import interval, kendall, ranks, spearman
from pellucid.technique import technique


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """The k players largest in size, largest first; of equal ones the first."""
    return np.argsort(-np.abs(scores), kind="stable")[:k]


def feature_agreement(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """
    >>> feature_agreement(np.array([3.0, 2.0, 0.0]), np.array([0.0, 3.0, -2.0]), k=2)
    0.5
    """
    return len(np.intersect1d(_top(a, k), _top(b, k))) / k


def rank_agreement(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """
    >>> rank_agreement(np.array([3.0, 2.0, 0.0]), np.array([2.0, 0.0, 3.0]), k=2)
    0.0
    """
    return float((_top(a, k) == _top(b, k)).mean())


def sign_agreement(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """
    >>> sign_agreement(np.array([3.0, 2.0, 0.0]), np.array([3.0, -2.0, 0.0]), k=2)
    0.5
    """
    both = np.intersect1d(_top(a, k), _top(b, k))
    return float((np.sign(a[both]) == np.sign(b[both])).sum()) / k


def signed_rank_agreement(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """
    >>> signed_rank_agreement(np.array([3.0, 2.0, 0.0]), np.array([3.0, -2.0, 0.0]), k=2)
    0.5
    """
    first, second = _top(a, k), _top(b, k)
    return float(((first == second) & (np.sign(a[first]) == np.sign(b[first]))).mean())


MEASURES: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "feature agreement": feature_agreement,
    "rank agreement": rank_agreement,
    "sign agreement": sign_agreement,
    "signed rank agreement": signed_rank_agreement,
    "spearman": lambda a, b, k: spearman(a, b),
    "kendall": lambda a, b, k: kendall(a, b),
}


def concordance(scores: np.ndarray) -> float:
    """Kendall's W of scores [method, player], ties corrected for; NaN for fewer than two players or all ties.

    >>> concordance(np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]))
    1.0
    """
    m, n = scores.shape
    sums = ranks(scores).sum(0)
    ties = sum(float((c**3 - c).sum()) for row in scores for c in [np.unique(row, return_counts=True)[1].astype(float)])
    room = m**2 * (n**3 - n) - m * ties
    return float(12 * ((sums - sums.mean()) ** 2).sum() / room) if room > 0 else float("nan")


@technique
def agreement(scores: Mapping[str, Sequence[np.ndarray]], *, k: int = 5, seed: int = 0) -> Result:
    """How far methods agree over prompts: `scores` holds for every method one array [player] per prompt.

    Of a prompt with fewer than k players all are compared. Gives `agreement` [measure, technique, other], its mean over
    prompts with the 95 % bootstrap interval `low` to `high`; and `concordance`, the mean over prompts of Kendall's W,
    with `concordance_low` and `concordance_high`. InputError unless all methods have scores of the same prompts.

    >>> agreement({"a": [np.array([1.0, 2.0, 3.0])], "b": [np.array([1.0, 2.0, 4.0])]}).concordance.item()
    1.0
    """
    names = list(scores)
    sizes = {name: [len(each) for each in rows] for name, rows in scores.items()}
    if len(names) < 2 or not sizes[names[0]]:
        raise InputError("agreement needs two methods and a prompt at least")
    if any(size != sizes[names[0]] for size in sizes.values()):
        raise InputError(f"the methods have scores of different prompts or players: {sizes}")
    if k < 1:
        raise InputError(f"k={k}: expected at least 1")
    prompts = list(zip(*scores.values(), strict=True))
    values = np.array([_matrices(rows, k) for rows in prompts])
    w = np.array([concordance(np.stack(rows)) for rows in prompts])
    (low, high), (w_low, w_high) = interval(values, seed), interval(w, seed)
    dims = ("measure", "technique", "other")
    data = xr.Dataset(
        {
            "agreement": (dims, mean_over_prompts(values)),
            "low": (dims, low),
            "high": (dims, high),
            "concordance": float(mean_over_prompts(w)),
            "concordance_low": float(w_low),
            "concordance_high": float(w_high),
        },
        coords={"measure": list(MEASURES), "technique": names, "other": names},
        attrs={"k": k, "prompts": len(prompts)},
    )
    title = f"Agreement of {len(names)} methods on {len(prompts)} prompts"
    return Result(data, kind="agreement", title=title)


def mean_over_prompts(values: np.ndarray) -> np.ndarray:
    """Over the first dimension, NaN left out; NaN where nothing is left."""
    here = ~np.isnan(values)
    n = here.sum(0)
    return np.where(n > 0, np.where(here, values, 0.0).sum(0) / np.maximum(n, 1), np.nan)


def _matrices(rows: Sequence[np.ndarray], k: int) -> np.ndarray:
    """[measure, technique, other] on one prompt."""
    k = min(k, len(rows[0]))
    return np.array([[[measure(a, b, k) for b in rows] for a in rows] for measure in MEASURES.values()])


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
