"""Agreement measures equal their definitions written out, and scipy's statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pellucid.attribution.evaluation import agreement
from pellucid.attribution.evaluation.agreement import MEASURES, concordance
from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.statistics import interval, kendall, ranks, spearman

SCORES = st.lists(st.integers(-3, 3), min_size=3, max_size=8)


def written_out(a, b, k):
    """Krishna et al. 2022, set by set."""
    first, second = (sorted(range(len(x)), key=lambda i: -abs(x[i]))[:k] for x in (a, b))
    sign = lambda x: (x > 0) - (x < 0)  # noqa: E731
    both = [i for i in first if i in second]
    same_place = [i for i in both if first.index(i) == second.index(i)]
    return {
        "feature agreement": len(both) / k,
        "rank agreement": len(same_place) / k,
        "sign agreement": sum(sign(a[i]) == sign(b[i]) for i in both) / k,
        "signed rank agreement": sum(sign(a[i]) == sign(b[i]) for i in same_place) / k,
    }


@given(SCORES, st.randoms(use_true_random=False), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_top_k_agreement_equals_its_definition(a, random, k):
    b = random.sample(a, len(a))
    expected = written_out(a, b, k)
    for name, value in expected.items():
        assert MEASURES[name](np.array(a, float), np.array(b, float), k) == pytest.approx(value)


@given(SCORES, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_rank_correlations_equal_scipys_with_ties(a, random):
    b = random.sample(a, len(a))
    x, y = np.array(a, float), np.array(b, float)
    np.testing.assert_allclose(ranks(x), stats.rankdata(x))
    if len(set(a)) > 1:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
    else:
        assert np.isnan(spearman(x, y))
        assert np.isnan(kendall(x, y))


def test_concordance_follows_from_friedmans_statistic():
    """chi^2 = m (n - 1) W, ties corrected for alike."""
    rng = np.random.default_rng(0)
    for scores in (rng.standard_normal((4, 7)), rng.integers(0, 3, (5, 6)).astype(float)):
        m, n = scores.shape
        chi = stats.friedmanchisquare(*scores.T).statistic
        assert concordance(scores) == pytest.approx(chi / (m * (n - 1)))
    assert concordance(np.array([[1.0, 2, 3], [3.0, 2, 1]])) == pytest.approx(0)
    assert np.isnan(concordance(np.ones((3, 4))))


def test_matrices_are_symmetric_with_ones_and_hold_the_mean_over_prompts():
    rng = np.random.default_rng(1)
    scores = {name: [rng.standard_normal(6) for _ in range(8)] for name in "abc"}
    found = agreement(scores, k=3, seed=2)
    values = found.agreement.values
    np.testing.assert_allclose(values, np.swapaxes(values, 1, 2))
    np.testing.assert_allclose(np.diagonal(values, axis1=1, axis2=2), 1)
    by_hand = np.mean([spearman(x, y) for x, y in zip(scores["a"], scores["b"], strict=True)])
    assert float(found.agreement.sel(measure="spearman", technique="a", other="b")) == pytest.approx(by_hand)
    assert (found.low.values <= values + 1e-12).all()
    assert (values <= found.high.values + 1e-12).all()
    assert float(found.concordance_low) < float(found.concordance) < float(found.concordance_high)


def test_intervals_are_those_of_a_slow_bootstrap_and_leave_nan_out():
    values = np.random.default_rng(0).standard_normal(40)
    low, high = interval(values, seed=3)
    draws = np.random.default_rng(9).choice(values, (4000, 40)).mean(1)
    np.testing.assert_allclose([low, high], np.quantile(draws, [0.025, 0.975]), atol=0.05)
    with_gap = np.stack([values, np.where(np.arange(40) < 20, values, np.nan)], 1)
    low, high = interval(with_gap, seed=3)
    assert np.isfinite(low).all()
    assert high[1] - low[1] > high[0] - low[0]
    assert np.isnan(interval(values[:1])[0])


def test_a_result_of_one_prompt_has_no_interval_and_comes_back_from_its_file(tmp_path):
    found = agreement({"a": [np.arange(4.0)], "b": [np.arange(4.0)[::-1]]})
    assert np.isnan(found.low.values).all()
    assert Result.load(found.save(tmp_path / "a.zip")) == found


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": [np.ones(3)]}, "two methods"),
        ({"a": [np.ones(3)], "b": [np.ones(4)]}, "different prompts or players"),
    ],
)
def test_what_cannot_be_compared_is_an_error(scores, message):
    with pytest.raises(InputError, match=message):
        agreement(scores)
