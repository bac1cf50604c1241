"""The few statistics of the methods are scipy's, over what both sides have."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from pellucid.statistics import kendall, spearman


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
