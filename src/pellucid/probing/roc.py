"""How well does a score tell two classes apart, whatever threshold one sets?

    true_positive(t)  = share of the positive examples with score >= t      (found)
    false_positive(t) = share of the others with score >= t                 (false alarms)
    area = P(score of a positive > score of another) + P(equal) / 2         (.5 is chance)

The area under the curve is the Mann-Whitney statistic (Hanley and McNeil 1982). Its interval is a bootstrap that draws
whole groups: examples of one text are no independent evidence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from pellucid.errors import InputError
from pellucid.probing.examples import known
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique


@technique
def roc(scores: Any, labels: Any, groups: Any = None, *, name: str = "score", seed: int = 0) -> Result:
    """The curve of `scores` [n] against `labels` [n] (truth values), `groups` [n] what is drawn together.

    Gives over `threshold`, from the highest down, `true_positive` and `false_positive`; and `area` with its 95 % interval
    `low` to `high` (1000 draws by `seed`). InputError where one class is empty, or a score or label is missing.

    >>> found = roc([0.1, 0.4, 0.35, 0.8], [False, False, True, True])
    >>> float(found.area), found.true_positive.values.tolist()
    (0.75, [0.0, 0.5, 0.5, 1.0, 1.0])
    """
    s, y = checked(scores, labels)
    at = np.unique(s)[::-1]
    found, alarms = (np.array([(s[y == c] >= t).mean() for t in at]) for c in (True, False))
    low, high = area_interval(s, y, groups, seed)
    start = [0.0]
    data = xr.Dataset(
        {
            "true_positive": ("threshold", np.concatenate([start, found])),
            "false_positive": ("threshold", np.concatenate([start, alarms])),
            "area": area(s, y), "low": low, "high": high,
        },
        coords={"threshold": np.concatenate([[np.inf], at])},
    )  # fmt: skip
    data = data.assign_attrs(positive=int(y.sum()), other=int((~y).sum()))
    return Result(data, kind="roc", title=f"How well {name} tells apart")


def checked(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores as floats and labels as truth values; InputError where they do not fit."""
    s, y = np.asarray(scores, dtype=float), known(labels)
    if s.ndim != 1 or y.shape != s.shape:
        raise InputError(f"scores of shape {list(s.shape)} with labels of shape {list(y.shape)}: expected [n] of both")
    if not np.isfinite(s).all():
        raise InputError(f"{int((~np.isfinite(s)).sum())} scores are missing or infinite: leave those examples out")
    y = y.astype(bool)
    if y.all() or not y.any():
        raise InputError("all labels are alike: a curve needs positive and other examples")
    return s, y


def area(scores: np.ndarray, labels: np.ndarray) -> float:
    """The area under the curve."""
    return float(areas(scores, labels, np.ones((1, len(scores))))[0])


def area_interval(
    scores: np.ndarray, labels: np.ndarray, groups: Any = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end of the area; samples of whole groups that have one class only say nothing."""
    groups = np.arange(len(scores)) if groups is None else groups
    return interval(lambda w: areas(scores, labels, w), seed, groups=groups, within=(0.0, 1.0))


def areas(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[draw] the area where example i counts `weights` [draw, i] times."""
    order = np.argsort(scores, kind="stable")
    firsts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    positive, other = (np.add.reduceat(weights[:, order] * (labels[order] == c), firsts, axis=1) for c in (True, False))
    below = np.cumsum(other, axis=1) - other / 2
    pairs = positive.sum(1) * other.sum(1)
    with np.errstate(invalid="ignore"):
        return np.where(pairs > 0, (positive * below).sum(1) / np.where(pairs > 0, pairs, 1), np.nan)
