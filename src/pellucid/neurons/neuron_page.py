"""All that is known of one unit on one page: the texts that excite it, how often it is how active, what it writes, and
which units are like it.

    contexts     the tokens around its largest activations, and around samples from each quantile bin of its activations
    histogram    over all tokens of the harvest: exact among the largest, beneath them as in the uniform sample
    words        the tokens its output weights raise and lower most (`effects`)
    neighbours   cosine of input weights (same layer) and of output weights, correlation of activations

Texts of large activation alone mislead (they look alike for a neuron that has several uses, and for none): the samples from
lower bins are the check, and stand beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional as F

from pellucid.errors import PellucidError, at_least
from pellucid.model import Model
from pellucid.neurons.contexts import activations, apart
from pellucid.neurons.directions import input_weights, logit_effects, output_weights
from pellucid.neurons.harvest import Harvest, Moment
from pellucid.results import Result
from pellucid.tasks.tokens import texts
from pellucid.technique import technique

BINS = (0.0, 0.5, 0.9, 0.99, 1.0)


@technique
def neuron_page(
    model: Model,
    harvest: Harvest,
    unit: str,
    *,
    contexts: int = 8,
    each: int = 3,
    window: tuple[int, int] = (20, 8),
    top: int = 10,
    neighbours: int = 5,
) -> Result:
    """The page of one harvested unit, `layers.3.mlp.neurons.17` say.

    Gives over `context` x `offset` (positions relative to the maximum, `window` before and after) `activation` and `token`,
    NaN and "" past the text's ends; over `context` its `peak`, `prompt`, `position` and `group`: "top" for the first
    `contexts` (one for each text), then at most `each` from every quantile bin, highest first. Over `bin` `count`, with its
    ends `low` and `high`. Over `rank` `raised` (`raised_token`) and `lowered` (`lowered_token`), where the unit has output
    weights the head reads. Over `relation` x `near` `similarity` and `neighbour`. And `mean`, `std`, `positive` (the share
    of tokens), `tokens`. InputError for a unit that was not harvested or another model's harvest.

    >>> neuron_page(model, found, "layers.3.mlp.neurons.17").save_html("neuron.html")
    PosixPath('neuron.html')
    """
    at_least(0, each=each, window=min(window))
    at_least(1, contexts=contexts, top=top, neighbours=neighbours)
    name, n = harvest.find(unit)
    groups = [("top", apart(harvest.top(unit))[:contexts])]
    bins = harvest.binned(unit, BINS, each)
    for low, high, moments in reversed(list(zip(BINS, BINS[1:], bins, strict=False))):
        groups.append((f"{100 * low:g} to {100 * high:g} %", moments))
    made: dict[str, Any] = _contexts(model, harvest, unit, groups, window)
    edges, counts = harvest.histogram(unit)
    made["count"] = ("bin", counts.numpy())
    tally = harvest.tally(name)
    made |= {
        "mean": float(harvest.mean(name)[n]),
        "std": float(harvest.std(name)[n]),
        "positive": float(harvest.positive(name)[n]),
    }
    made |= {"tokens": harvest.count, "largest": float(tally.top[n, 0])}
    made |= _words(model, harvest, unit, top) | _neighbours(model, harvest, unit, neighbours)
    coords = {
        "offset": range(-window[0], window[1] + 1),
        "low": ("bin", edges[:-1].numpy()),
        "high": ("bin", edges[1:].numpy()),
    }
    data = xr.Dataset(made, coords=coords, attrs={"unit": unit})
    return Result(data, kind="neuron page", title=f"What excites {unit}")


def _contexts(
    model: Model, harvest: Harvest, unit: str, groups: Sequence[tuple[str, Sequence[Moment]]], window: tuple[int, int]
) -> dict[str, Any]:
    moments = [moment for _, each in groups for moment in each]
    rows = activations(model, harvest, [unit], [moment.prompt for moment in moments])
    width = sum(window) + 1
    values, ids = np.full((len(moments), width), np.nan, dtype=np.float32), np.full((len(moments), width), -1)
    for i, moment in enumerate(moments):
        row, tokens = rows[moment.prompt][:, 0].numpy(), harvest.tokens(moment.prompt)
        first, last = max(0, moment.position - window[0]), min(len(row), moment.position + window[1] + 1)
        at = first - moment.position + window[0]
        values[i, at : at + last - first], ids[i, at : at + last - first] = row[first:last], tokens[first:last]
    words = texts(model.tokenizer, np.maximum(ids, 0))
    words[ids < 0] = ""
    return {
        "activation": (("context", "offset"), values),
        "token": (("context", "offset"), words),
        "peak": ("context", np.array([m.value for m in moments], dtype=np.float32)),
        "prompt": ("context", np.array([m.prompt for m in moments])),
        "position": ("context", np.array([m.position for m in moments])),
        "group": ("context", np.array([group for group, each in groups for _ in each], dtype=object)),
    }


def _words(model: Model, harvest: Harvest, unit: str, top: int) -> dict[str, Any]:
    """What it raises and lowers; nothing where its output weights cannot be read through the head."""
    name, _ = harvest.find(unit)
    if harvest.readers[name].read is not None:
        return {}
    try:
        found = logit_effects(model, unit, top=top).data.isel(unit=0)
    except PellucidError:
        return {}
    return {key: ("rank", found[key].values) for key in ("raised", "raised_token", "lowered", "lowered_token")}


# ---- which units are like it


def _neighbours(model: Model, harvest: Harvest, unit: str, count: int) -> dict[str, Any]:
    found = [(relation, _best(likeness, unit, count)) for relation, likeness in _likenesses(model, harvest, unit)]
    found = [(relation, best) for relation, best in found if best]
    width = max((len(best) for _, best in found), default=0)
    values, names = (
        np.full((len(found), width), np.nan, dtype=np.float32),
        np.full((len(found), width), "", dtype=object),
    )
    for i, (_, best) in enumerate(found):
        for j, (other, value) in enumerate(best):
            values[i, j], names[i, j] = value, other
    made = {"similarity": (("relation", "near"), values), "neighbour": (("relation", "near"), names)}
    return (
        made | {"relation": ("relation", np.array([relation for relation, _ in found], dtype=object))} if found else {}
    )


def _likenesses(model: Model, harvest: Harvest, unit: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """By relation the likeness [unit] to all units of each site."""
    name, n = harvest.find(unit)
    plain = [
        other for other in harvest.names if harvest.readers[other].read is None and len(harvest.tallies[other].top) > 1
    ]
    if name in plain:
        try:
            read = F.normalize(input_weights(model, name), dim=2)
            yield "input weights", {name: torch.einsum("rnd,rd->n", read, read[:, n]) / len(read)}
        except PellucidError:
            pass
        try:
            own = F.normalize(output_weights(model, name)[n], dim=0)
            yield "output weights", {other: F.normalize(output_weights(model, other), dim=1) @ own for other in plain}
        except PellucidError:
            pass
    yield "activation", {other: harvest.coactivation(unit, other).nan_to_num(-1.0) for other in harvest.names}


def _best(likeness: dict[str, Tensor], unit: str, count: int) -> list[tuple[str, float]]:
    rows = []
    for name, values in likeness.items():
        top = values.topk(min(count + 1, len(values)))
        rows += [(f"{name}.{i}", value) for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return sorted((row for row in rows if row[0] != unit), key=lambda row: -row[1])[:count]
