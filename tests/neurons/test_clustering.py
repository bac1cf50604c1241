"""Clustering of units: planted groups come back with every method, noise has none, and the controls say so."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score, silhouette_score

import pellucid
from pellucid.errors import InputError
from pellucid.neurons import harvest
from pellucid.neurons.clustering import UnitClusters, UnitVectors, unit_clusters
from pellucid.neurons.directions import output_weights
from tests.zoo import build, tokenizer

TEXTS = ["The capital of France is Paris", "Mary and John went to the store", "When he gave a drink to Mary"]


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


def planted(groups=4, each=12, tokens=400, noise=0.7, seed=0):
    """Units that share a hidden factor with the others of their group, at scales and levels of their own."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(groups), each)
    hidden = rng.standard_normal((groups, tokens))
    x = hidden[truth] + noise * rng.standard_normal((len(truth), tokens))
    x = rng.uniform(0.1, 10, (len(x), 1)) * x + rng.uniform(-5, 5, (len(x), 1))
    return UnitVectors(x, tuple(map(str, range(len(x)))), centred=True), truth


@pytest.mark.parametrize("method", ["agglomerative", "spectral", "kmeans"])
def test_planted_groups_come_back_and_are_more_than_chance(method):
    features, truth = planted()
    found = unit_clusters(features, UnitClusters(4, method), draws=3)
    assert adjusted_rand_score(truth, found.cluster) == 1
    assert float(found.silhouette) > 0.4 > 0.1 > float(found.silhouette_chance)
    assert float(found.stability) == 1 and abs(float(found.stability_chance)) < 0.2
    assert sorted(found["size"].values) == [12] * 4
    assert all(truth[int(c)] == truth[found.cluster.values == i][0] for i, c in enumerate(found.centre.values))


@pytest.mark.parametrize("method", ["agglomerative", "spectral"])
def test_units_beyond_the_limit_join_the_nearest_cluster(method):
    features, truth = planted(each=30)
    found = unit_clusters(features, UnitClusters(4, method, limit=40), draws=1)
    assert adjusted_rand_score(truth, found.cluster) == 1
    assert found.data.attrs == {"method": method, "fitted": 40, "units": 120}


def test_the_number_of_clusters_is_the_one_with_the_best_silhouette():
    features, _ = planted(groups=8, noise=0.3)
    assert UnitClusters().fit(features.normalised()).n_ == 8


def test_clusters_and_silhouette_are_those_of_scikit_learn_on_correlations():
    features, _ = planted(noise=2.0, seed=3)
    distance = 1 - np.corrcoef(features.values)
    np.fill_diagonal(distance, 0)
    labels = AgglomerativeClustering(5, metric="precomputed", linkage="average").fit_predict(distance)
    found = UnitClusters(5).fit(features.normalised())
    assert adjusted_rand_score(labels, found.labels_) == 1
    assert found.silhouette_ == pytest.approx(silhouette_score(distance, labels, metric="precomputed"), abs=1e-4)


def test_noise_has_no_stable_clusters():
    rng = np.random.default_rng(0)
    features = UnitVectors(rng.standard_normal((60, 300)), tuple(map(str, range(60))))
    found = unit_clusters(features, UnitClusters(4, "kmeans"))
    assert abs(float(found.stability)) < 0.15
    assert float(found.silhouette) == pytest.approx(float(found.silhouette_chance), abs=0.02)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_scale_and_level_of_a_unit_do_not_matter_to_correlations_nor_scale_to_cosines(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6, 30))
    scale, level = rng.uniform(0.1, 10, (6, 1)), rng.uniform(-3, 3, (6, 1))
    names = tuple("abcdef")
    for centred, y in ((True, scale * x + level), (False, scale * x)):
        np.testing.assert_allclose(
            UnitVectors(x, names, centred).products(), UnitVectors(y, names, centred).products(), atol=1e-4
        )


def test_units_that_never_vary_belong_nowhere():
    features, _ = planted()
    features.values[5] = 3.0
    found = unit_clusters(features, UnitClusters(4), draws=1)
    assert int(found.cluster[5]) == -1 and np.isnan(found["product"].values[5])
    assert int(found["size"].sum()) == 47


def test_harvested_activations_and_weights_are_features():
    model = opened("gpt2")
    site = "layers.0.mlp.neurons"
    made = UnitVectors.activations(harvest(model, TEXTS, site), [site])
    values = np.concatenate([model.run(t, keep=[site]).tensor(site)[0].detach().numpy() for t in TEXTS])
    assert sorted(made.values[3].tolist()) == pytest.approx(sorted(values[:, 3].tolist()), abs=1e-6)
    assert made.names[3] == f"{site}.3"
    found = unit_clusters(made, UnitClusters(3), draws=1)
    assert found.provenance.digest == model.digest and found.data.sizes["unit"] == values.shape[1]

    written = UnitVectors.weights(model, "layers.*.mlp.neurons")
    rows = output_weights(model, "layers.1.mlp.neurons").numpy()
    cosine = rows @ rows.T / np.outer(*[np.linalg.norm(rows, axis=1)] * 2)
    np.testing.assert_allclose(written.products()[len(rows) :, len(rows) :], cosine, atol=1e-5)
    gated = UnitVectors.weights(opened("llama"), site, "input")
    assert gated.values.shape[1] == 2 * opened("llama").anatomy.stacks[0].d_model


def test_bad_questions_are_one_clear_error():
    features, _ = planted()
    with pytest.raises(InputError, match="there is no method 'dbscan'"):
        unit_clusters(features, UnitClusters(4, "dbscan"))
    with pytest.raises(InputError, match="expected 2 or more, and fewer than units"):
        unit_clusters(features, UnitClusters(48))
    with pytest.raises(InputError, match="expected 'input' or 'output'"):
        UnitVectors.weights(opened("gpt2"), "layers.0.mlp.neurons", "both")
    with pytest.raises(InputError, match=r"expected \[unit, feature\]"):
        UnitVectors(np.zeros((3, 2)), ("a",))
