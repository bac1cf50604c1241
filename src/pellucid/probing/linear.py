"""A linear probe, fitted in scikit-learn's manner, its regularisation chosen by cross-validation.

Features are centred and divided by one number, the standard deviation of a typical axis (their median: a few axes of
hidden states are huge), so that the same strengths mean the same on layers of different scale and the geometry stays. Of
the strengths the one with the lowest held-out loss wins; all of them on all folds are fitted together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.errors import InputError
from pellucid.probing.examples import known
from pellucid.probing.solver import logistic, ridge
from pellucid.probing.splits import folds

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Centre [d] and one scale."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Scaling:
        mean = x.mean(0)
        variance = (x - mean).square().mean(0)
        typical = variance.median()
        typical = typical if typical > 1e-6 * variance.mean() else variance.mean()
        return cls(mean, typical.sqrt().clamp_min(1e-12))

    def __call__(self, x: Tensor) -> Tensor:
        return (x.to(self.mean) - self.mean) / self.scale


def standardised(x: Tensor) -> Tensor:
    """Every axis of [..., n, d] with mean 0 and variance 1: what networks are trained on."""
    x = x - x.mean(-2, keepdim=True)
    return x / x.square().mean(-2, keepdim=True).sqrt().clamp_min(1e-12)


def features(x: Any) -> Tensor:
    """[n, d] in float32 or float64."""
    x = torch.as_tensor(x)
    if x.ndim != 2:
        raise InputError(f"features must be [example, d], got {list(x.shape)}")
    x = x if x.dtype == torch.float64 else x.float()
    if not bool((finite := x.isfinite().all(1)).all()):
        raise InputError(f"row {int((~finite).nonzero()[0])} of the features has numbers that are missing or infinite")
    return x


@dataclass
class LogisticProbe:
    """Multinomial logistic regression. `l2` is one strength or several to choose from by `folds` of whole groups.

    After `fit`: `classes_` [class], `weight_` [d, class] and `bias_` [class] on features as given, `l2_`.

    >>> probe = LogisticProbe(l2=1.0).fit([[-1.0], [-2.0], [1.0], [2.0]], ["low", "low", "high", "high"])
    >>> probe.predict([[3.0], [-3.0]]).tolist()
    ['high', 'low']
    """

    l2: float | Sequence[float] = STRENGTHS
    folds: int = 3
    seed: int = 0
    classes_: np.ndarray = field(init=False, repr=False)
    weight_: Tensor = field(init=False, repr=False)
    bias_: Tensor = field(init=False, repr=False)
    l2_: float = field(init=False, repr=False)

    def fit(self, x: Any, labels: Any, groups: Any = None) -> LogisticProbe:
        """`x` [n, d], `labels` [n], `groups` [n] what cross-validation must keep together (nothing, by default)."""
        x, labels = features(x), known(labels)
        if len(labels) != len(x):
            raise InputError(f"{len(x)} examples but {len(labels)} labels: expected one for each")
        self.classes_, y = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"all labels are {labels[0]!r}: a probe needs at least two classes")
        scaling = Scaling.of(x)
        scaled, k = scaling(x), len(self.classes_)
        strengths = np.atleast_1d(self.l2).astype(float)
        self.l2_ = float(strengths[0])
        if len(strengths) > 1:
            fold = folds(np.arange(len(x)) if groups is None else groups, self.folds, self.seed)
            trained = np.repeat(fold != np.arange(self.folds)[:, None], len(strengths), 0)
            fit = logistic(scaled, y, l2=np.tile(strengths, self.folds), weights=trained, classes=k, tol=1e-4)
            losses = -fit.logits(scaled).log_softmax(2)[:, torch.arange(len(y)), torch.as_tensor(y)]
            held = torch.as_tensor(~trained).to(losses)
            mean = (losses * held).sum(1).reshape(self.folds, -1).sum(0)
            self.l2_ = float(strengths[int(mean.argmin())])
        fit = logistic(scaled, y, l2=self.l2_, classes=k)
        self.weight_ = fit.weight[0] / scaling.scale
        self.bias_ = fit.bias[0] - scaling.mean @ self.weight_
        return self

    def decision_function(self, x: Any) -> Tensor:
        """Logits [n, class]."""
        return features(x).to(self.weight_) @ self.weight_ + self.bias_

    def predict_log_proba(self, x: Any) -> Tensor:
        """[n, class] in nats."""
        return self.decision_function(x).log_softmax(1)

    def predict(self, x: Any) -> np.ndarray:
        """[n] labels."""
        return self.classes_[self.decision_function(x).argmax(1).cpu().numpy()]

    def score(self, x: Any, labels: Any) -> float:
        """Accuracy."""
        return float((self.predict(x) == np.asarray(labels)).mean())


@dataclass
class RidgeProbe:
    """Linear regression with an L2 penalty, for numbers: `weight_` [d], `bias_`, `l2_` after `fit`.

    >>> probe = RidgeProbe(l2=0.0).fit([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0])
    >>> probe.predict([[3.0]]).round(decimals=4).tolist()
    [7.0]
    """

    l2: float | Sequence[float] = STRENGTHS
    folds: int = 3
    seed: int = 0
    weight_: Tensor = field(init=False, repr=False)
    bias_: Tensor = field(init=False, repr=False)
    l2_: float = field(init=False, repr=False)

    def fit(self, x: Any, y: Any, groups: Any = None) -> RidgeProbe:
        """`x` [n, d], `y` [n] numbers, `groups` [n] what cross-validation must keep together."""
        x, y = features(x).double(), torch.as_tensor(known(y).astype(float))
        if y.shape != x.shape[:1]:
            raise InputError(f"{len(x)} examples but numbers of shape {list(y.shape)}: expected one for each")
        scaling = Scaling.of(x)
        scaled = scaling(x)
        strengths = np.atleast_1d(self.l2).astype(float)
        self.l2_ = float(strengths[0])
        if len(strengths) > 1:
            fold = torch.as_tensor(folds(np.arange(len(x)) if groups is None else groups, self.folds, self.seed))
            losses = torch.zeros(len(strengths), dtype=x.dtype)
            for f in range(self.folds):
                fit = ridge(scaled, y, strengths, (fold != f).double())
                losses += (fit.predict(scaled[fold == f])[:, :, 0] - y[fold == f]).square().sum(1)
            self.l2_ = float(strengths[int(losses.argmin())])
        fit = ridge(scaled, y, self.l2_)
        self.weight_ = fit.weight[0, :, 0] / scaling.scale
        self.bias_ = fit.bias[0, 0] - scaling.mean @ self.weight_
        return self

    def predict(self, x: Any) -> Tensor:
        """[n]"""
        return features(x).to(self.weight_) @ self.weight_ + self.bias_

    def score(self, x: Any, y: Any) -> float:
        """R^2, the share of the variance explained."""
        y = torch.as_tensor(np.asarray(y, dtype=float))
        return float(1 - (y - self.predict(x)).square().sum() / (y - y.mean()).square().sum())
