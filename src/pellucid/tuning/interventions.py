"""What is gained by setting concepts to the truth by hand, one after the other, beside the truth of another text (Koh et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from pellucid.controls import shuffled_labels
from pellucid.errors import InputError, nearest
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique
from pellucid.tuning.bottleneck import Bottleneck
from pellucid.tuning.concepts import truth_of
from pellucid.tuning.data import Encoded, Rationales
from pellucid.tuning.fit import Tuned
from pellucid.tuning.leaks import right as answered
from pellucid.tuning.leaks import seen


@technique
def interventions(
    model: Model, data: Rationales, bottleneck: Bottleneck | Tuned, *, order: str | Sequence[str] = "random", flipped: Sequence[str] = (),
    share: float = 0.5, draws: int = 3, seed: int = 0,
) -> Result:  # fmt: skip
    """The curve of interventions on a model tuned with a `bottleneck` (as learnt, or the `Tuned`): accuracy with 0, 1, ... all concepts set by hand to the truth, and to another text's truth (the control).

    `order`: "random" (`draws` orders), "uncertain" (each text's least sure concept first) or names, first ones first, which may be fewer
    than all. `flipped` are concepts whose own predictions are turned round in a `share` of the texts: a broken layer of concepts, which
    interventions have to mend. Gives `accuracy` [source, known] with `low` and `high` over texts. InputError for unknown names.

    >>> interventions(guided.model, data, guided, draws=1).main.dims
    ('source', 'known')
    """
    if isinstance(bottleneck, Tuned):
        learnt = [
            e for each in bottleneck.objectives.values() for e in each if isinstance(e, Bottleneck) and not e.shuffled
        ]
        if not learnt:
            raise InputError("this model was not tuned with a Bottleneck among the objectives")
        bottleneck = learnt[0]
    bottleneck.check(model)
    encoded = Encoded(model, data)
    names, truth = truth_of(data, bottleneck.names)
    wanted = names if isinstance(order, str) else list(order)
    if isinstance(order, str) and order not in ("random", "uncertain"):
        raise InputError(f"order={order!r}: expected 'random', 'uncertain' or names of concepts")
    for name in (*wanted, *flipped):
        if name not in names:
            raise InputError(f"the bottleneck has no concept {name!r}{nearest(name, names)}")
    logits = seen(model, bottleneck, encoded)["logits"]
    own = bottleneck.said_as(torch.from_numpy(logits)).numpy()
    rng = np.random.default_rng(seed)
    for name in flipped:
        k, rows = names.index(name), rng.permutation(len(own))[: round(share * len(own))]
        own[rows, k] = 1 - own[rows, k]
    sources = {"true": truth, "another text's": truth[shuffled_labels(np.arange(len(truth)), seed)]}
    right = np.zeros((len(sources), len(wanted) + 1, len(own)))
    times = draws if order == "random" else 1
    for _ in range(times):
        ranks = np.tile(rng.permutation(len(names)), (len(own), 1))  # [text, concept] the place at which it is set
        if order == "uncertain":
            ranks = np.abs(logits).argsort(1).argsort(1)
        elif not isinstance(order, str):
            ranks = np.tile([wanted.index(n) if n in wanted else len(names) for n in names], (len(own), 1))
        for i, source in enumerate(sources.values()):
            for k in range(len(wanted) + 1):
                put = np.where((ranks < k) & ~np.isnan(source), source, own)
                right[i, k] += answered(model, bottleneck, encoded, put) / times
    low, high = interval(np.moveaxis(right, -1, 0), seed, groups=data.groups, within=(0, 1))
    mean = right.mean(-1)
    frame = xr.Dataset(
        {
            "accuracy": (("source", "known"), mean),
            "low": (("source", "known"), low),
            "high": (("source", "known"), high),
        },
        {"source": list(sources), "known": np.arange(len(wanted) + 1)},
    )
    gain, control = mean[:, -1] - mean[:, 0]
    title = f"The truth of {len(wanted)} concepts takes accuracy from {mean[0, 0]:.2f} to {mean[0, -1]:.2f}, another text's to {mean[1, -1]:.2f}"
    if gain <= max(control, 0):
        title = (
            f"Interventions gain nothing ({gain:+.2f}, another text's {control:+.2f}): {title[0].lower()}{title[1:]}"
        )
    return Result(frame, kind="interventions", title=title)
