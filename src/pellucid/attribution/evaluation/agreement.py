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
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr

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
