"""The few statistics of the methods: scipy's where it has them, and intervals and tests that keep what they promise."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import spearmanr
from scipy.stats import t as student

from pellucid.statistics import (
    binomial_bound,
    binomial_p,
    fixed_sequence,
    interval,
    kendall,
    sign_flip,
    spearman,
    weights,
)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_that_of_scipy_over_what_both_have(seed: int) -> None:
    draw = np.random.default_rng(seed)
    a, b = draw.integers(0, 5, 20).astype(float), draw.normal(size=20)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    holes = a.copy()
    holes[:6] = np.nan
    assert spearman(holes, b) == pytest.approx(spearmanr(a[6:], b[6:]).statistic)
    assert kendall(holes, b) == pytest.approx(kendall(a[6:], b[6:]))


def test_constant_or_single_values_have_no_rank_correlation() -> None:
    assert np.isnan(spearman(np.array([]), np.array([]))) and np.isnan(spearman(np.ones(1), np.ones(1)))
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))
    assert np.isnan(kendall(np.ones(4), np.arange(4.0)))


# ---- intervals


def held(draw: Callable[[np.random.Generator, int], np.ndarray], true: float, n: int, times: int = 800) -> float:
    """How often a 95 % interval of a mean (or of the ratio of two columns' sums) holds the true value."""
    rng = np.random.default_rng(n)
    hits = 0
    for i in range(times):
        x = draw(rng, n)
        low, high = interval(x, i) if x.ndim == 1 else interval(x[:, 0], over=x[:, 1], seed=i)
        hits += int(low <= true <= high)
    return hits / times


def ratios(rng: np.random.Generator, n: int) -> np.ndarray:
    size = rng.integers(5, 50, n)
    return np.stack([rng.binomial(size, 0.4), size], 1).astype(float)


@pytest.mark.parametrize("n", [3, 5, 10, 30])
def test_an_interval_holds_the_truth_as_often_as_it_says(n: int) -> None:
    assert held(lambda rng, n: rng.normal(size=n), 0.0, n) > 0.92
    assert held(ratios, 0.4, n) > 0.92
    assert held(lambda rng, n: rng.lognormal(size=n), np.exp(0.5), n) > 0.8  # skew: said in the docstring


def test_a_large_sample_has_students_interval() -> None:
    x = np.random.default_rng(0).normal(size=400)
    wide = student.ppf(0.975, 399) * x.std(ddof=1) / 20
    low, high = interval(x, draws=20_000)
    assert (low, high) == pytest.approx((x.mean() - wide, x.mean() + wide), abs=0.02 * wide)


def test_whole_groups_are_drawn() -> None:
    rng = np.random.default_rng(0)
    text = np.repeat(np.arange(8), 50)
    x = rng.normal(size=8)[text] + 0.1 * rng.normal(size=400)
    low, high = interval(x, groups=text)
    means = np.array([x[text == g].mean() for g in range(8)])
    assert (low, high) == pytest.approx(
        tuple(map(float, interval(means))), abs=1e-9
    )  # groups of one size: their means are the sample
    assert high - low > 5 * np.subtract(*interval(x)[::-1])


def test_a_function_of_weights_is_the_same_statistic() -> None:
    x = np.random.default_rng(0).normal(size=(12, 3))
    made = interval(lambda w: (w @ x) / w.sum(1, keepdims=True), n=12, seed=3)
    np.testing.assert_allclose(made, interval(x, seed=3))
    groups = np.arange(12) // 3
    made = interval(lambda w: (w @ x) / w.sum(1, keepdims=True), groups=groups)
    np.testing.assert_allclose(made, interval(x, groups=groups))


def test_the_ends_are_those_of_the_slow_formula() -> None:
    x, size = np.array([1.0, 4.0, 2.0, 0.0]), np.array([2.0, 5.0, 4.0, 1.0])
    drawn = [(x * w).sum() / (size * w).sum() for w in weights(4, 1000, 7)]
    c = np.sqrt(4 / 3) * student.ppf(0.975, 3) / 1.959963984540054
    s = x.sum() / size.sum()
    low, high = (s + c * (np.quantile(drawn, q) - s) for q in (0.025, 0.975))
    assert interval(x, 7, over=size) == pytest.approx((low, high))
    assert interval(x, 7, over=size, within=(0.0, 1.0)) == pytest.approx((max(low, 0.0), min(high, 1.0)))


def test_missing_values_are_left_out_and_too_few_have_no_interval() -> None:
    x = np.random.default_rng(0).normal(size=(6, 3))
    x[2:, 1] = np.nan
    x[1:, 2] = np.nan
    low, high = interval(x)
    assert np.isfinite(low[:2]).all() and np.isnan([low[2], high[2]]).all()
    assert high[1] - low[1] > high[0] - low[0]  # two values say less than six
    for nothing in (x[:1], x[:0]):
        assert np.isnan(interval(nothing)).all()
    assert np.isnan(interval(x[:, 0], groups=np.zeros(6))).all()  # one text is no sample of texts
    assert np.isnan(interval(np.ones(4), over=np.zeros(4))).all()


# ---- tests of many cells


def slow_sign_flip(values: np.ndarray) -> np.ndarray:
    """Westfall and Young's step-down, pattern by pattern and cell by cell."""

    def strength(x: np.ndarray) -> np.ndarray:
        return np.array([abs(c.sum()) / np.sqrt((c**2).sum()) for c in x.T])

    seen = strength(values)
    flipped = [strength(values * np.array(s)[:, None]) for s in itertools.product([1, -1], repeat=len(values))]
    p, floor = np.zeros(len(seen)), 0.0
    for rank, cell in enumerate(np.argsort(-seen)):
        rest = np.argsort(-seen)[rank:]
        floor = max(floor, float(np.mean([f[rest].max() >= seen[cell] - 1e-9 for f in flipped])))
        p[cell] = floor
    return p


def test_sign_flips_are_those_of_the_slow_version() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 5)) + np.array([2.0, 1.0, 0.0, 0.0, -1.5])
    np.testing.assert_allclose(sign_flip(values), slow_sign_flip(values))
    drawn = sign_flip(values, draws=60)  # fewer than the 64 patterns: drawn
    assert np.abs(drawn - sign_flip(values)).max() < 0.2


def test_one_false_cell_is_found_no_more_often_than_p_says() -> None:
    rng = np.random.default_rng(0)
    nothing = [sign_flip(rng.normal(size=(10, 4, 5)) * np.arange(1, 6)).min() for _ in range(300)]
    assert np.mean(np.array(nothing) <= 0.05) < 0.09  # .05 and two standard errors and a half
    values = rng.normal(size=(12, 20))
    values[:, 7] += 3.0
    assert sign_flip(values)[7] < 0.01 and (np.delete(sign_flip(values), 7) > 0.05).all()


def test_flips_of_few_examples_groups_and_holes() -> None:
    values = np.ones((5, 2))
    np.testing.assert_allclose(sign_flip(values), 1 / 16)
    np.testing.assert_allclose(sign_flip(np.repeat(values, 3, 0), groups=np.repeat(np.arange(5), 3)), 1 / 16)
    values[:, 1] = 0.0
    assert sign_flip(values).tolist() == [1 / 16, 1.0]
    values[1:, 1] = np.nan
    assert np.isnan(sign_flip(values)[1]) and sign_flip(values)[0] == 1 / 16


def test_a_binomial_bound_holds_the_rate_as_often_as_it_says_and_is_scipys() -> None:
    from scipy.stats import binomtest

    for k, n in [(0, 12), (3, 20), (20, 20), (7, 8)]:
        both = binomtest(k, n).proportion_ci(0.9, method="exact")  # two sides of .05 each
        assert float(binomial_bound(k, n)) == pytest.approx(both.high)
        assert float(binomial_bound(k, n, side="lower")) == pytest.approx(both.low)
        assert float(binomial_p(k, n, 0.3)) == pytest.approx(binomtest(k, n, 0.3, alternative="less").pvalue)
    drawn = np.random.default_rng(0).binomial(60, 0.1, 4000)
    assert (binomial_bound(drawn, 60) >= 0.1).mean() >= 0.95
    assert fixed_sequence([0.2, 0.0]) == 0 and fixed_sequence([0.0, 0.0]) == 2 and fixed_sequence([]) == 0
