"""Thresholds keep what they promise, and refuse what so few conversations cannot promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta

from pellucid.errors import InputError
from pellucid.safety import Rule, ema, k_of, needed, threshold
from pellucid.safety.thresholds import rate

SETS = 4_000


def thresholds(n: int, alarms: float, promise: str) -> np.ndarray:
    """The true rates of false alarms over simulated calibration sets: scores are uniform, so a rate is 1 - tau."""
    draws = np.sort(np.random.default_rng(n).uniform(size=(SETS, n)), 1)
    above = threshold(draws[0], alarms, promise=promise).above  # type: ignore[arg-type]
    for row in draws[:20]:
        assert threshold(row, alarms, promise=promise).value == row[n - 1 - above]  # type: ignore[arg-type]
    return 1 - draws[:, n - 1 - above]


@pytest.mark.parametrize(("n", "alarms"), [(100, 0.01), (100, 0.05), (300, 0.01), (1000, 0.01)])
def test_conformal_keeps_its_rate_on_average(n: int, alarms: float) -> None:
    rates = thresholds(n, alarms, "average")
    assert rates.mean() <= alarms + 5e-4
    assert rates.mean() >= alarms - 1.2 / n  # and wastes no more than one conversation


@pytest.mark.parametrize(("n", "alarms"), [(100, 0.05), (300, 0.01), (1000, 0.01)])
def test_with_confidence_few_sets_exceed_the_rate(n: int, alarms: float) -> None:
    assert (thresholds(n, alarms, "confidence") > alarms).mean() <= 0.06


def test_a_quantile_would_not() -> None:
    draws = np.random.default_rng(1).uniform(size=(SETS, 100))
    assert (1 - np.quantile(draws, 0.99, axis=1)).mean() >= 0.017


@pytest.mark.parametrize(("promise", "n"), [("average", 99), ("confidence", 299)])
def test_a_rate_that_so_few_cannot_support_is_refused_and_the_number_named(promise: str, n: int) -> None:
    assert needed(0.01, promise) == n  # type: ignore[arg-type]
    threshold(np.arange(n), 0.01, promise=promise)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"{n - 1} benign conversations .* takes {n} at least"):
        threshold(np.arange(n - 1), 0.01, promise=promise)  # type: ignore[arg-type]


def test_groups_count_once_by_their_largest_score() -> None:
    scores, groups = np.arange(200.0), np.repeat(np.arange(20), 10)
    assert threshold(scores, 0.05, groups=groups).value == 199.0 and threshold(scores, 0.05, groups=groups).n == 20
    with pytest.raises(InputError, match="10 benign groups"):
        threshold(scores, 0.05, groups=np.repeat(np.arange(10), 20))


def test_the_order_statistic_is_the_one_that_beta_says() -> None:
    for n in (59, 93, 300):
        found = threshold(np.arange(n), 0.05, promise="confidence")
        wanted = max(k for k in range(n) if beta.ppf(0.95, k + 1, n - k) <= 0.05)
        assert (found.above, found.value) == (wanted, n - 1 - wanted)


def test_wrong_shares_and_missing_scores_are_refused() -> None:
    for wrong in ({"alarms": 0.0}, {"alarms": 1.5}, {"promise": "always"}):
        with pytest.raises(InputError):
            threshold(np.arange(100), **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="missing"):
        threshold([1.0, np.nan] * 30)


def test_a_share_has_its_exact_interval() -> None:
    share, low, high, n = rate(np.arange(10) < 3)
    assert (share, n) == (0.3, 10)
    assert np.allclose([low, high], [beta.ppf(0.025, 3, 8), beta.ppf(0.975, 4, 7)])
    assert rate(np.zeros(5, dtype=bool))[1] == 0.0 and rate(np.ones(5, dtype=bool))[2] == 1.0


# ---- rules


def slow(rule: Rule, s: list[float]) -> float:
    if rule.kind in ("max", "mean", "first"):
        return {"max": max, "mean": lambda x: sum(x) / len(x), "first": lambda x: x[0]}[rule.kind](s)
    if rule.kind == "ema":
        e = s[0]
        for each in s[1:]:
            e = rule.weight * each + (1 - rule.weight) * e
        return e
    last = sorted(s[-rule.last :])
    return last[-rule.k] if len(last) >= rule.k else -np.inf


@pytest.mark.parametrize("rule", [Rule("max"), Rule("mean"), Rule("first"), ema(0.3), k_of(2, 3), k_of(1, 4)], ids=str)
def test_a_rule_is_what_it_says_of_the_scores_so_far(rule: Rule) -> None:
    rng = np.random.default_rng(0)
    scores, on = rng.normal(size=(4, 12)), rng.random((4, 12)) < 0.7
    whole, state = rule.follow({}, scores, on), {}
    parts = np.concatenate([rule.follow(state, scores[:, a:b], on[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 12))], 1)
    assert np.array_equal(whole, parts, equal_nan=True)
    for row in range(4):
        for t in range(12):
            so_far = scores[row, : t + 1][on[row, : t + 1]].tolist()
            wanted = slow(rule, so_far) if so_far else np.nan
            assert np.allclose(whole[row, t], wanted, equal_nan=True)


def test_rules_that_make_no_sense_are_refused() -> None:
    for wrong in (
        lambda: Rule.of("median"),
        lambda: Rule.of("ema"),
        lambda: ema(0.0),
        lambda: k_of(3, 2),
        lambda: k_of(0, 2),
    ):
        with pytest.raises(InputError):
            wrong()
