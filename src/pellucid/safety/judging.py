"""How well does a score tell apart what was held out, and how well does what knows nothing?

Areas under the ROC curve are taken within strata (folds, topics) and averaged by how many comparisons each has: scores of readers
that were fitted apart are not compared, and a topic's share of positives is no merit. Intervals draw whole groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from pellucid.probing.roc import areas
from pellucid.safety.statements import form_of
from pellucid.statistics import interval

Numbers = NDArray[np.float64]
BINS = 10


def within(scores: Numbers, labels: np.ndarray, strata: np.ndarray, weights: Numbers | None = None) -> Numbers:
    """[draw] the mean area within strata, each counted by its comparisons; NaN where no stratum has both kinds.

    >>> within(np.array([1.0, 2.0, 9.0, 8.0]), np.array([False, True, False, True]), np.array([0, 0, 1, 1]))
    array([0.5])
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    top, bottom = np.zeros(len(weights)), np.zeros(len(weights))
    for s in np.unique(strata):
        here = strata == s
        y, w = labels[here], weights[:, here]
        pairs = (w * y).sum(1) * (w * ~y).sum(1)
        if pairs.any():
            top += pairs * np.nan_to_num(areas(scores[here], y, w))
            bottom += pairs
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), np.nan)


def in_pairs(scores: Numbers, couples: np.ndarray) -> float:
    """The share of pairs whose true member has the higher score, equal ones by half; NaN without pairs."""
    true, false = scores[couples[0]], scores[couples[1]]
    both = ~(np.isnan(true) | np.isnan(false))
    return float(((true > false) + (true == false) / 2)[both].mean()) if both.any() else float("nan")


def calibration_error(log_odds: Numbers, labels: np.ndarray) -> float:
    """Expected calibration error: |share true - mean probability| over ten bins of equal width, by how many lie in each."""
    p = expit(log_odds)
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = [abs((labels[bins == b] - p[bins == b]).sum()) for b in range(BINS)]
    return float(np.sum(gaps) / len(p))


def judged(
    scores: Numbers, labels: np.ndarray, strata: np.ndarray, couples: np.ndarray, groups: np.ndarray, *, seed: int = 0,
    log_odds: bool = False, either_sign: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Of scores [draw, n]: of one draw its area with an interval; of several the mean, and the 2.5 and 97.5 % points among them.

    `either_sign` takes the better of a score and its negative: what luck alone gives a direction. NaN scores are left out.
    """
    here = np.asarray(~np.isnan(scores).any(0))
    both = np.asarray(here[couples].all(0))
    place = np.cumsum(here) - 1
    kept = place[couples[:, both]] if couples.size else couples
    scores, labels, strata, groups = scores[:, here], labels[here], strata[here], groups[here]
    found = np.array([float(within(s, labels, strata)[0]) for s in scores])
    pair = np.array([in_pairs(s, kept) for s in scores])
    if either_sign:
        found, pair = np.maximum(found, 1 - found), np.maximum(pair, 1 - pair)
    if len(scores) > 1:
        low, high = np.quantile(found, [0.025, 0.975])
    else:
        low, high = interval(lambda w: within(scores[0], labels, strata, w), seed, groups=groups, within=(0.0, 1.0))
    made = {"area": found.mean(), "low": float(low), "high": float(high), "pair_accuracy": pair.mean()}
    right = (scores[0] > 0) == labels
    made |= {"accuracy": right.mean(), "calibration_error": calibration_error(scores[0], labels)} if log_odds else {}
    return {k: float(v) for k, v in made.items()}


def platt(scores: Numbers, labels: np.ndarray) -> tuple[float, float]:
    """Slope and offset that make log odds of scores (Platt 1999); the slope never turns the sign."""
    from sklearn.linear_model import LogisticRegression

    scale = float(scores.std()) or 1.0
    fit = LogisticRegression(C=100.0).fit(scores[:, None] / scale, labels)
    return max(float(fit.coef_[0, 0]), 1e-3) / scale, float(fit.intercept_[0])


def text_scores(train: Sequence[str], labels: np.ndarray, ask: Sequence[str]) -> Numbers:
    """[n] log odds by a reader of the text alone: logistic regression on groups of one to four characters."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return _log_odds(TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True), 10.0, train, labels, ask)


def form_scores(train: Sequence[str], labels: np.ndarray, ask: Sequence[str]) -> Numbers:
    """[n] log odds by what a prompt looks like, whatever it says: how long, how many words, capitals, digits, marks."""
    return scaled_scores([form_of(t) for t in train], labels, [form_of(t) for t in ask])


def scaled_scores(train: Any, labels: np.ndarray, ask: Any) -> Numbers:
    """[n] log odds by logistic regression on columns [n, column], each with mean 0 and variance 1."""
    from sklearn.preprocessing import StandardScaler

    return _log_odds(StandardScaler(), 1.0, train, labels, ask)


def _log_odds(first: Any, weakness: float, train: Any, labels: np.ndarray, ask: Any) -> Numbers:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    fit = make_pipeline(first, LogisticRegression(C=weakness, max_iter=1000)).fit(train, labels)
    return np.asarray(fit.decision_function(ask), dtype=float)


def as_well(area: float, rows: dict[str, float]) -> str:
    """Which controls do as well, in words; empty where none does."""
    found = [f"{name} {value:.2f}" for name, value in rows.items() if value >= area]
    return f"No better than {' and '.join(found)}: " if found else ""
