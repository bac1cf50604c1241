"""Units of a harvest as Neuronpedia takes them, so that what was found here can be looked at there.

One JSON file for each batch of at most 128 units, with the fields of its upload (`upload-batch`, client 1.2.1): of every
unit its index, density (the share of tokens on which it is active), texts with activations token by token, by quantile bin,
the words it raises and lowers most, and descriptions that were made. Nothing is sent anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pellucid.errors import InputError, PellucidError, at_least
from pellucid.model import Model
from pellucid.neurons.contexts import activations, apart
from pellucid.neurons.dictionaries.dictionary import Dictionary
from pellucid.neurons.directions import logit_effects
from pellucid.neurons.harvest import Harvest, Moment
from pellucid.neurons.naming import Description
from pellucid.tasks.tokens import texts

MOST = 128  # units in a file
BINS = (0.5, 0.9, 0.99, 1.0)  # quantiles of a unit's activations; beneath the first nothing is shown


def export_neuronpedia(
    model: Model,
    harvest: Harvest,
    units: Sequence[str],
    path: str | Path,
    *,
    name: str,
    source: str,
    contexts: int = 20,
    each: int = 5,
    window: tuple[int, int] = (64, 64),
    top: int = 10,
    descriptions: Mapping[str, Description | str] | None = None,
) -> list[Path]:
    """Write units of one site of a harvest as files batch-0.json, batch-1.json ... of Neuronpedia; returns their paths.

    `name` and `source` are those of the model and of the set of units there ("gpt2-small", "6-res-jb"). Of every unit:
    `contexts` texts around its largest activations, one a prompt, and at most `each` from every bin between two quantiles,
    cut to `window` tokens before and after; `top` words raised and lowered, where the head can read what it writes; and the
    unit's entry in `descriptions`.
    InputError for units of several sites, or that were not harvested, or another model's harvest.

    >>> export_neuronpedia(model, found, ["layers.3.mlp.neurons.17"], "out", name="gpt2", source="3-mlp")
    [PosixPath('out/batch-0.json')]
    """
    at_least(1, contexts=contexts, top=top)
    at_least(0, each=each, window=min(window))
    harvest.check(model)
    found = [harvest.find(unit) for unit in ([units] if isinstance(units, str) else units)]
    if not found:
        raise InputError("no unit was named: expected some, such as layers.3.mlp.neurons.17")
    if len({site for site, _ in found}) != 1:
        raise InputError(
            f"these units are of {len({site for site, _ in found})} sites: a source there is one site, name units of one"
        )
    said = descriptions or {}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    site = found[0][0]
    for start in range(0, len(found), MOST):
        numbers = [n for _, n in found[start : start + MOST]]
        names = [f"{site}.{n}" for n in numbers]
        shown = {unit: _moments(harvest, unit, contexts, each) for unit in names}
        every = {m.prompt for groups in shown.values() for _, moments in groups for m in moments}
        values = activations(model, harvest, names, every)
        words = _words(model, harvest, site, numbers, top)
        features = [
            {
                "index": n,
                "density": float(harvest.positive(site)[n]),
                "activations": [
                    _activation(model, harvest, moment, values[moment.prompt][:, u], window, group)
                    for group, moments in shown[unit]
                    for moment in moments
                ],
                "explanations": [{"text": str(said[unit]), "methodName": "pellucid", "modelName": ""}]
                if unit in said
                else [],
                "topLogits": words[0][u] if words else None,
                "bottomLogits": words[1][u] if words else None,
            }
            for u, (unit, n) in enumerate(zip(names, numbers, strict=True))
        ]
        file = folder / f"batch-{start // MOST}.json"
        file.write_text(json.dumps({"modelId": name, "source": source, "features": features}, ensure_ascii=False))
        written.append(file)
    return written


Group = Mapping[str, float]  # the range of activations that a text stands for, and the share of tokens in it


def _moments(harvest: Harvest, unit: str, contexts: int, each: int) -> list[tuple[Group, list[Moment]]]:
    site, n = harvest.find(unit)
    top = apart(harvest.top(unit))[:contexts]
    groups = [(_group(top[-1].value, top[0].value, len(top) / harvest.count), top)] if top else []
    ends = harvest.quantiles(site, BINS)[:, n].tolist()
    bins = harvest.binned(unit, BINS, each)
    for i in reversed(range(len(bins))):
        if ends[i + 1] > 0:  # a bin in which it is silent shows nothing
            groups.append((_group(ends[i], ends[i + 1], BINS[i + 1] - BINS[i]), bins[i]))
    return groups


def _group(low: float, high: float, share: float) -> Group:
    return {"quantileMin": low, "quantileMax": high, "quantileFraction": share}


def _activation(
    model: Model, harvest: Harvest, moment: Moment, values: torch.Tensor, window: tuple[int, int], group: Group
) -> dict[str, Any]:
    cut = slice(max(0, moment.position - window[0]), moment.position + window[1] + 1)
    tokens = texts(model.tokenizer, torch.tensor(harvest.tokens(moment.prompt)[cut]).numpy())
    return {"tokens": tokens.tolist(), "values": [round(v, 4) for v in values[cut].tolist()], **group}


def _words(
    model: Model, harvest: Harvest, site: str, numbers: list[int], top: int
) -> tuple[list[Any], list[Any]] | None:
    """The words each unit raises and lowers; None where what it writes cannot be read through the head."""
    reader = harvest.readers[site].read
    try:
        if isinstance(reader, Dictionary):
            units: Any = {str(n): reader.direction(n) for n in numbers}
        elif reader is None:
            units = [f"{site}.{n}" for n in numbers]
        else:
            return None
        data = logit_effects(model, units, top=top).data
    except PellucidError:
        return None
    sides = []
    for side in ("raised", "lowered"):
        pairs = zip(data[f"{side}_token"].values, data[side].values, strict=True)
        sides.append([[{"token": t, "value": round(float(v), 4)} for t, v in zip(*row, strict=True)] for row in pairs])
    return sides[0], sides[1]
