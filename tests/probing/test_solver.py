"""The batched solver: scikit-learn's optimum, for every problem as if it were alone, under any units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge

from pellucid.errors import InputError
from pellucid.probing import LogisticProbe, RidgeProbe, logistic, ridge


def overlapping(n: int = 600, d: int = 20, k: int = 4, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Classes of unequal size on axes of very unequal variance, with an offset."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(k), rng.choice(k, n - k, p=np.arange(1, k + 1) / np.arange(1, k + 1).sum())])
    x = (rng.normal(size=(n, d)) + 0.6 * rng.normal(size=(k, d))[y]) * np.geomspace(30, 0.1, d) + 5
    return torch.tensor(x @ np.linalg.qr(rng.normal(size=(d, d)))[0]), y


def reference(x, y, l2, weight=None):
    fit = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=50_000).fit(x.numpy(), y, sample_weight=weight)
    return fit, -fit.predict_log_proba(x.numpy())[np.arange(len(y)), y]


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("l2", [0.1, 1.0, 100.0])
def test_the_optimum_is_that_of_scikit_learn(k, l2):
    x, y = overlapping(k=k)
    fit = logistic(x.float(), y, l2=l2)
    theirs, losses = reference(x, y, l2)
    assert bool(fit.converged)
    assert float(fit.loss) == pytest.approx(losses.mean(), abs=1e-4)
    mine = fit.logits(x.float())[0].argmax(1).numpy()
    assert abs((mine == y).mean() - (theirs.predict(x.numpy()) == y).mean()) <= 1e-3 + 1 / len(y)
    exact = logistic(x, y, l2=l2, tol=1e-13)
    probability = exact.logits(x)[0].softmax(1).numpy()
    np.testing.assert_allclose(probability, theirs.predict_proba(x.numpy()), atol=2e-3)


def test_problems_fitted_together_are_those_fitted_alone():
    x, y = overlapping()
    rng = np.random.default_rng(1)
    targets = np.stack([y, rng.permutation(y), y])
    weights = rng.random((3, len(y)))
    l2 = [0.5, 5.0, 50.0]
    together = logistic(x, targets, l2=l2, weights=weights, tol=1e-12)
    for p in range(3):
        _, losses = reference(x, targets[p], l2[p], weights[p])
        assert float(together.loss[p]) == pytest.approx((losses * weights[p]).sum() / weights[p].sum(), abs=1e-5)
        alone = logistic(x, targets[p], l2=l2[p], weights=weights[p], tol=1e-12)
        torch.testing.assert_close(alone.weight[0], together.weight[p], atol=1e-3, rtol=1e-3)


def test_rows_without_weight_do_not_count():
    x, y = overlapping()
    kept = np.arange(len(y)) % 3 > 0
    masked, taken = logistic(x, y, weights=kept, tol=1e-12), logistic(x[kept], y[kept], tol=1e-12)
    torch.testing.assert_close(masked.weight, taken.weight, atol=1e-4, rtol=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1000), st.integers(2, 5))
def test_the_gradient_vanishes_and_the_penalty_sees_no_intercept(seed, l2, k):
    x, y = overlapping(n=120, d=6, k=k, seed=seed)
    fit = logistic(x, y, l2=l2, tol=1e-14, limit=3000)
    shifted = logistic(x + 100, y, l2=l2, tol=1e-14, limit=3000)
    assert float(fit.objective) == pytest.approx(float(shifted.objective), abs=1e-8)
    residual = fit.logits(x)[0].softmax(1) - torch.nn.functional.one_hot(torch.tensor(y), k)
    gradient = x.T @ residual + (2 if k == 2 else 1) * l2 * fit.weight[0]
    assert float(gradient.abs().max()) / len(y) < 1e-4
    assert float(residual.sum(0).abs().max()) / len(y) < 1e-5


def test_a_class_that_a_fold_lacks_gets_no_probability_and_stops_nothing():
    x, y = overlapping()
    fit = logistic(x.float(), y, weights=y != 2, classes=4)
    assert bool(fit.converged)
    assert float(fit.logits(x.float())[0].softmax(1)[:, 2].max()) < 0.01


def test_rare_classes_and_dead_axes_do_not_blow_up_a_step():
    x, y = overlapping(n=2000, k=3)
    y[y == 0] = 1
    y[:2] = 0
    x = torch.cat([x, torch.zeros(len(x), 3)], 1)
    for l2 in (0.01, 1.0, 100.0):
        fit = logistic(x.float(), y, l2=l2, tol=1e-5)
        assert bool(fit.converged)
        assert float(fit.objective) <= float(logistic(x, y, l2=l2, tol=1e-10).objective) + 1e-3


def test_ridge_is_that_of_scikit_learn():
    x, _ = overlapping()
    y = x[:, :2] @ torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=x.dtype) + 3
    weight = torch.rand(len(x), dtype=x.dtype)
    fit = ridge(x, y, [0.1, 10.0], weight)
    for p, alpha in enumerate((0.1, 10.0)):
        theirs = Ridge(alpha=alpha).fit(x.numpy(), y.numpy(), sample_weight=weight.numpy())
        np.testing.assert_allclose(fit.weight[p].numpy().T, theirs.coef_, atol=1e-8)
        np.testing.assert_allclose(fit.bias[p].numpy(), theirs.intercept_, atol=1e-6)


def test_probes_choose_strong_regularisation_where_there_is_nothing_and_weak_where_there_is():
    x, y = overlapping(n=300, d=60, k=3)
    rng = np.random.default_rng(0)
    assert LogisticProbe(l2=(0.1, 1e5)).fit(x, rng.permutation(y)).l2_ == 1e5
    assert LogisticProbe(l2=(0.1, 1e5)).fit(x, y).l2_ == 0.1
    numbers = x[:, 0].numpy()
    assert RidgeProbe(l2=(0.1, 1e5)).fit(x, numbers).l2_ == 0.1
    assert RidgeProbe(l2=(0.1, 1e5)).fit(x, rng.permutation(numbers)).l2_ == 1e5


def test_what_cannot_be_fitted_is_named():
    x = torch.zeros(4, 2)
    with pytest.raises(InputError, match="targets are"):
        logistic(x, [0, 1])
    with pytest.raises(InputError, match="whole numbers from 0"):
        logistic(x, [0, 1, 2, 5], classes=3)
    with pytest.raises(InputError, match="every problem needs examples"):
        logistic(x, [0, 1, 0, 1], weights=[0, 0, 0, 0])
    with pytest.raises(InputError, match="finite"):
        logistic(x * float("nan"), [0, 1, 0, 1])
    with pytest.raises(InputError, match="at least two classes"):
        LogisticProbe().fit(x, ["a"] * 4)
