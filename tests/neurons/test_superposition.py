"""Dimensions are shared as geometry says, the toy model finds its known figures, and crowding is told from chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pellucid
from pellucid.errors import InputError
from pellucid.neurons.superposition import crowding, dimensionality, interference, toy_model
from tests.zoo import build, tokenizer


def polygon(corners):
    angles = torch.arange(corners) * (2 * math.pi / corners)
    return torch.stack([angles.cos(), angles.sin()], 1)


TETRAHEDRON = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])


@pytest.mark.parametrize(
    ("figure", "share"),
    [(torch.eye(3), 1.0), (torch.tensor([[1.0, 0], [-1, 0]]), 1 / 2), (polygon(3), 2 / 3), (TETRAHEDRON, 3 / 4), (polygon(5), 2 / 5)],
    ids=["alone", "digon", "triangle", "tetrahedron", "pentagon"],
)  # fmt: skip
def test_the_figures_of_the_paper_have_their_dimensionality(figure, share):
    torch.testing.assert_close(dimensionality(figure), torch.full((len(figure),), share), rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 999), st.floats(0.1, 10))
def test_dimensionality_is_its_formula_is_indifferent_to_turning_and_scale_and_adds_up_to_no_more_than_there_is(
    n, m, seed, scale
):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, m, generator=g).double()
    slow = []
    for i in range(n):
        unit = w[i] / w[i].norm()
        others = [float(unit @ w[j]) ** 2 for j in range(n) if j != i]
        assert float(interference(w)[i]) == pytest.approx(sum(others), rel=1e-6, abs=1e-9)
        slow.append(float(w[i] @ w[i]) / (float(w[i] @ w[i]) + sum(others)))
    shares = dimensionality(w)
    np.testing.assert_allclose(shares.numpy(), slow, rtol=1e-6)
    turn, _ = torch.linalg.qr(torch.randn(m, m, generator=g).double())
    torch.testing.assert_close(dimensionality(scale * w @ turn), shares)
    assert float(shares.sum()) <= min(n, m) + 1e-6


def test_a_feature_that_is_not_there_has_no_dimension():
    assert dimensionality(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist() == [0.0, 1.0]


def best(found, sparsity):
    """The instance with the lowest loss, as the features' shares in rising order."""
    at = found.sel(sparsity=sparsity)
    return np.sort(at.dimensionality.values[int(at.loss.values.argmin())])


def test_sparse_features_share_dimensions_as_a_pentagon_for_less_than_any_model_without_superposition():
    found = toy_model(0.97, features=5, hidden=2, restarts=3, steps=1500, learning_rate=1e-2)
    np.testing.assert_allclose(best(found, 0.97), 2 / 5, atol=0.03)
    assert found.loss.values.min() < 0.5 * float(found.linear[0])


def test_dense_features_are_kept_by_importance_one_in_each_dimension():
    weights = [0.02, 1.0, 0.02, 1.0, 0.02]
    found = toy_model(0.0, features=5, hidden=2, importance=weights, steps=1500, learning_rate=1e-2)
    np.testing.assert_allclose(found.norm.values[0, 0], [0, 1, 0, 1, 0], atol=0.1)
    np.testing.assert_allclose(found.dimensionality.values[0, 0, [1, 3]], 1, atol=0.02)
    assert found.loss.values.item() == pytest.approx(float(found.linear[0]), rel=0.1)


@pytest.mark.parametrize(
    ("features", "hidden", "shares"), [(4, 2, [1 / 2] * 4), (6, 3, [1 / 2] * 6), (3, 2, [1 / 2, 1 / 2, 1])]
)
def test_sparse_features_form_digons_where_they_can(features, hidden, shares):
    found = toy_model(0.95, features=features, hidden=hidden, restarts=4, steps=1200, learning_rate=1e-2)
    np.testing.assert_allclose(best(found, 0.95), shares, atol=0.05)


def test_the_linear_loss_is_that_of_keeping_the_most_important():
    weights = torch.tensor([1.0, 0.5, 0.25])
    found = toy_model(0.7, features=3, hidden=1, importance=weights, steps=1)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(400_000, 3, generator=g) * (torch.rand(400_000, 3, generator=g) >= 0.7)
    kept = (x - x.mean(0)).pow(2) * weights
    assert float(found.linear[0]) == pytest.approx(float(kept[:, 1:].sum(1).mean()), rel=0.01)


def test_instances_do_not_depend_on_their_company_but_for_the_draw():
    one = toy_model(0.9, features=4, hidden=2, steps=20, seed=3)
    again = toy_model(0.9, features=4, hidden=2, steps=20, seed=3)
    assert one == again
    assert one != toy_model(0.9, features=4, hidden=2, steps=20, seed=4)


def test_random_directions_are_as_crowded_as_chance_and_copies_more():
    module = build("gpt2")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    g = torch.Generator().manual_seed(1)
    free = torch.randn(300, 50, generator=g)
    found = crowding(model, directions={"free": free, "copied": free[:20].repeat(15, 1)}).data
    by = {name: found.sel(site=name) for name in ("free", "copied")}
    assert float(by["free"].interference) == pytest.approx(299 / 50, rel=0.02)
    assert float(by["free"].random_interference) == pytest.approx(299 / 50, rel=0.02)
    assert float(by["copied"].largest) == pytest.approx(1, abs=1e-5)
    assert float(by["copied"].dimensions) < 20 < 40 < float(by["free"].dimensions) <= 50
    neurons = crowding(model)
    assert neurons.site.values.tolist() == ["layers.0.mlp.neurons", "layers.1.mlp.neurons"]
    rows = torch.nn.functional.normalize(module.transformer.h[0].mlp.c_proj.weight, dim=1).detach()
    squares = (rows @ rows.T).pow(2)
    assert float(neurons.interference[0]) == pytest.approx(float((squares.sum() - squares.trace()) / len(rows)), rel=1e-3)  # fmt: skip
    assert float(neurons.directions[0]) == len(rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"sparsity": 1.0}, "to below 1"), ({"sparsity": []}, "to below 1"), ({"sparsity": 0.5, "importance": [1.0]}, "20 numbers"), ({"sparsity": 0.5, "hidden": 0}, "hidden=0: expected at least 1")],
)  # fmt: skip
def test_what_is_no_toy_model_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        toy_model(**given)
