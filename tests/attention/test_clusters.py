"""Heads that look alike are grouped; distances are scipy's Jensen-Shannon divergences."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from pellucid.attention import head_clusters, patterns
from pellucid.attention.heads import distances, joined, scaled
from pellucid.errors import InputError
from tests.attention.opening import PROMPT, opened

TEXTS = [PROMPT, "When Mary and John went to the store"]


def test_distances_are_mean_jensen_shannon_divergences():
    model = opened("gpt2")
    found = head_clusters(model, TEXTS, n=3)
    each = [patterns(model, text).values for text in TEXTS]
    each = [a.reshape(-1, *a.shape[2:]) for a in each]
    for g, h in ((0, 1), (2, 7), (3, 3)):
        rows = [jensenshannon(a[g, q], a[h, q]) ** 2 for a in each for q in range(a.shape[1])]
        assert found.distance.values[g, h] == pytest.approx(np.nan_to_num(rows).mean(), abs=1e-5)
    assert found.one_head.values[:2].tolist() == ["0.0", "0.1"]
    assert (found.distance.values <= np.log(2)).all()


def test_families_of_heads_are_found_and_better_than_chance():
    rng = np.random.default_rng(0)
    heads = []
    for centre in (0, 3, 6):
        for _ in range(4):
            a = rng.random((7, 7)) * 0.02
            a[:, centre] += 1
            heads.append(a / a.sum(1, keepdims=True))
    distance = distances([np.stack(heads)])
    labels = joined(distance, 3)
    assert [len(set(labels[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(labels)) == 3


def test_the_map_keeps_distances_that_lie_in_a_plane():
    points = np.random.default_rng(1).random((6, 2))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    found = scaled(distance).T
    np.testing.assert_allclose(np.linalg.norm(found[:, None] - found[None], axis=-1), distance, atol=1e-8)


def test_a_clustering_says_how_good_it_is_and_how_good_chance_would_be():
    found = head_clusters(opened("bert"), TEXTS)
    assert found.cluster.dims == ("layer", "head")
    assert -1 <= float(found.silhouette_chance) <= 1
    assert len(np.unique(found.cluster)) >= 2
    with pytest.raises(InputError, match="expected from 2"):
        head_clusters(opened("bert"), TEXTS, n=1)
