"""Which heads behave alike?

The distance of two heads is how differently they look at the same tokens (Clark et al. 2019):

    d(g, h) = mean over queries of all prompts of JS(A_g[query], A_h[query])        in nats, 0 to log 2

Clark et al. sum where we take the mean. Heads are joined by average linkage (scikit-learn) into `n` groups, or into
the number between 2 and 10 with the best silhouette; they are laid out in two dimensions by classical scaling, so
that distances on the map follow d. The silhouette is compared with its control: that of the same number of groups for
distances which are permuted among the pairs of heads. Groups no better than that are an artefact of cutting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from pellucid.attention.comparing import js
from pellucid.attention.heads import chosen, distributions
from pellucid.engine.edits import Edit
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
def head_clusters(
    model: Model,
    prompts: Sequence[Any] | str,
    n: int | None = None,
    *,
    stack: str = "",
    draws: int = 20,
    edits: Sequence[Edit] = (),
    seed: int = 0,
) -> Result:
    """Groups of heads that look at the same places.

    Gives `cluster` [layer, head] (-1 where a layer has fewer heads), the map `x`, `y` [layer, head], `distance`
    [one, other] over all heads (coordinates `one_head` such as "3.1"), `silhouette` and the control `silhouette_chance`
    (mean over `draws`). InputError for n below 2 or not below the number of heads; raises as `patterns` does.

    >>> head_clusters(model, ["The capital of France is", "Water boils at"], n=4).cluster  # doctest: +SKIP
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise InputError("no prompt was given: expected a string or a list of strings")
    kind = chosen(model, stack)
    distance = distances(distributions(model, texts, kind, edits))
    counts = [model.anatomy.stacks[_stack(model, kind.stack)].blocks[i].attentions["attn"].heads for i in kind.layers]
    heads = [(row, head) for row, count in enumerate(counts) for head in range(count)]
    if n is not None and not 2 <= n < len(heads):
        raise InputError(f"{n} groups of {len(heads)} heads: expected from 2 to {len(heads) - 1}")
    candidates = [n] if n is not None else range(2, min(10, len(heads) - 1) + 1)
    if not candidates:
        raise InputError(f"{len(heads)} heads cannot be grouped: expected at least 3")
    best, labels = max(((_silhouette(distance, found), found) for found in (joined(distance, c) for c in candidates)),
                       key=lambda pair: pair[0])  # fmt: skip
    count = int(labels.max()) + 1
    rng = np.random.default_rng(seed)
    chance = np.mean([_silhouette(d, joined(d, count)) for d in (_shuffled(distance, rng) for _ in range(draws))])
    shape = len(counts), max(counts)
    grids: dict[str, Any] = {"cluster": np.full(shape, -1), "x": np.full(shape, np.nan), "y": np.full(shape, np.nan)}
    for name, values in {"cluster": labels, **dict(zip("xy", scaled(distance), strict=True))}.items():
        for place, value in zip(heads, values, strict=True):
            grids[name][place] = value
    names = [f"{kind.layers[row]}.{head}" for row, head in heads]
    data = xr.Dataset(
        {**{name: (("layer", "head"), grid) for name, grid in grids.items()}, "distance": (("one", "other"), distance),
         "silhouette": best, "silhouette_chance": float(chance)},
        {"layer": list(kind.layers), "head": range(shape[1]), "one_head": ("one", names), "other_head": ("other", names)},
    )  # fmt: skip
    return Result(data, kind="head clusters", title=f"{count} groups of heads that look alike")


def _stack(model: Model, name: str) -> int:
    return next(i for i, stack in enumerate(model.anatomy.stacks) if stack.name == name)


def distances(patterns: Sequence[np.ndarray]) -> np.ndarray:
    """[head, head] mean Jensen-Shannon divergence, from patterns [head, query, key] of several prompts."""
    total, rows = np.zeros((len(patterns[0]),) * 2), 0
    for each in patterns:
        a = torch.from_numpy(each)
        rows += a.shape[1]
        for g in range(len(a)):
            total[g] += js(a[g].expand_as(a), a).double().sum(1).numpy()
    mean = total / rows
    np.fill_diagonal(mean, 0.0)
    return (mean + mean.T) / 2


def joined(distance: np.ndarray, n: int) -> np.ndarray:
    """[head] the group of each head, numbered from the largest group on."""
    from sklearn.cluster import AgglomerativeClustering

    found = AgglomerativeClustering(n, metric="precomputed", linkage="average").fit_predict(distance)
    order = np.argsort(-np.bincount(found, minlength=n), kind="stable")
    return np.argsort(order)[found]


def _silhouette(distance: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(distance, labels, metric="precomputed"))


def _shuffled(distance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    i, j = np.triu_indices(len(distance), 1)
    made = np.zeros_like(distance)
    made[i, j] = rng.permutation(distance[i, j])
    return made + made.T


def scaled(distance: np.ndarray) -> np.ndarray:
    """[2, head] coordinates by classical scaling: the two largest eigenvectors of the centred squared distances."""
    n = len(distance)
    centre = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(-centre @ distance**2 @ centre / 2)
    made = vectors[:, -2:] * np.sqrt(np.clip(values[-2:], 0, None))
    made *= np.where(made[np.abs(made).argmax(0), range(made.shape[1])] < 0, -1, 1)  # signs are arbitrary: fix them
    return made.T[::-1]
