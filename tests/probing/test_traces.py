"""Traces and ROC curves: the area is scikit-learn's, the threshold keeps its promise, a probe says at a token what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from pellucid.errors import InputError
from pellucid.probing import Examples, ProbeTraces, Protocol, Spans, read, roc
from pellucid.probing.roc import area_interval, areas
from pellucid.statistics import weights
from pellucid.views import schema as s
from pellucid.views.documents import document
from tests.probing.trees import drawn, tiny

scored = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({y for _, y in rows}) == 2
)


@given(scored)
@settings(deadline=None)
def test_the_curve_and_its_area_are_those_of_scikit_learn(rows):
    scores, labels = map(np.array, zip(*rows, strict=True))
    found = roc(scores, labels)
    assert float(found.area) == pytest.approx(roc_auc_score(labels, scores))
    alarms, hits, _ = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(found.false_positive.values, alarms)
    np.testing.assert_allclose(found.true_positive.values, hits)


@given(scored)
@settings(deadline=None)
def test_the_area_knows_nothing_but_the_order(rows):
    scores, labels = map(np.array, zip(*rows, strict=True))
    assert float(roc(scores, labels).area) == pytest.approx(float(roc(np.exp(scores / 2), labels).area))
    assert float(roc(-scores, labels).area) == pytest.approx(1 - float(roc(scores, labels).area))


def test_a_bootstrap_draw_is_the_area_of_the_examples_it_drew():
    rng = np.random.default_rng(0)
    scores, labels, groups = rng.integers(0, 5, 30).astype(float), rng.random(30) < 0.5, np.repeat(np.arange(10), 3)
    counts = weights(10, draws=20, seed=7).astype(int)
    for drawn_area, count in zip(areas(scores, labels, counts[:, groups]), counts, strict=True):
        rows = np.repeat(np.arange(30), count[groups])
        assert drawn_area == pytest.approx(roc_auc_score(labels[rows], scores[rows]))


def test_examples_of_one_text_are_no_independent_evidence():
    rng = np.random.default_rng(0)
    signal, groups = rng.normal(size=40), np.repeat(np.arange(40), 10)
    labels = (rng.random(40) < 0.5)[groups]
    clustered, single = (high - low for low, high in (area_interval(signal[groups], labels, g) for g in (groups, None)))
    assert clustered == pytest.approx(np.sqrt(10) * single, rel=0.25)


@pytest.mark.parametrize(("scores", "labels", "why"), [([1.0, 2.0], [True, True], "alike"), ([1.0], [True, False], "shape"), ([np.nan, 1.0], [True, False], "missing")])  # fmt: skip
def test_what_has_no_curve_is_refused(scores, labels, why):
    with pytest.raises(InputError, match=why):
        roc(scores, labels)


def test_probes_tell_apart_where_the_label_is_and_shuffled_ones_nowhere():
    features, examples = drawn(texts=120)
    found = ProbeTraces("c1", pool="mean").fit(features, examples).result_
    area = found.area.values
    assert abs(area[0] - 0.5) < 0.12 and 0.8 < area[1] < area[2]
    assert (found.low.values <= area).all() and (area <= found.high.values).all()
    assert (found.shuffled_low.values < 0.6).all() and (found.shuffled.values < area - 0.1)[1:].all()
    assert (found.shuffled_low.values <= found.shuffled.values).all()
    assert found.true_positive.dims == ("layer", "false_positive")
    assert (np.diff(found.true_positive.values, axis=1) >= 0).all()


@pytest.mark.parametrize("alarms", [0.0, 0.05, 0.3])
def test_no_more_than_the_allowed_share_of_held_out_examples_is_a_false_alarm(alarms):
    features, examples = drawn(texts=60)
    probes = ProbeTraces("c1", alarms=alarms).fit(features, examples)
    threshold = float(probes.result_.threshold.values[2])
    curve = probes.result_.true_positive.values[2]
    from pellucid.probing.splits import groups_of, held_out
    from pellucid.probing.traces import log_odds

    held = held_out(groups_of(examples, "text"), probes.protocol.test, 0) & (examples.labels != "c1")
    scores = log_odds(probes.probes_[features.sites[2]], "c1", features.of(examples, 2)[held])
    assert (scores > threshold).mean() <= alarms + 1e-12
    assert (scores >= threshold).mean() > alarms  # and no higher than that takes
    assert 0 <= curve[0] <= curve[-1] == 1


@pytest.fixture(scope="module")
def fitted():
    model = tiny()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["the", "city", "of", "Rome", "in", "France", "Paris"], 4)) for _ in range(40)]
    examples = Examples(Spans.whole(texts), ["Paris" if "Paris" in t else "none" for t in texts])
    return model, ProbeTraces("Paris", protocol=Protocol(test=0.3, l2=1.0)).fit(model, examples)


def test_the_trace_at_the_last_token_is_what_the_probe_says_of_the_whole_text(fitted):
    model, probes = fitted
    text = "the city of Paris"
    found = probes.trace(model, text)
    values = read(model, Spans.whole([text]), pool="last").values[:, 0]
    for layer, site in enumerate(probes.probes_):
        p = probes.probes_[site].predict_log_proba(values[layer][None]).exp()[0]
        at = list(probes.probes_[site].classes_).index("Paris")
        assert found["score"].values[layer, -1] == pytest.approx(float(torch.logit(p[at].double())), abs=1e-3)
    assert len(found["token"]) == 4


def test_a_trace_of_a_causal_model_does_not_know_what_comes(fitted):
    model, probes = fitted
    short, long = (probes.trace(model, t)["score"].values for t in ("the city", "the city of Rome"))
    np.testing.assert_allclose(long[:, : short.shape[1]], short, atol=1e-4)


def test_a_trace_shows_itself_with_the_threshold_and_curve_of_every_layer(fitted):
    model, probes = fitted
    found = probes.trace(model, "the city of Paris")
    shown = document(found)
    assert isinstance(shown.data, s.Traces)
    assert len(shown.data.rocs) == len(shown.data.rows.labels) == len(probes.probes_)
    assert shown.data.rows.components == tuple(probes.probes_)
    np.testing.assert_allclose(shown.data.values.array(), found["score"].values, rtol=1e-6)
    np.testing.assert_allclose(shown.data.thresholds.array(), probes.result_["threshold"].values, rtol=1e-6)
    assert "ProbeTraces(" in shown.code.python and ".fit(model, " in shown.code.python
    curves = document(probes.result_).data
    assert isinstance(curves, s.Curves) and curves.lines[-1].name == "chance" and curves.x.name == "false alarms"


def test_a_curve_shows_itself_beside_chance_and_beside_another():
    one, two = roc([1, 2, 3, 4], [0, 0, 1, 1]), roc([1, 3, 2, 4], [0, 0, 1, 1])
    from pellucid.views import compare

    shown = compare({"one": one, "two": two}).data
    assert isinstance(shown, s.Curves) and [line.name for line in shown.lines] == ["one", "two", "chance"]


def test_what_cannot_be_traced_is_one_clear_error(fitted):
    model, probes = fitted
    with pytest.raises(InputError, match="not fitted"):
        ProbeTraces().trace(model, "the")
    with pytest.raises(InputError, match="one prompt at a time"):
        probes.trace(model, ["the", "of"])
    features, examples = drawn(texts=20)
    with pytest.raises(InputError, match="no example is labelled 'c9'"):
        ProbeTraces("c9").fit(features, examples)
