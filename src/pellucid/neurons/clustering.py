"""Which units belong together: because they fire together, or because they read or write the same directions?

    by activation   correlation of two units over tokens
    by weights      cosine of what two neurons read, or of what they write

Both are products of vectors of length 1 (activations are centred first), so one distance, 1 - product, serves all methods:
agglomerative clustering with average linkage, spectral clustering of the products above 0, and k-means on the sphere, all of
scikit-learn. The first two need every pair of units: beyond `limit` units they are fitted on that many drawn at random, and
the others join the cluster whose mean is nearest; k-means goes on to mini-batches. The result says how many were fitted.

A clustering always finds clusters. Two numbers say whether they are there, each beside its control, the same for units whose
features are shuffled one by one (no two units then have anything in common):

    silhouette   (b - a) / max(a, b), with a the mean distance to the own and b to the nearest other cluster
    stability    adjusted Rand index of the clusterings on two halves of the features (tokens, or dimensions)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr

from pellucid.errors import InputError, one_of
from pellucid.model import Model
from pellucid.neurons.directions import input_weights, output_weights
from pellucid.neurons.harvest import Harvest
from pellucid.results import Result
from pellucid.technique import technique

Method = Literal["agglomerative", "spectral", "kmeans"]
NUMBERS = (2, 4, 8, 16, 32, 64)
SEEN = 2000  # units the silhouette is measured on
BATCHED = 10_000  # units from which on k-means works in mini-batches


@dataclass(frozen=True, eq=False)
class UnitVectors:
    """Units as vectors: `values` [unit, feature] by their `names`; `centred` compares them by correlation, else by cosine.

    >>> made = UnitVectors(np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 7.0], [3.0, 2.0, 1.0]]), ("a", "b", "c"), centred=True)
    >>> made.products().round(1).tolist()
    [[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]
    """

    values: np.ndarray
    names: tuple[str, ...]
    centred: bool = False
    source: str = "features"

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.values) != len(self.names):
            raise InputError(
                f"{len(self.names)} units have features {list(self.values.shape)}: expected [unit, feature]"
            )

    def __repr__(self) -> str:
        return f"<UnitVectors of {len(self.names)} units by {self.source}: {list(self.values.shape)}>"

    @classmethod
    @technique
    def activations(cls, harvest: Harvest, sites: Sequence[str] | None = None) -> UnitVectors:
        """The activations of every unit of these sites (by default all) at the harvest's uniform sample of tokens."""
        sites = harvest.names if sites is None else sites
        values = torch.cat([harvest.sample(site)[1].T for site in sites])
        names = [f"{site}.{i}" for site in sites for i in range(harvest.tally(site).top.shape[0])]
        return cls(values.numpy(), tuple(names), True, "activations")

    @classmethod
    @technique
    def weights(
        cls, model: Model, sites: str | Sequence[str], side: Literal["input", "output"] = "output"
    ) -> UnitVectors:
        """What the neurons of these sites write, or what they read (of a gated MLP both rows, each of length 1)."""
        if side not in ("input", "output"):
            raise InputError(f"side={side!r}: expected 'input' or 'output'")
        found, names = [], []
        for site in (
            str(s) for pattern in ([sites] if isinstance(sites, str) else sites) for s in model.sites(pattern)
        ):
            rows = output_weights(model, site)[None] if side == "output" else input_weights(model, site)
            found.append(torch.nn.functional.normalize(rows.float(), dim=-1).transpose(0, 1).flatten(1))
            names += [f"{site}.{i}" for i in range(len(found[-1]))]
        values = torch.cat(found).detach().cpu().numpy()
        return cls(values, tuple(names), False, f"{side} weights")

    def normalised(self, columns: np.ndarray | None = None) -> np.ndarray:
        """[unit, feature] of length 1 (0 for a unit that never varies), over some features."""
        x = self.values if columns is None else self.values[:, columns]
        x = x.astype(np.float32)
        x = x - x.mean(1, keepdims=True) if self.centred else x
        length = np.linalg.norm(x, axis=1, keepdims=True)
        scale = np.linalg.norm(self.values.astype(np.float32), axis=1, keepdims=True)
        return np.where(length > 1e-6 * scale, x / np.maximum(length, 1e-30), 0.0).astype(np.float32)

    def products(self) -> np.ndarray:
        """[unit, unit] correlations or cosines."""
        vectors = self.normalised()
        return vectors @ vectors.T

    def shuffled(self, rng: np.random.Generator) -> UnitVectors:
        """Each unit's features in an order of its own: nothing in common is left."""
        values = rng.permuted(self.values, axis=1)
        return UnitVectors(values, self.names, self.centred, self.source)


@dataclass(eq=False)
class UnitClusters:
    """A clustering in scikit-learn's manner: `fit` sets `labels_` [unit], numbered from the largest cluster on (-1 for units
    without any variation), `n_`, `silhouette_` and `fitted_`, the number of units the method itself saw.

    `n` None takes the number among 2, 4, 8, ... 64 with the best silhouette.
    """

    n: int | None = None
    method: Method = "agglomerative"
    limit: int = 4000
    seed: int = 0

    labels_: np.ndarray | None = field(default=None, init=False, repr=False)
    n_: int = field(default=0, init=False)
    silhouette_: float = field(default=float("nan"), init=False)
    fitted_: int = field(default=0, init=False)

    @technique
    def fit(self, vectors: Any) -> UnitClusters:
        """Cluster vectors [unit, feature] of length 1. InputError for an unknown method or as many clusters as units."""
        one_of(self.method, Method, "there is no method ")
        x = np.asarray(vectors, dtype=np.float32)
        if x.ndim != 2 or not np.isfinite(x).all():
            raise InputError(f"these vectors are {list(x.shape)}: expected finite numbers [unit, feature]")
        alive = np.abs(x).sum(1) > 0
        if alive.sum() < 3 or (self.n is not None and not 2 <= self.n < alive.sum()):
            wanted = "a number" if self.n is None else self.n
            raise InputError(
                f"{wanted} of clusters for {alive.sum()} units that vary: expected 2 or more, and fewer than units"
            )
        rng = np.random.default_rng(self.seed)
        seen = np.sort(rng.permutation(int(alive.sum()))[: self._most])
        self.fitted_ = len(seen)
        candidates = [self.n] if self.n is not None else [n for n in NUMBERS if n < alive.sum()]
        best: tuple[float, np.ndarray] | None = None
        for n in candidates:
            labels = self._labels(x[alive], seen, n)
            score = silhouette(x[alive], labels, self.seed)
            if best is None or score > best[0]:
                best = score, labels
        assert best is not None
        self.silhouette_, found = best
        order = np.argsort(-np.bincount(found), kind="stable")
        self.labels_ = np.full(len(x), -1)
        self.labels_[alive] = np.argsort(order)[found]
        self.n_ = len(order)
        return self

    @property
    def _most(self) -> int | None:
        return None if self.method == "kmeans" else self.limit

    def _labels(self, x: np.ndarray, seen: np.ndarray, n: int) -> np.ndarray:
        labels = self._clustered(x[seen], min(n, len(seen) - 1))
        if len(seen) == len(x):
            return labels
        means = np.stack([x[seen][labels == c].mean(0) for c in range(labels.max() + 1)])
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-30)
        every = np.asarray((x @ means.T).argmax(1))
        every[seen] = labels
        return every

    def _clustered(self, x: np.ndarray, n: int) -> np.ndarray:
        from sklearn.cluster import AgglomerativeClustering, KMeans, MiniBatchKMeans, SpectralClustering

        if self.method == "kmeans":
            kind = KMeans if len(x) <= BATCHED else MiniBatchKMeans
            return _dense(kind(n, n_init=3, random_state=self.seed).fit_predict(x))
        products = np.clip(x @ x.T, -1, 1)
        if self.method == "spectral":
            affinity = np.clip(products, 0, None) + 1e-6  # never in pieces
            made = SpectralClustering(n, affinity="precomputed", assign_labels="cluster_qr", random_state=self.seed)
            return _dense(made.fit_predict(affinity))
        return _dense(AgglomerativeClustering(n, metric="precomputed", linkage="average").fit_predict(1 - products))


def _dense(labels: np.ndarray) -> np.ndarray:
    """The same clusters, numbered without gaps."""
    return np.unique(labels, return_inverse=True)[1]


def silhouette(vectors: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """The mean silhouette of at most SEEN units drawn at random; NaN where they are all of one cluster, or all alone."""
    from sklearn.metrics import silhouette_score

    chosen = np.random.default_rng(seed).permutation(len(vectors))[:SEEN]
    x, y = vectors[chosen], labels[chosen]
    if not 2 <= len(np.unique(y)) < len(y):
        return float("nan")
    distance = 1 - np.clip(x @ x.T, -1, 1)
    np.fill_diagonal(distance, 0)
    return float(silhouette_score(distance, y, metric="precomputed"))


@technique
def unit_clusters(
    features: UnitVectors, clusters: UnitClusters | None = None, *, draws: int = 5, seed: int = 0
) -> Result:
    """Cluster units and say whether the clusters are there.

    Gives over `unit` (by name): `cluster` (-1: never varies) and `product` with the mean of its own cluster; over
    `cluster_number`: `size` and `centre`, the unit nearest to the mean; `silhouette` and `stability` with their controls
    `silhouette_chance` and `stability_chance` (means over `draws`) and `stability_spread`, its standard deviation.
    InputError as `UnitClusters.fit`.

    >>> unit_clusters(UnitVectors.activations(found), UnitClusters(4, "kmeans"))
    4 clusters of units by activations
    unit clusters: cluster, product, size, ... over unit 64, cluster_number 4...
    """
    from sklearn.metrics import adjusted_rand_score

    if draws < 1:
        raise InputError(f"draws={draws}: expected at least 1")
    clusters = clusters or UnitClusters()
    vectors = features.normalised()
    clusters.fit(vectors)
    labels = clusters.labels_
    assert labels is not None
    rng = np.random.default_rng(seed)

    def again(source: UnitVectors, columns: np.ndarray | None = None) -> UnitClusters:
        made = UnitClusters(clusters.n_, clusters.method, clusters.limit, clusters.seed)
        return made.fit(source.normalised(columns))

    def halves(source: UnitVectors) -> float:
        columns = rng.permutation(source.values.shape[1])
        one, other = (again(source, half).labels_ for half in np.array_split(columns, 2))
        return float(adjusted_rand_score(one, other))

    null = [features.shuffled(rng) for _ in range(draws)]
    stable = [halves(features) for _ in range(draws)]
    means = np.stack([vectors[labels == c].mean(0) for c in range(clusters.n_)])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-30)
    product = vectors @ means.T
    own = np.where(labels >= 0, product[np.arange(len(labels)), labels], np.nan)
    centres = [features.names[int(np.where(labels == c, product[:, c], -2).argmax())] for c in range(clusters.n_)]
    data = xr.Dataset(
        {
            "cluster": ("unit", labels),
            "product": ("unit", own),
            "size": ("cluster_number", np.bincount(labels[labels >= 0], minlength=clusters.n_)),
            "centre": ("cluster_number", np.array(centres, dtype=object)),
            "silhouette": clusters.silhouette_,
            "silhouette_chance": float(np.mean([again(f).silhouette_ for f in null])),
            "stability": float(np.mean(stable)),
            "stability_spread": float(np.std(stable, ddof=1)) if draws > 1 else float("nan"),
            "stability_chance": float(np.mean([halves(f) for f in null])),
        },
        {"unit": list(features.names), "cluster_number": range(clusters.n_)},
        {"method": clusters.method, "fitted": clusters.fitted_, "units": len(labels)},
    )
    return Result(data, kind="unit clusters", title=f"{clusters.n_} clusters of units by {features.source}")
