"""How is a property taken out of a representation, so that no linear probe finds it?

An eraser is affine, r(x) = x - A B (x - mean), fitted on features and labels, and an edit of the running model.

* LEACE (Belrose et al. 2023), in closed form: of all affine maps after which no linear predictor beats a constant, the one
  that changes x least. With Z the one-hot labels, W = Sigma_xx^(-1/2) (pseudo-inverse) and U an orthonormal basis of the
  columns of W Sigma_xz:  r(x) = x - W^+ U U^T W (x - mean). The covariances are those of the sample; the reference package
  shrinks Sigma_xx by default, which erases less exactly.
* INLP (Ravfogel et al. 2020): fit a probe, project out its directions, again, until it is at the majority class.
* A random subspace of the same size, the control for both: what any projection of that rank destroys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.engine.edits import Edit, Place
from pellucid.errors import InputError
from pellucid.probing.examples import known
from pellucid.probing.linear import LogisticProbe, features


@dataclass(frozen=True, eq=False)
class Erase(Edit):
    """Apply an eraser at a site: x - left (right (x - mean)). `left` [d, r], `right` [r, d], `mean` [d]."""

    left: Tensor
    right: Tensor
    mean: Tensor

    def new(self, x: Tensor, place: Place) -> Tensor:
        if x.shape[-1] != len(self.mean):
            raise InputError(
                f"the eraser for {str(place.site)!r} is of width {len(self.mean)}, the site of {x.shape[-1]}: "
                "fit it on this site"
            )
        return x - _removed(x, self.left, self.right, self.mean)


def _removed(x: Tensor, left: Tensor, right: Tensor, mean: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    left, right, mean = (t.to(x.device, wide) for t in (left, right, mean))
    return (((x.to(wide) - mean) @ right.T) @ left.T).to(x.dtype)


@dataclass
class Eraser:
    """What all erasers share once fitted: `left_` [d, rank], `right_` [rank, d], `mean_` [d]."""

    left_: Tensor = field(init=False, repr=False)
    right_: Tensor = field(init=False, repr=False)
    mean_: Tensor = field(init=False, repr=False)

    def fit(self, x: Any, labels: Any) -> Eraser:
        """`x` [n, d], `labels` [n]."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        return len(self.right_)

    def transform(self, x: Any) -> Tensor:
        """[n, d] erased."""
        x = features(x)
        return x - _removed(x, self.left_, self.right_, self.mean_)

    def edit(self, site: str | Site) -> Erase:
        """The eraser as an edit of a run, at the site whose values it was fitted on."""
        return Erase(site, self.left_, self.right_, self.mean_)


@dataclass
class Leace(Eraser):
    """The least change after which no linear predictor of the labels beats a constant.

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0], [3.0, 0.0]])
    >>> erased = Leace().fit(x, ["a", "a", "b", "b"]).transform(x)
    >>> (erased[:2].mean(0) - erased[2:].mean(0)).abs().max().item() < 1e-6
    True
    """

    def fit(self, x: Any, labels: Any) -> Leace:
        """`x` [n, d]; `labels` [n] classes, or [n, t] numbers."""
        x = features(x).double()
        z = _columns(labels, len(x))
        self.mean_ = x.mean(0)
        centred, z = x - self.mean_, z - z.mean(0)
        values, axes = torch.linalg.eigh(centred.T @ centred / len(x))
        real = values > values.max() * len(values) * torch.finfo(values.dtype).eps
        values, axes = values[real], axes[:, real]
        whiten, colour = (axes * values.rsqrt()) @ axes.T, (axes * values.sqrt()) @ axes.T
        basis, size, _ = torch.linalg.svd(whiten @ (centred.T @ z) / len(x), full_matrices=False)
        u = basis[:, size > max(float(size.max()), 1e-12) * 1e-8]
        self.left_, self.right_ = colour @ u, u.T @ whiten
        return self


@dataclass
class Inlp(Eraser):
    """Iterative nullspace projection: at most `rounds` probes, each on what those before have left, stopping where one is
    no better than the majority class by `margin` (on its own training examples)."""

    rounds: int = 20
    l2: float = 10.0
    margin: float = 0.005

    def fit(self, x: Any, labels: Any) -> Inlp:
        """`x` [n, d], `labels` [n] classes."""
        x, labels = features(x), known(labels)
        most = np.unique(labels, return_counts=True)[1].max() / len(labels)
        self.mean_ = x.mean(0)
        basis, left = x.new_zeros(0, x.shape[1]), x - self.mean_
        for _ in range(self.rounds):
            probe = LogisticProbe(l2=self.l2).fit(left, labels)
            if probe.score(left, labels) <= most + self.margin:
                break
            found = probe.weight_ - probe.weight_.mean(1, keepdim=True)  # softmax does not see what all classes share
            grown = torch.cat([basis, found.T]).double()
            _, size, rows = torch.linalg.svd(
                grown / grown.norm(dim=1, keepdim=True).clamp_min(1e-12), full_matrices=False
            )
            basis = rows[size > size.max() * 1e-5].to(x.dtype)
            left = (x - self.mean_) - ((x - self.mean_) @ basis.T) @ basis
            if len(basis) == x.shape[1]:
                break
        self.left_, self.right_ = basis.T, basis
        return self


@dataclass
class RandomSubspace(Eraser):
    """Project out `size` random orthonormal directions, around the mean."""

    size: int = 1
    seed: int = 0

    def fit(self, x: Any, labels: Any = None) -> RandomSubspace:
        """`x` [n, d] for its mean; labels are not looked at."""
        x = features(x)
        if not 0 <= self.size <= x.shape[1]:
            raise InputError(f"{self.size} directions cannot be drawn in {x.shape[1]} dimensions")
        self.mean_ = x.mean(0)
        drawn = torch.randn(
            x.shape[1], self.size, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64
        )
        self.left_ = torch.linalg.qr(drawn)[0].to(x.dtype)
        self.right_ = self.left_.T
        return self


def _columns(labels: Any, n: int) -> Tensor:
    """[n, t] numbers, or one column per class."""
    given = known(labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels)
    if len(given) != n:
        raise InputError(f"{n} examples but {len(given)} labels: expected one for each")
    if given.ndim == 2 or given.dtype.kind == "f":
        return torch.as_tensor(given, dtype=torch.float64).reshape(n, -1)
    names, index = np.unique(given, return_inverse=True)
    if len(names) < 2:
        raise InputError(f"all labels are {given[0]!r}: there is nothing to erase")
    return torch.nn.functional.one_hot(torch.as_tensor(index)).double()
