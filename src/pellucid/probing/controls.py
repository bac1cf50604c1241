"""Is it the representation that knows, or does the probe learn it?

* A control task gives every word type one label at random, drawn with the frequencies of the real labels (Hewitt and
  Liang 2019). It can only be memorised; a probe's *selectivity* is its accuracy minus that on the control task. Texts are
  held out, not types: on types never met a control task is chance by construction.
* The same probe on a model of the same architecture with random weights says what the architecture alone makes readable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pellucid.controls import shuffled
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.probing.examples import Examples
from pellucid.probing.features import Features, Pool, features_of, read
from pellucid.probing.probe import Protocol, judged, majority, result
from pellucid.probing.splits import Scores
from pellucid.results import Result
from pellucid.technique import technique


def control_task(examples: Examples, seed: int = 0) -> Examples:
    """The same places, each word type with one random label, drawn with the frequencies of the real ones.

    >>> from pellucid.probing import Spans
    >>> control = control_task(Examples(Spans.words(["a b a b a"]), ["x", "y", "x", "y", "z"]))
    >>> len(set(control.labels[::2])), len(set(control.labels[1::2]))
    (1, 1)
    """
    types, each = np.unique(examples.types, return_inverse=True)
    given = np.random.default_rng(seed).choice(examples.labels, len(types))
    if len(set(given)) < 2:
        raise InputError(f"the {len(types)} word types of {examples.name!r} are too few for a control task")
    return examples.relabelled(given[each], f"control of {examples.name}")


@technique
def selectivity(
    source: Model | Features,
    examples: Examples,
    *,
    sites: str | Sequence[str] | None = None,
    pool: Pool = "mean",
    protocol: Protocol | None = None,
) -> Result:
    """Probe the labels and a control task on every layer, in the same way on the same held-out texts.

    Over `layer`: `selectivity` with its 95 % interval `low` to `high` (bootstrap of texts), `accuracy`, `control`, and
    `majority`. Every split draws a control task of its own. InputError where the protocol holds out types.

    >>> selectivity(model, bank.tags()).selectivity
    <xarray.DataArray 'selectivity' (layer: 3)>...
    """
    protocol = protocol or Protocol()
    if protocol.by != "text":
        raise InputError("a control task cannot be learned for word types that are held out: use Protocol(by='text')")
    features = features_of(source, examples, sites, pool)
    right, _, _ = judged(features, examples, protocol)
    placebo = []
    for s in range(protocol.seeds):
        one = replace(protocol, seed=protocol.seed + s, seeds=1)
        placebo.append(judged(features, control_task(examples, one.seed), one)[0].values)
    control = Scores(np.concatenate(placebo), right.groups)
    difference = Scores(right.values - control.values, right.groups)
    low, high = difference.interval()
    return result("selectivity", f"Selectivity for {examples.name}", features, selectivity=difference.mean(), low=low,
                  high=high, accuracy=right.mean(), control=control.mean(), majority=majority(examples, protocol))  # fmt: skip


def random_twin(model: Model, seed: int = 0, *, keep_embeddings: bool = False) -> Model:
    """A copy of the model with the entries of every weight matrix shuffled: the same distributions, nothing learned.

    `keep_embeddings` leaves the token embeddings (and an unembedding tied to them): what is then readable beyond them
    the random layers have mixed in from the context.
    """
    embeddings: Any = model.module.get_input_embeddings()  # type: ignore[operator]
    kept = set(map(id, embeddings.parameters())) if keep_embeddings else set()
    return shuffled(model, seed, [name for name, p in model.module.named_parameters() if id(p) in kept])


@technique
def beside_random(
    model: Model,
    examples: Examples,
    *,
    sites: str | Sequence[str] | None = None,
    pool: Pool = "mean",
    protocol: Protocol | None = None,
    keep_embeddings: bool = False,
) -> Result:
    """Probe a model and its random twin: `gain` [layer], the difference in accuracy, with its interval, and both.

    >>> beside_random(model, bank.tags()).gain
    <xarray.DataArray 'gain' (layer: 3)>...
    """
    protocol = protocol or Protocol()
    features = read(model, examples, sites=sites, pool=pool)
    twin = random_twin(model, protocol.seed, keep_embeddings=keep_embeddings)
    own, other = (
        judged(each, examples, protocol)[0] for each in (features, read(twin, examples, sites=sites, pool=pool))
    )
    difference = Scores(own.values - other.values, own.groups)
    low, high = difference.interval()
    title = f"Probes of {examples.name} beside random weights"
    return result("beside random", title, features, gain=difference.mean(), low=low, high=high, accuracy=own.mean(),
                  random=other.mean(), majority=majority(examples, protocol))  # fmt: skip
