"""From which layer on is a property of words or pairs of words there?

Edge probing (Tenney, Das and Pavlick 2019). A probe reads a mix of layers, h = gamma * sum_l softmax(a)_l h_l, a and gamma
learned with it; the probe is a network with one hidden layer over the spans' mixed vectors. From the probe on all layers,
the centre of gravity sum_l l softmax(a)_l. From the probes P(0), ..., P(L) that may mix layers 0 to l only, the score each
layer adds, D(l) = score(P(l)) - score(P(l-1)), and the

    expected layer = sum_{l>=1} l D(l) / sum_{l>=1} D(l)

at which an example is first resolved; layer 0 is what enters the first block, which any probe may use. The score is
accuracy: the micro-averaged F1 of labels of which exactly one is right. All L + 1 probes are trained at once. Each axis
of each layer is standardised before layers are mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.probing.examples import Examples
from pellucid.probing.features import Features, Pool, features_of
from pellucid.probing.linear import standardised
from pellucid.probing.probe import result
from pellucid.probing.splits import Scores
from pellucid.results import Result
from pellucid.statistics import interval, weights
from pellucid.technique import technique
from pellucid.training import draws, linear, train


@dataclass(frozen=True)
class Training:
    """How the probes are trained: width of the hidden layer, epochs of Adam, batch, learning rate (which falls to zero),
    dropout of the mixed vectors."""

    hidden: int = 128
    epochs: int = 12
    batch: int = 128
    learning_rate: float = 3e-3
    dropout: float = 0.2


@technique
def edge_probing(
    source: Model | Features,
    examples: Examples,
    *,
    sites: str | Sequence[str] | None = None,
    pool: Pool = "mean",
    training: Training | None = None,
    test: float = 0.2,
    seeds: int = 2,
    seed: int = 0,
) -> Result:
    """Train the cumulative mixing probes and say where the property is resolved.

    `expected_layer` with its 95 % interval `expected_low` to `expected_high` (bootstrap of the test texts), its
    `expected_draws` (of two properties of the same spans the same texts are drawn, so that they can be subtracted), and
    `centre_of_gravity`; over `layer`: the cumulative `accuracy` with `low` and `high`, what each layer `adds`, and the
    `weight` of each in the mix of all. Means over `seeds` splits and trainings. Layers are numbered from 0, the first
    site that was read.

    >>> edge_probing(model, bank.relations())["expected_layer"]
    <xarray.DataArray 'expected_layer' ()>...
    """
    training = training or Training()
    features = features_of(source, examples, sites, pool)
    layers = len(features.sites)
    if layers < 2:
        raise InputError(f"{layers} layer was read: cumulative probes need at least two")
    scaled = standardised(features.values)
    right = np.full((seeds, layers, len(examples)), np.nan)
    mixed, texts = np.zeros((seeds, layers)), len(examples.spans.texts)
    for s in range(seeds):
        chosen = np.random.default_rng(seed + s).permutation(texts)[: round(test * texts)]
        held = np.isin(examples.texts, chosen)  # the same texts whatever is asked of them
        if held.all() or not held.any():
            raise InputError(f"{texts} texts cannot be split: a share of {test} for testing leaves one side empty")
        parts = [np.flatnonzero(m) for m in (~held, held)]
        right[s, :, parts[1]], mixed[s] = _train(scaled, examples, parts, training, seed + s)
    scores = Scores(right, examples.texts)
    low, high = scores.interval(seed, within=(0.0, 1.0))
    ends = interval(lambda w: _expected(scores.at(w)), seed, n=len(scores.tested), within=(0.0, layers - 1.0))
    resolved = _expected(scores.at(weights(len(scores.tested), seed=seed)))
    return result(
        "edge probing", f"Edge probing of {examples.name}", features, accuracy=scores.mean(), low=low, high=high,
        adds=np.diff(scores.mean(), prepend=np.nan), weight=mixed.mean(0), expected_layer=_expected(scores.mean()[None])[0],
        expected_low=ends[0], expected_high=ends[1], expected_draws=("draw", resolved),
        centre_of_gravity=float(mixed.mean(0) @ np.arange(layers)),
    )  # fmt: skip


def _expected(scores: np.ndarray) -> np.ndarray:
    """[draw] from cumulative scores [draw, layer]. NaN where the layers add nothing."""
    adds = np.diff(scores, axis=1)
    total = adds.sum(1)
    return np.where(total > 1e-9, adds @ np.arange(1, scores.shape[1]) / np.where(total > 1e-9, total, 1), np.nan)


class _Probes:
    """One probe per depth p, side by side: mix -> hidden -> classes. The probe at depth p mixes layers 0 to p."""

    def __init__(self, layers: int, d: int, spans: int, k: int, training: Training, generator: torch.Generator) -> None:
        def drawn(*shape: int) -> Tensor:  # all depths begin alike: they differ by what they may read, not by luck
            return (torch.randn(shape, generator=generator) * shape[0] ** -0.5).repeat(layers, 1, 1)

        self.dropout = training.dropout
        self.allowed = torch.ones(layers, layers).tril().bool()
        self.parameters = [
            torch.zeros(layers, layers), torch.ones(layers, 1, 1),
            drawn(spans * d, training.hidden), torch.zeros(layers, 1, training.hidden),
            drawn(training.hidden, k), torch.zeros(layers, 1, k),
        ]  # fmt: skip

    def mix(self) -> Tensor:
        """[p, l] the weights of the layers."""
        return self.parameters[0].masked_fill(~self.allowed, float("-inf")).softmax(1)

    def logits(self, x: Tensor, training: bool) -> Tensor:
        """[p, b, k] of spans' vectors x [l, b, span, d]."""
        _, gamma, inner, bias, outer, last = self.parameters
        mixed = gamma * (self.mix() @ x.flatten(1)).view(len(inner), x.shape[1], -1)
        if training:
            mixed = mixed * torch.empty(mixed.shape[1:]).bernoulli_(1 - self.dropout) / (1 - self.dropout)
        return torch.baddbmm(last, torch.baddbmm(bias, mixed, inner).relu(), outer)


def _train(
    values: Tensor, examples: Examples, parts: list[np.ndarray], training: Training, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """([test example, layer] whether each probe is right, [layer] weights in the mix of all)."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.as_tensor(
        examples.first[:, None] if examples.second is None else np.stack([examples.first, examples.second], 1)
    )
    y = torch.as_tensor(examples.targets)
    probes = _Probes(len(values), values.shape[2], places.shape[1], len(examples.classes), training, generator)
    own, test = map(torch.as_tensor, parts)

    def loss(drawn: Tensor, step: int) -> Tensor:
        rows = own[drawn]
        logs = probes.logits(values[:, places[rows]], True).log_softmax(2)
        return -logs.gather(2, y[rows].expand(len(values), -1)[..., None]).mean((1, 2)).sum()

    train(
        {str(i): p for i, p in enumerate(probes.parameters)},
        draws(len(own), training.batch, training.epochs, seed),
        loss,
        partial(torch.optim.Adam, lr=training.learning_rate),
        schedule=linear,
        seed=seed,
        what="edge probes",
    )
    with torch.no_grad():
        found = [probes.logits(values[:, places[r]], False).argmax(2) == y[r] for r in test.split(1024)]
    return torch.cat(found, 1).T.float().numpy(), probes.mix()[-1].detach().numpy()
