"""Ranks, their correlations, areas; and how sure is a number that some examples gave?

Every interval of pellucid is `interval`: a bootstrap of whole groups (prompts, texts), stretched for few of them. Every
test of many cells at once is `sign_flip`.

>>> spearman(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 9.0]))
1.0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import beta, binom, kendalltau, norm, rankdata, t

DRAWS = 1000
FLIPS = 10_000
AT_ONCE = 1 << 24  # numbers held by the flips done at once

Statistic = Callable[[np.ndarray], np.ndarray]  # weights [draw, example] -> [draw, ...]


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


# ---- intervals


def weights(n: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """[draw, n] how often each of `n` examples (or groups) is in a bootstrap sample of as many.

    >>> weights(3, draws=2).sum(1)
    array([3., 3.])
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)


def interval(
    statistic: np.ndarray | Statistic,
    seed: int = 0,
    *,
    over: np.ndarray | None = None,
    groups: Any = None,
    n: int | None = None,
    draws: int = DRAWS,
    level: float = 0.95,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end of what examples say about a statistic: a bootstrap of whole groups, stretched for few of them.

    `statistic` is values [example, ...], whose mean it is, or their sum over that of `over` ([example] or like the values:
    tokens of each text, say), NaN ones left out; or a function of weights [draw, example] that gives [draw, ...], then with
    `groups` or `n`. `groups` [example] says what is drawn together (the prompt, the text); every example alone by default.
    All columns see the same `draws`, so that differences of columns are paired. `within` cuts the ends to what is possible.

    Let q be the percentile interval (Efron 1979) of the statistic s from G groups. Its ends are moved away from s by

        low = s - c (s - q_low),   high = s + c (q_high - s),   c = sqrt(G / (G - 1)) t[G-1] / z

    which gives Student's interval where the draws are normal and keeps their skew (the factors of Hesterberg 2015, "What
    Teachers Should Know about the Bootstrap", 3.5, on the ends instead of the level, which for G < 8 has no room left). How
    often 95 % intervals hold the true mean, measured in tests/test_statistics.py, percentiles in brackets:

        groups                  3            5           10           30
        normal values     .94 (.73)    .95 (.83)    .95 (.92)    .95 (.93)
        ratio of sums     .94 (.77)    .94 (.84)    .94 (.90)    .95 (.93)
        lognormal         .85 (.63)    .84 (.72)    .84 (.79)    .88 (.88)

    Groups that are all alike give an interval without width: three right answers of three prove little, and no resampling
    can say how little. NaN where fewer than two groups have a value, or the statistic itself is undefined; draws in which
    it is undefined are left out.
    """
    given = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if callable(statistic):
        if given is None and n is None:
            raise ValueError("a statistic of weights needs groups= or n=, the number of examples")
        given = np.arange(n or 0) if given is None else given
        count = int(given.max(initial=-1)) + 1
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = np.asarray(statistic(_once_and_drawn(count, draws, seed)[:, given]), dtype=float)
        known, shape = np.full(drawn[0].size, count), drawn.shape[1:]
    else:
        values = np.asarray(statistic, dtype=float)
        here, shape = ~np.isnan(values), values.shape[1:]
        size = np.ones(len(values)) if over is None else np.asarray(over, dtype=float)
        size = np.where(here, size.reshape(size.shape + (1,) * (values.ndim - size.ndim)), 0.0)
        given = np.arange(len(values)) if given is None else given
        count = int(given.max(initial=-1)) + 1
        top, bottom, some = (_sums(x, given, count) for x in (np.where(here, values, 0.0), size, here))
        known = (some > 0).sum(0)
        counts = _once_and_drawn(count, draws, seed)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = (counts @ top) / (counts @ bottom)
    drawn = drawn.reshape(draws + 1, -1)
    drawn[~np.isfinite(drawn)] = np.nan
    drawn[:, (known < 2) | np.isnan(drawn[0])] = np.nan
    ends = np.clip(_stretched(drawn, known, level), *within)
    return ends[0].reshape(shape), ends[1].reshape(shape)


def _once_and_drawn(n: int, draws: int, seed: int) -> np.ndarray:
    """[1 + draw, n]: every group once, which gives the statistic itself, then the samples."""
    return np.concatenate([np.ones((1, n)), weights(n, draws, seed) if n else np.ones((draws, n))])


def _sums(values: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    made = np.zeros((count, int(np.prod(values.shape[1:]))))
    np.add.at(made, group, values.reshape(len(values), made.shape[1]))
    return made


def _stretched(drawn: np.ndarray, known: np.ndarray, level: float) -> np.ndarray:
    """[end, column] of draws [1 + draw, column], the first of them the statistic itself."""
    q = np.array([(1 - level) / 2, (1 + level) / 2])
    ends = np.full((2, drawn.shape[1]), np.nan)
    holes = np.isnan(drawn).any(0)
    ends[:, ~holes] = np.quantile(drawn[1:, ~holes], q, axis=0)
    for column in np.flatnonzero(holes & ~np.isnan(drawn).all(0)):
        ends[:, column] = np.nanquantile(drawn[1:, column], q)
    groups = np.maximum(known, 2)
    c = np.sqrt(groups / (groups - 1)) * t.ppf(q[1], groups - 1) / norm.ppf(q[1])
    return drawn[0] + c * (ends - drawn[0])


# ---- tests


def sign_flip(values: np.ndarray, seed: int = 0, *, groups: Any = None, draws: int = FLIPS) -> np.ndarray:
    """[...] p of "values [example, ...] are as often above 0 as below", two-sided, corrected for the number of cells.

    Signs of whole examples (or `groups` of them) are flipped, the same in all cells, so their dependence is kept. A cell's
    statistic is |sum| / sqrt(sum of squares), the order of Student's t; its p is how often the largest statistic among the
    cells that are no stronger reaches its own (step-down maxT, Westfall and Young 1993). The chance of a single false cell
    among all is then at most p. Exact where all sign patterns are at most `draws`, otherwise that many are drawn by `seed`,
    and the pattern that was observed counts as one. n examples give no p below 2 ** (1 - n): with five nothing is below .06.
    NaN values count as no example; NaN where fewer than two examples have a value; a cell of zeros has p = 1.

    >>> sign_flip(np.array([[1.0], [2.0], [3.0], [1.5]]))
    array([0.125])
    """
    values = np.asarray(values, dtype=float)
    here = ~np.isnan(values)
    group = np.arange(len(values)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    n = int(group.max(initial=-1)) + 1
    sums = _sums(np.where(here, values, 0.0), group, n)
    size = np.sqrt((sums**2).sum(0))
    scaled = sums / np.where(size > 0, size, 1.0)
    observed = np.abs(scaled.sum(0))
    order = np.argsort(observed)  # the weakest first: each cell is held against those up to it
    reached, total = np.zeros(len(order)), 0
    for signs in _signs(n, draws, seed, max(1, AT_ONCE // max(1, len(order)))):
        largest = np.maximum.accumulate(np.abs(signs @ scaled[:, order]), axis=1)
        reached += (largest >= observed[order] - 1e-9).sum(0)
        total += len(signs)
    p = np.empty(len(order))
    p[order] = np.maximum.accumulate((reached / total)[::-1])[::-1]  # a weaker cell is never the surer one
    p[(_sums(here, group, n) > 0).sum(0) < 2] = np.nan
    return p.reshape(values.shape[1:])


def _signs(n: int, draws: int, seed: int, rows: int) -> Any:
    """Blocks [row, n] of +-1: all patterns up to a common sign where they are few, else the observed one and draws."""
    if n <= 1 or 2 ** (n - 1) <= draws:
        patterns = np.arange(2 ** max(0, n - 1))
        for start in range(0, len(patterns), rows):
            yield 1.0 - 2.0 * (patterns[start : start + rows, None] >> np.arange(n) & 1)
        return
    rng = np.random.default_rng(seed)
    yield np.ones((1, n))
    for start in range(0, draws, rows):
        yield 1.0 - 2.0 * rng.integers(0, 2, (min(rows, draws - start), n))


# ---- rates


def binomial_bound(events: Any, n: Any, level: float = 0.95, side: str = "upper") -> np.ndarray:
    """The exact one-sided bound on a rate of which `events` were seen in `n` independent trials (Clopper and Pearson 1934).

    The upper bound is the largest rate at which so few events still come with a chance of 1 - level or more: it is below the
    true rate at most in that share of samples. Arrays broadcast; without trials the bounds are 0 and 1.

    >>> binomial_bound([0, 3], 59).round(3), binomial_bound([3, 4], 10, side="lower").round(3)
    (array([0.05 , 0.126]), array([0.087, 0.15 ]))
    """
    k, n = np.asarray(events, dtype=float), np.asarray(n, dtype=float)
    with np.errstate(invalid="ignore"):
        if side == "upper":
            found = np.where(k >= n, 1.0, beta.ppf(level, k + 1, n - k))
        else:
            found = np.where(k <= 0, 0.0, beta.ppf(1 - level, k, n - k + 1))
    return np.asarray(found)


def binomial_p(events: Any, n: Any, rate: float) -> np.ndarray:
    """p of "the rate is above `rate`": the chance of at most so many events in `n` trials at that rate.

    >>> binomial_p([0, 3], 59, 0.05).round(3)
    array([0.048, 0.659])
    """
    return np.asarray(binom.cdf(np.asarray(events), np.asarray(n), rate))


def fixed_sequence(p: Any, level: float = 0.05) -> int:
    """How many hypotheses are rejected if they are tested in this order, each at the whole `level`, up to the first that is not.

    The order must be chosen without the data of the test; then the chance that any true one is rejected is at most `level`
    (Bauer 1991; in Learn then Test, Angelopoulos et al. 2021, with each p the binomial one of a threshold).

    >>> fixed_sequence([0.001, 0.03, 0.2, 0.01])
    2
    """
    kept = np.asarray(p, dtype=float) <= level
    return int(len(kept) if kept.all() else kept.argmin())
