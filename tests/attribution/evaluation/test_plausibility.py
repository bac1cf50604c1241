"""Plausibility equals scikit-learn's curves and ERASER's definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, f1_score, precision_recall_curve

from pellucid.attribution.evaluation import plausibility
from pellucid.attribution.evaluation.data import iou_f1
from pellucid.errors import InputError

CASES = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-3, 3), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n).filter(any),
    )
)


@given(CASES)
@settings(max_examples=80, deadline=None)
def test_areas_and_f1_equal_scikit_learns(case):
    scores, truth = np.array(case[0], float), np.array(case[1])
    found = plausibility(scores, truth)
    precision, recall, _ = precision_recall_curve(truth, scores)
    assert found["AUPRC"] == pytest.approx(auc(recall, precision))
    assert found["average precision"] == pytest.approx(average_precision_score(truth, scores))
    chosen = np.zeros(len(truth), dtype=bool)
    chosen[np.argsort(-scores, kind="stable")[: truth.sum()]] = True
    assert found["token F1"] == pytest.approx(f1_score(truth, chosen))


def test_stretches_that_share_half_of_their_union_are_found():
    def mask(*spans):
        return np.array([any(a <= i < b for a, b in spans) for i in range(10)])

    gold = mask((0, 4), (6, 8))
    assert iou_f1(gold, gold) == 1
    assert iou_f1(mask((1, 4)), gold) == pytest.approx(2 * 1 / 3)  # 3 of 4 shared; the second stretch is missed
    assert iou_f1(mask((3, 7)), gold) == 0
    assert iou_f1(mask((0, 2), (7, 8), (9, 10)), gold) == pytest.approx(2 * 2 / 5)


def test_constant_scores_have_the_share_of_the_rationale_by_steps_and_more_by_trapezoids():
    found = plausibility(np.zeros(10), np.arange(10) < 2)
    assert found["average precision"] == pytest.approx(0.2)
    assert found["AUPRC"] == pytest.approx(0.6)
    assert np.isnan(found["mass"])


def test_a_rationale_without_players_is_an_error():
    with pytest.raises(InputError, match="names 0 of 3 players"):
        plausibility(np.ones(3), np.zeros(3, dtype=bool))
