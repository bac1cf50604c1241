"""Ranks, their correlations, areas, and intervals by resampling: the few statistics the methods share.

>>> spearman(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 9.0]))
1.0
"""

from __future__ import annotations

import numpy as np
from scipy.stats import kendalltau, rankdata

DRAWS = 1000


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last dimension, ties given the mean of theirs.

    >>> ranks(np.array([3.0, 1.0, 3.0]))
    array([2.5, 1. , 2.5])
    """
    return rankdata(x, axis=-1)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of the ranks, over what both have; NaN where that is one value, or all are alike."""
    a, b = _both(a, b)
    if len(a) < 2:
        return float("nan")
    a, b = (r - r.mean() for r in (ranks(a), ranks(b)))
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else float("nan")


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Tau-b: concordant minus discordant pairs, over the geometric mean of those that are not tied."""
    return float(kendalltau(*_both(a, b)).statistic)


def _both(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = ~(np.isnan(a) | np.isnan(b))
    return a[known], b[known]


def area(y: np.ndarray, x: np.ndarray) -> float:
    """Under the line through the points, by trapezoids.

    >>> area(np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 3.0]))
    2.5
    """
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())


def interval(values: np.ndarray, seed: int = 0, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The percentile bootstrap of the mean of `values` [example, ...] over its examples (Efron 1979): low and high.

    NaN values are left out; NaN where fewer than two are left. All columns see the same draws of examples, so that
    differences of columns are paired.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    rows = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    counts = np.stack([np.bincount(row, minlength=len(values)) for row in rows]).astype(float)
    here = ~np.isnan(values)
    flat, known = np.where(here, values, 0.0).reshape(len(values), -1), here.reshape(len(values), -1).astype(float)
    total, n = counts @ flat, counts @ known
    means = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    means[:, known.sum(0) < 2] = np.nan
    ends = [_quantile(means, q) for q in ((1 - level) / 2, (1 + level) / 2)]
    return ends[0].reshape(values.shape[1:]), ends[1].reshape(values.shape[1:])


def _quantile(means: np.ndarray, q: float) -> np.ndarray:
    made = np.full(means.shape[1], np.nan)
    for column in range(means.shape[1]):
        known = means[:, column][~np.isnan(means[:, column])]
        if len(known):
            made[column] = np.quantile(known, q)
    return made
