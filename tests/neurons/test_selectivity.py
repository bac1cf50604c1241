"""Selectivity: the measures are those of scikit-learn and scipy, chance is what a shuffle gives, and a known neuron is found."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pointbiserialr, rankdata
from sklearn.metrics import f1_score, roc_auc_score

import pellucid
from pellucid.errors import InputError
from pellucid.neurons import neuron_selectivity
from pellucid.neurons import selectivity as own
from pellucid.views import document
from tests.neurons.test_harvest import TEXTS
from tests.zoo import build, tokenizer

ANIMALS, PLACES = {"cat", "dog"}, {"mat", "house"}


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


def words(texts=TEXTS):
    """Places of all words and whether they are animals, places or others."""
    places, labels = [], []
    for number, text in enumerate(texts):
        at = 0
        for word in text.split():
            places.append((number, at, at + len(word)))
            labels.append("animal" if word in ANIMALS else "place" if word in PLACES else "other")
            at += len(word) + 1
    return places, labels


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(6, 40), st.booleans())
def test_the_measures_are_those_of_scikit_learn_and_scipy(seed, n, rounded):
    rng = np.random.default_rng(seed)
    x, labels = rng.normal(size=(3, n)), rng.integers(0, 3, n)
    x = (x.round() if rounded else x).astype(np.float32)
    labels[:3] = 0, 1, 2
    marks, rows = np.eye(3)[labels], torch.from_numpy(x)
    less, upto = own.counts_below(rows)
    np.testing.assert_array_equal(upto, rankdata(x, method="max", axis=1))
    np.testing.assert_array_equal(less + 1, rankdata(x, method="min", axis=1))
    found = own.auroc(less, upto, marks), own.point_biserial(rows, marks), own.best_f1(less, marks)
    for c in range(3):
        for u in range(3):
            y = marks[:, c]
            best = max(f1_score(y, x[u] >= threshold) for threshold in np.unique(x[u]))
            wanted = roc_auc_score(y, x[u]), pointbiserialr(y, x[u]).statistic, best
            np.testing.assert_allclose([each[c, u] for each in found], np.nan_to_num(wanted), atol=1e-5)


def test_the_held_out_interval_is_that_of_drawing_texts_again():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 6)
    y = (rng.random(180) < 0.3).astype(float)
    x = (y + rng.normal(size=180)).round(1)
    rows = own._outside([own.Leader(0.0, "u", x)], y, groups, seed=1)
    assert rows[0, 0] == pytest.approx(roc_auc_score(y, x))
    drawn = []
    for _ in range(1000):
        chosen = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(0, 30, 30)])
        drawn.append(roc_auc_score(y[chosen], x[chosen]))
    np.testing.assert_allclose(rows[0, 1:], np.quantile(drawn, [0.025, 0.975]), atol=0.02)


@pytest.mark.parametrize(
    ("family", "sites"),
    [("llama", "layers.*.mlp.neurons"), ("bert", "layers.*.mlp.neurons"), ("t5", "encoder.layers.*.mlp.neurons")],
)
def test_activations_are_those_at_the_last_token_of_each_word(family, sites):
    model = opened(family)
    places, labels = words()
    found = neuron_selectivity(model, TEXTS, places, labels, sites, draws=2, best=3)
    again = neuron_selectivity(model, TEXTS, places, labels, sites, draws=2, best=3, memory=1)
    assert found.allclose(again, atol=1e-4)
    name = str(model.sites(sites)[1])
    rows = []
    for text, start, stop in places:
        ids = model.tokenizer(TEXTS[text], return_offsets_mapping=True)["offset_mapping"]
        token = max(i for i, (a, b) in enumerate(ids) if a < stop and b > start)
        rows.append(model.run(TEXTS[text], keep=[name]).tensor(f"{name}@{token}")[0, 0].detach())
    marks, _ = own._marks(places, labels)
    half = own._half(np.array([p[0] for p in places]), marks, ["a", "b", "c"], 0)
    wanted = own.auroc(*own.counts_below(torch.stack(rows).T[:, half]), marks[half])
    mine = found.data.auroc.sel(unit=[u for u in found.data.unit.values if str(u).startswith(name)])
    np.testing.assert_allclose(mine.values, wanted, atol=2e-3)


def test_a_neuron_that_was_made_for_a_concept_is_found_and_others_are_not():
    """One axis of the embedding is 1 for words that end in t or g and small for others; labels at random have no unit."""
    module = build("llama")
    ids = tokenizer(module).convert_tokens_to_ids(["t", "g"])  # its tokens are letters
    with torch.no_grad():
        weight = module.get_input_embeddings().weight
        weight[:, 7] = weight[:, 7].clamp(-0.01, 0.01)
        weight[ids, 7] = 1.0
    model = pellucid.load(module, tokenizer=tokenizer(module))
    places, _ = words()
    labels = ["t or g" if TEXTS[text][stop - 1] in "tg" else "other" for text, _, stop in places]
    found = neuron_selectivity(model, TEXTS, places, labels, "embed", draws=200).data.sel(concept="t or g")
    assert found.found.values[0] == "embed.7"
    made = found.sel(unit="embed.7")
    for value in (made.auroc, made.f1, found.held_out[0], found.low[0], found.high[0]):
        assert float(value) == pytest.approx(1.0)
    assert float(made.p) == pytest.approx(1 / 201)
    (one,) = neuron_selectivity(model, TEXTS, places, labels, "layers.1.mlp.neurons.3", draws=9).data.unit.values
    assert one == "layers.1.mlp.neurons.3"
    rng = np.random.default_rng(3)
    random = neuron_selectivity(model, TEXTS, places, rng.permutation(labels), "embed", draws=200).data
    assert int(random.significant.sum()) <= 2
    assert abs(float(random.held_out.mean()) - 0.5) < 0.1


def test_the_view_is_a_row_for_each_unit_that_was_found():
    model, (places, labels) = opened("llama"), words()
    found = neuron_selectivity(model, TEXTS, places, labels, draws=9, best=2)
    table = document(found).data
    columns = {c.name: c for c in table.columns}
    assert table.rows == 6 and columns["concept"].texts[:3] == ("animal", "animal", "other")
    assert columns["unit"].texts == tuple(found.data.found.values.ravel())
    auroc = found.data.auroc.sel(concept="place", unit=found.data.found.values[2, 1])
    assert columns["AUROC"].numbers.array()[5] == pytest.approx(float(auroc))


def test_shuffling_within_texts_keeps_how_many_of_each_concept_a_text_has():
    groups = np.repeat(np.arange(20), 5)
    marks = np.eye(3)[np.random.default_rng(0).integers(0, 3, 100)]
    order = np.random.default_rng(1).permutation(100)
    groups, marks = groups[order], marks[order]
    shuffled = own._shuffles(groups, marks, "within texts", 4, 0).reshape(100, 4, 3)
    for g in range(20):
        assert (shuffled[groups == g].sum(0) == marks[groups == g].sum(0)).all()
    assert (shuffled != marks[:, None]).any()
    free = own._shuffles(groups, marks, "all", 4, 0).reshape(100, 4, 3)
    assert (free.sum(0) == marks.sum(0)).all() and (free.sum(2) == 1).all()


def test_wrong_labels_say_what_is_wrong():
    model, (places, labels) = opened("llama"), words()
    for change, message in (
        ((places, labels[:-1]), "one for each"),
        ((places, ["x"] * len(labels)), "nothing to tell apart"),
        ((places, ["rare", *["x"] * (len(labels) - 1)]), "rare is not in both halves"),
        (([(0, 0, 0), *places[1:]], labels), "no token touches"),
    ):
        with pytest.raises(InputError, match=message):
            neuron_selectivity(model, TEXTS, *change, draws=1)
    with pytest.raises(InputError, match="goes into the encoder"):
        neuron_selectivity(opened("t5"), TEXTS, places, labels, "decoder.layers.*.mlp.neurons", draws=1)
