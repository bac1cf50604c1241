"""Edge and structural probes on features whose layers are known, and their parts against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree, shortest_path
from scipy.stats import spearmanr

from pellucid.errors import InputError
from pellucid.probing import Features, Training, Treebank, edge_probing, structural
from pellucid.probing.edges import _expected
from pellucid.probing.structural import spanning_tree, tree_distances
from pellucid.statistics import spearman
from tests.probing.trees import drawn

FAST = Training(hidden=16, epochs=25, dropout=0.0, learning_rate=1e-2)


def random_tree(n: int, rng: np.random.Generator) -> list[int]:
    """Heads, counted from 1, of a random tree rooted in its first word."""
    return [0, *(int(rng.integers(i)) + 1 for i in range(1, n))]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_distances_trees_and_rank_correlations_are_those_of_scipy(n, seed):
    rng = np.random.default_rng(seed)
    heads = random_tree(n, rng)
    graph = np.zeros((n, n))
    for i, head in enumerate(heads):
        if head:
            graph[i, head - 1] = 1
    np.testing.assert_array_equal(tree_distances(heads), shortest_path(graph, directed=False))
    drawn_ = rng.random((n, n)) + 0.1
    drawn_ = drawn_ + drawn_.T
    theirs = minimum_spanning_tree(np.triu(drawn_, 1)).nonzero()
    assert spanning_tree(drawn_) == {(min(a, b), max(a, b)) for a, b in zip(*theirs, strict=True)}
    a, b = rng.integers(4, size=n), rng.integers(4, size=n)
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_heads_that_are_no_tree_are_refused():
    with pytest.raises(InputError, match="no tree"):
        tree_distances([0, 0, 2])


def test_the_expected_layer_is_the_formula():
    scores = np.array([[0.5, 0.6, 0.9, 0.9]])
    assert _expected(scores)[0] == pytest.approx((1 * 0.1 + 2 * 0.3) / 0.4)
    assert np.isnan(_expected(np.array([[0.5, 0.5]]))[0])


@pytest.mark.parametrize("where", [1, 2])
def test_a_property_is_expected_at_the_layer_that_first_has_it(where):
    features, examples = drawn(texts=150)
    values = (
        features.values[[0, 0, 0, 0]] + torch.randn(4, *features.values.shape[1:], generator=torch.manual_seed(0)) * 0.1
    )
    values[where] = features.values[2]
    sites = ("embed", *(f"layers.{i}.resid_post" for i in range(3)))
    found = edge_probing(
        Features(values, sites, features.spans, "drawn", None, "mean"), examples, training=FAST, seeds=1
    )
    assert float(found["expected_layer"]) == pytest.approx(where, abs=0.4)
    assert float(found["expected_low"]) <= float(found["expected_layer"]) <= float(found["expected_high"])
    assert int(np.argmax(found.weight.values)) == where
    assert float(found.weight.sum()) == pytest.approx(1, abs=1e-5)
    assert float(found["centre_of_gravity"]) == pytest.approx(float(found.weight.values @ np.arange(4)), abs=1e-5)


def test_pairs_are_told_apart_by_which_of_two_words_is_marked():
    features, examples = drawn(texts=150, classes=2)
    n = len(examples) // 2 * 2
    pairs = type(examples)(
        examples.spans, examples.labels[0:n:2], first=np.arange(0, n, 2), second=np.arange(1, n, 2)
    )  # the label is the first word's
    found = edge_probing(features, pairs, training=FAST, seeds=1)
    assert found.accuracy.values[0] < 0.7 < 0.9 < found.accuracy.values[2]


def test_a_structural_probe_finds_trees_that_are_embedded_and_none_in_noise():
    """In layer "0" each word is the sum of the directions of the edges between it and the root: squared distances are
    distances in the tree exactly (Hewitt and Manning's own construction), in random coordinates."""
    rng = np.random.default_rng(0)
    lines, vectors = [], []
    for _ in range(120):
        n = int(rng.integers(5, 9))
        heads = random_tree(n, rng)
        lines += [f"{i + 1}\tw\tw\tNOUN\tN\t_\t{h}\tdep\t_\t_" for i, h in enumerate(heads)] + [""]
        codes, directions = np.zeros((n, 10)), rng.permutation(10)
        for i, head in enumerate(heads):
            if head:
                codes[i] = codes[head - 1]
                codes[i, directions[i]] += 1
        vectors.append(codes)
    true = np.concatenate(vectors) @ np.linalg.qr(rng.normal(size=(10, 10)))[0] * 3
    values = torch.tensor(np.stack([rng.normal(size=true.shape), true]), dtype=torch.float32)
    bank = Treebank.parse("\n".join(lines))
    features = Features(values, ("embed", "layers.0.resid_post"), bank.spans, "drawn", None, "mean")
    found = structural(features, bank, rank=10, epochs=60)
    noise, tree = found.uuas.values
    assert tree > 0.9 and found.distance_spearman.values[1] > 0.9 and found.depth_spearman.values[1] > 0.8
    assert found.root_accuracy.values[1] > 0.8
    assert noise < 0.5 and found.distance_spearman.values[0] < 0.55
    assert found.uuas_low.values[1] <= tree <= found.uuas_high.values[1]
