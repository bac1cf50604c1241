"""What can be read linearly off each layer?

On every layer a linear probe is fitted to labelled words, spans or pairs, its regularisation chosen by cross-validation
on the training part, and judged on texts (or word types) it has not seen. The majority class of the training part is
the baseline. A high score says that the label can be read there, not that the model reads it: see controls, description
length and amnesic probing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.probing.examples import Examples
from pellucid.probing.features import Features, Pool, features_of
from pellucid.probing.linear import STRENGTHS, LogisticProbe, RidgeProbe
from pellucid.probing.splits import By, Scores, groups_of, held_out
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique


@dataclass(frozen=True)
class Protocol:
    """How probes are fitted and judged: what is held out together (`by` "text", or "type" so that word types do not
    leak), the share that is, strengths to choose from by `folds`, and how many splits (`seeds`, counted from `seed`)."""

    by: By = "text"
    test: float = 0.2
    l2: float | Sequence[float] = STRENGTHS
    folds: int = 3
    seeds: int = 3
    seed: int = 0

    def splits(self, examples: Examples) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(seed, [n] held out, [n] groups) of every split."""
        groups = groups_of(examples, self.by)
        seeds = range(self.seed, self.seed + self.seeds)
        return [(seed, held_out(groups, self.test, seed), groups) for seed in seeds]


@technique
def probe(
    source: Model | Features,
    examples: Examples,
    *,
    sites: str | Sequence[str] | None = None,
    pool: Pool = "mean",
    protocol: Protocol | None = None,
) -> Result:
    """Fit a probe on every layer and judge it on what was held out.

    `source` is a model, read at `sites` (what enters the first block and leaves each, by default), or what `read` gave.
    Over `layer`, for classes: `accuracy` (mean over splits) with its 95 % interval `low` to `high` (bootstrap of whole
    texts or types), `loss` in bits per example; `majority`, the accuracy of the training part's most frequent class; and
    `l2` [seed, layer]. For numbers instead of `accuracy` and `majority`: `r2`, the share of the variance explained, of
    which the baseline is 0.

    >>> bank = Treebank.read("dev.conllu", limit=500)
    >>> probe(model, bank.tags()).accuracy
    <xarray.DataArray 'accuracy' (layer: 3)>...
    """
    protocol = protocol or Protocol()
    features = features_of(source, examples, sites, pool)
    title, per_seed = f"Probes of {examples.name}", ("seed", "layer")
    if examples.numeric:
        misses, spreads, l2 = _missed(features, examples, protocol)
        low, high = interval(lambda w: 1 - misses.at(w) / spreads.at(w), n=len(misses.tested), within=(-np.inf, 1.0))
        explained = 1 - misses.mean() / spreads.mean()
        return result("probe", title, features, r2=explained, low=low, high=high, l2=(per_seed, l2))
    right, losses, l2 = judged(features, examples, protocol)
    low, high = right.interval(within=(0.0, 1.0))
    return result("probe", title, features, accuracy=right.mean(), low=low, high=high, loss=losses.mean(),
                  majority=majority(examples, protocol), l2=(per_seed, l2))  # fmt: skip


def judged(features: Features, examples: Examples, protocol: Protocol) -> tuple[Scores, Scores, np.ndarray]:
    """Whether each held-out example is classified right, the bits its label costs, and the strengths [seed, layer]."""
    shape = (protocol.seeds, len(features.sites), len(examples))
    right, bits, l2 = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape[:2])
    rows = np.arange(len(examples))
    for layer in progress(range(shape[1]), "layers probed"):
        x = features.of(examples, layer)
        for s, (seed, held, groups) in enumerate(protocol.splits(examples)):
            fitted = LogisticProbe(protocol.l2, protocol.folds, seed).fit(
                x[~held], examples.labels[~held], groups[~held]
            )
            right[s, layer, held] = fitted.predict(x[held]) == examples.labels[held]
            logs = fitted.predict_log_proba(x[held]).numpy() / np.log(2)
            where = np.searchsorted(fitted.classes_, examples.labels[held]).clip(max=len(fitted.classes_) - 1)
            known = fitted.classes_[where] == examples.labels[held]
            bits[s, layer, held] = np.where(known, -logs[np.arange(len(where)), where], np.nan)
            bits[s, layer, rows[held][~known]] = np.log2(len(examples))  # a label never met in training
            l2[s, layer] = fitted.l2_
    groups = groups_of(examples, protocol.by)
    return Scores(right, groups), Scores(bits, groups), l2


def majority(examples: Examples, protocol: Protocol) -> float:
    """Held-out accuracy of always saying the training part's most frequent class."""
    found = []
    for _, held, _ in protocol.splits(examples):
        names, counts = np.unique(examples.labels[~held], return_counts=True)
        found.append((examples.labels[held] == names[counts.argmax()]).mean())
    return float(np.mean(found))


def _missed(features: Features, examples: Examples, protocol: Protocol) -> tuple[Scores, Scores, np.ndarray]:
    """Squared errors of each held-out number, of saying the training mean, and the strengths [seed, layer]."""
    shape = (protocol.seeds, len(features.sites), len(examples))
    missed, spread, l2 = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape[:2])
    for layer in progress(range(shape[1]), "layers probed"):
        x = features.of(examples, layer)
        for s, (seed, held, groups) in enumerate(protocol.splits(examples)):
            own, other = examples.labels[~held], examples.labels[held]
            fitted = RidgeProbe(protocol.l2, protocol.folds, seed).fit(x[~held], own, groups[~held])
            missed[s, layer, held] = (other - fitted.predict(x[held]).numpy()) ** 2
            spread[s, layer, held] = (other - own.mean()) ** 2
            l2[s, layer] = fitted.l2_
    groups = groups_of(examples, protocol.by)
    misses, spreads = Scores(missed, groups), Scores(spread, groups)
    if not bool((spreads.mean() > 0).all()):
        raise InputError(f"{examples.name!r} is the same number everywhere: there is nothing to read")
    return misses, spreads, l2


def result(kind: str, title: str, features: Features, **columns: Any) -> Result:
    """A result over layers: columns are [layer], single numbers, or (dimensions, values)."""
    made = {k: v if isinstance(v, tuple) or np.ndim(v) != 1 else ("layer", v) for k, v in columns.items()}
    coords = {"layer": features.layers, "site": ("layer", list(features.sites))}
    return Result(xr.Dataset(made, coords), kind=kind, title=f"{title} on {features.model}")


def balanced(examples: Examples, seed: int = 0) -> Examples:
    """As many examples of every class as the rarest has, drawn by `seed`, so that chance is one in the number of classes."""
    rng = np.random.default_rng(seed)
    n = min(np.bincount(examples.targets))
    rows = [rng.choice(np.flatnonzero(examples.targets == c), n, replace=False) for c in range(len(examples.classes))]
    return examples[np.sort(np.concatenate(rows))]
