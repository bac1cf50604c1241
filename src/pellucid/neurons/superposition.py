"""How do more features than dimensions fit into a model, and what do they pay for it?

The toy model of Elhage et al. 2022 squeezes n features x through m dimensions and asks for them back:

    x' = max(W^T W x + b, 0),    loss = mean over x of sum_i importance_i (x_i - x'_i)^2

with W [m, n], and x_i zero with the probability `sparsity`, else uniform on [0, 1]. Dense features are stored one per
dimension, by importance; sparse ones share dimensions, in pairs (digons), triangles, pentagons. Measures, for any
vectors W_i (columns of W here; directions of neurons or of a dictionary just as well):

    norm           |W_i|                                                is the feature represented?
    interference   sum_{j != i} (W^_i . W_j)^2,  W^_i = W_i / |W_i|     does it share its direction?
    dimensionality D_i = |W_i|^2 / sum_j (W^_i . W_j)^2                 which share of a dimension is it given?

A feature alone in its dimension has D = 1, a digon's 1/2, a triangle's 2/3, a tetrahedron's 3/4, a pentagon's 2/5, and
0 what is not represented. Many instances are trained in one batch, each with its own sparsity. As the authors' notebook
does, features are drawn independently and Adam's learning rate is constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.controls import random_directions
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.neurons.directions import output_weights
from pellucid.results import Result
from pellucid.technique import technique

CHUNK = 1024  # rows of an interference matrix at once


def dimensionality(vectors: Tensor) -> Tensor:
    """D_i = |W_i|^2 / sum_j (W^_i . W_j)^2 of vectors [..., n, m]; [..., n], 0 for a vector of zeros.

    >>> dimensionality(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]))
    tensor([0.5000, 0.5000, 1.0000])
    """
    squares = vectors.pow(2).sum(-1)
    return squares / (squares + interference(vectors)).clamp_min(torch.finfo(vectors.dtype).tiny)


def interference(vectors: Tensor) -> Tensor:
    """sum_{j != i} (W^_i . W_j)^2 of vectors [..., n, m]; [..., n], in the units of |W|^2.

    >>> interference(torch.tensor([[1.0, 0.0], [-3.0, 0.0], [0.0, 2.0]]))
    tensor([9., 1., 0.])
    """
    units = torch.nn.functional.normalize(vectors, dim=-1)
    rows = [(part @ vectors.mT).pow(2).sum(-1) for part in units.split(CHUNK, -2)]
    return (torch.cat(rows, -1) - (units * vectors).sum(-1).pow(2)).clamp_min(0)


@technique
def toy_model(
    sparsity: float | Sequence[float],
    *,
    features: int = 20,
    hidden: int = 5,
    importance: Tensor | Sequence[float] | None = None,
    restarts: int = 1,
    steps: int = 5000,
    batch: int = 512,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Result:
    """Train the toy model once for every sparsity and restart, all in one batch.

    `importance` [features] weighs the features (default: all 1). Gives over `sparsity`, `restart` and `feature`
    `dimensionality`, `norm` and `interference`, `weights` with `hidden` besides and `bias`; `loss` over `sparsity` and
    `restart`, and `linear`, the loss of the best model without superposition: the most important features kept, one per
    dimension, all others answered by their mean. Restarts differ by their random start.

    >>> toy_model([0.9, 0.99], features=4, hidden=2, steps=3).dimensionality.shape
    (2, 1, 4)
    """
    at_least(1, features=features, hidden=hidden, restarts=restarts, steps=steps, batch=batch)
    at_least(0, learning_rate=learning_rate)
    given = [sparsity] if isinstance(sparsity, (int, float)) else list(sparsity)
    if not given or not all(0 <= s < 1 for s in given):
        raise InputError(f"sparsity is the chance that a feature is absent, from 0 to below 1: got {given}")
    weights = torch.ones(features) if importance is None else torch.as_tensor(importance, dtype=torch.float32)
    if weights.shape != (features,) or bool((weights < 0).any()):
        raise InputError(f"importance= must be {features} numbers of at least 0, not {list(weights.shape)}")
    absent = torch.tensor(given).repeat_interleave(restarts)[:, None, None]
    w, b = _train(absent, weights, hidden, steps, batch, learning_rate, seed)
    loss = _loss(w, b, _draw(absent, 20 * batch, features, torch.Generator().manual_seed(seed + 1)), weights)
    shape = (len(given), restarts)
    vectors = w.mT.reshape(*shape, features, hidden)
    over = ("sparsity", "restart", "feature")
    data = xr.Dataset(
        {
            "dimensionality": (over, dimensionality(vectors).numpy()),
            "norm": (over, vectors.norm(dim=-1).numpy()),
            "interference": (over, interference(vectors).numpy()),
            "weights": ((*over, "hidden"), vectors.numpy()),
            "bias": (over, b.reshape(*shape, features).numpy()),
            "loss": (over[:2], loss.reshape(shape).numpy()),
            "linear": ("sparsity", [_linear(s, weights, hidden) for s in given]),
        },
        coords={"sparsity": given, "importance": ("feature", weights.numpy())},
    )
    return Result(data, kind="toy model", title="Features in superposition")


def _draw(absent: Tensor, rows: int, features: int, generator: torch.Generator) -> Tensor:
    """x [instance, rows, features]."""
    present = torch.rand(len(absent), rows, features, generator=generator) >= absent
    return torch.rand(len(absent), rows, features, generator=generator) * present


def _loss(w: Tensor, b: Tensor, x: Tensor, importance: Tensor) -> Tensor:
    """[instance] for w [instance, hidden, features] and b [instance, 1, features]."""
    out = (x @ w.mT @ w + b).relu()
    return ((x - out).pow(2) * importance).sum(-1).mean(-1)


def _train(
    absent: Tensor, importance: Tensor, hidden: int, steps: int, batch: int, rate: float, seed: int
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n, features = len(absent), len(importance)
    w = torch.randn(n, hidden, features, generator=generator) * (2 / (hidden + features)) ** 0.5
    w, b = w.requires_grad_(), torch.zeros(n, 1, features, requires_grad=True)
    adam = torch.optim.Adam([w, b], lr=rate, fused=True)
    for _ in progress(range(steps), "steps"):
        with torch.enable_grad():
            loss = _loss(w, b, _draw(absent, batch, features, generator), importance).sum()
        w.grad, b.grad = torch.autograd.grad(loss, [w, b])
        adam.step()
    return w.detach(), b.detach()


def _linear(absent: float, importance: Tensor, hidden: int) -> float:
    """Loss where the `hidden` most important features are kept and of the others only the mean is known."""
    p = 1 - absent  # E x = p / 2, E x^2 = p / 3
    return float(importance.sort(descending=True).values[hidden:].sum() * (p / 3 - p * p / 4))


@technique
def crowding(
    model: Model, sites: str = "layers.*.mlp.neurons", *, directions: Mapping[str, Tensor] | None = None, seed: int = 0
) -> Result:
    """How crowded is the residual stream with the directions that neurons write in, and more so than at random?

    For the directions that the neurons of some sites write (at length 1), or for named `directions` [n, d] such as a
    dictionary's decoder: over `site`, `dimensionality` (its mean over directions),
    `interference` (mean over i of sum_{j != i} cos^2), `largest` (mean over i of max_{j != i} |cos|) and `dimensions`,
    the participation ratio (sum lambda)^2 / sum lambda^2 of their covariance. Each of these has a twin `random_...` for
    as many random directions: for n of them in d dimensions interference is about (n - 1) / d. SiteError or Refused where a
    model has no neurons whose output is known.
    """
    rows = directions or {str(site): output_weights(model, str(site)) for site in model.sites(sites)}
    names = list(rows)
    wrong = next((name for name in names if rows[name].ndim != 2 or not len(rows[name])), "" if names else "nothing")
    if wrong:
        raise InputError(f"{wrong!r} holds no directions: expected [n, d] for each of at least one name")
    found: dict[str, list[float]] = {}
    for kind in ("", "random_"):
        for number, name in enumerate(names):
            vectors = rows[name].detach().float()
            if kind:
                vectors = random_directions(len(vectors), vectors, seed=seed + number)
            for measure, value in _crowd(torch.nn.functional.normalize(vectors, dim=1)).items():
                found.setdefault(kind + measure, []).append(value)
    data = xr.Dataset({k: ("site", np.array(v)) for k, v in found.items()},
                      coords={"site": names, "directions": ("site", [len(v) for v in rows.values()])})  # fmt: skip
    return Result(data, kind="crowding", title=f"Directions written in {model.name}")


def _crowd(units: Tensor) -> dict[str, float]:
    """The measures of directions of length 1, [n, d]."""
    largest = []
    for start in range(0, len(units), CHUNK):
        cosines = (units[start : start + CHUNK] @ units.T).abs()
        cosines.diagonal(start).zero_()
        largest.append(cosines.amax(1))
    spread = torch.linalg.eigvalsh((units.T @ units).double())
    return {
        "dimensionality": float(dimensionality(units).mean()),
        "interference": float(interference(units).mean()),
        "largest": float(torch.cat(largest).mean()),
        "dimensions": float(spread.sum() ** 2 / spread.pow(2).sum()),
    }
