"""What do causal methods share? Two aligned sets of prompts, a metric, the effect between them, its interval.

    total effect = metric(corrupted) - metric(clean)      effect of an edit = metric(edited) - metric(unedited)

Intervals are percentile bootstraps of the mean over prompts (Efron 1979): resample prompts with replacement, take
the mean, and give the range that holds `level` of the draws. One prompt has no interval: NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.engine.edits import Edit, Place, left_aligned
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.locate import locate
from pellucid.engine.run import Run, stream_of
from pellucid.errors import InputError
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.results import Provenance
from pellucid.tasks import Prompts


@dataclass(frozen=True, eq=False)
class Contrast:
    """Clean and corrupted prompts of equal token lengths, and what the metric gives on both, each [prompt]."""

    model: Model
    clean: Inputs
    corrupted: Inputs
    metric: BoundMetric
    clean_scores: Tensor
    corrupted_scores: Tensor

    def run(self, inputs: Inputs, keep: Iterable[Site | str]) -> Run:
        with torch.no_grad():
            return self.model.run(inputs, keep=keep)

    def sides(self, denoise: bool) -> tuple[Inputs, Inputs, Tensor]:
        """What is run, what it is patched from, and the metric of what is run."""
        if denoise:
            return self.corrupted, self.clean, self.corrupted_scores
        return self.clean, self.corrupted, self.clean_scores

    def summary(self, seed: int) -> dict[str, Any]:
        return summary(numbers(self.clean_scores), numbers(self.corrupted_scores), seed)


def summary(clean: np.ndarray, corrupted: np.ndarray, seed: int) -> dict[str, Any]:
    """What every result carries: the metric on each clean and corrupted prompt, and the total effect."""
    low, high = bootstrap(corrupted - clean, seed)
    total = {"total_effect": (corrupted - clean).mean(), "total_low": low, "total_high": high}
    return {"clean": ("prompt", clean), "corrupted": ("prompt", corrupted), **total}


def sides(
    model: Model, clean: Any, corrupted: Any = None, metric: Any = None, target: Any = None
) -> tuple[Inputs, Inputs, Any]:
    """Clean and corrupted prompts that align, and the metric. `clean` may be `tasks.Prompts`, which brings all three and
    its named spans. InputError where something is missing or prompts do not align; it shows where they part."""
    spans = None
    if isinstance(clean, Prompts):
        metric = clean.metric() if metric is None else metric
        corrupted = clean.corrupted if corrupted is None else corrupted
        clean, spans = clean.clean, clean.spans
    if corrupted is None or metric is None:
        raise InputError(
            "give clean and corrupted prompts and a metric, or a task (pellucid.tasks.Prompts) with all three"
        )
    ours, theirs = (model.inputs(p, decoder=target, spans=spans) for p in (clean, corrupted))
    check_aligned(ours, theirs)
    return ours, theirs, metric


def check_aligned(clean: Inputs, corrupted: Inputs) -> None:
    """InputError unless prompts come in pairs of equal token length; it shows where they part."""
    if len(clean) != len(corrupted):
        raise InputError(f"{len(clean)} clean but {len(corrupted)} corrupted prompts: give them in pairs")
    for name in clean.streams:
        for i, (a, b) in enumerate(zip(clean.streams[name].labels, corrupted.streams[name].labels, strict=True)):
            if len(a) != len(b):
                first = next(j for j, (x, y) in enumerate(zip_longest(a, b)) if x != y)
                near = slice(max(0, first - 1), first + 3)
                shown = [" ".join(map(repr, labels[near])) for labels in (a, b)]
                raise InputError(
                    f"pair {i} does not align: clean has {len(a)} tokens and corrupted {len(b)}; from token {first} on "
                    f"clean is ... {shown[0]} ... and corrupted ... {shown[1]} ...; choose words of equal token length"
                )
        if not torch.equal(clean.streams[name].mask, corrupted.streams[name].mask):
            raise InputError(
                "clean and corrupted prompts are padded differently: pad both on the same side, equally far"
            )


def contrast(model: Model, clean: Any, corrupted: Any = None, metric: Any = None, target: Any = None) -> Contrast:
    """Two sides (see `sides`), scored."""
    ours, theirs, metric = sides(model, clean, corrupted, metric, target)
    bound = model.bind(metric, len(ours))
    with torch.no_grad():
        scores = [model.score(model.run(side), bound) for side in (ours, theirs)]
    return Contrast(model, ours, theirs, bound, *scores)


def rows(inputs: Inputs, index: Sequence[int]) -> Inputs:
    """Some of the prompts, any of them several times, as a batch of their own."""
    n, index = len(inputs), list(index)

    def cut(stream: Stream) -> Stream:
        spans = {name: [span[i] for i in index] for name, span in stream.spans.items()}
        return Stream(stream.ids[index], stream.mask[index], tuple(stream.labels[i] for i in index), spans)

    tensors = {
        k: v[index] if isinstance(v, Tensor) and v.ndim and len(v) == n else v for k, v in inputs.tensors.items()
    }
    return Inputs(tensors, {k: cut(s) for k, s in inputs.streams.items()}, tuple(inputs.texts[i] for i in index))


def repeated(inputs: Inputs, times: int) -> Inputs:
    """The same prompts several times over, in order, as one batch."""
    return rows(inputs, list(range(len(inputs))) * times)


# ---- intervals


def bootstrap(values: np.ndarray, seed: int, draws: int = 1000, level: float = 0.95) -> tuple[Any, Any]:
    """Low and high end of the interval of the mean over the first axis, prompts: values [prompt, ...] -> [...].

    >>> low, high = bootstrap(np.array([1.0, 2.0, 3.0]), seed=0)
    >>> bool(1.0 <= low < 2.0 < high <= 3.0)
    True
    """
    n = len(values)
    if n < 2:
        return np.full(values.shape[1:], np.nan)[()], np.full(values.shape[1:], np.nan)[()]
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n
    means = np.tensordot(weights, values, 1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def effects(values: Tensor, base: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Mean change [variant] with its interval, from scores [variant, prompt] and those without the edit [prompt]."""
    change = (numbers(values) - numbers(base)).T
    low, high = bootstrap(change, seed)
    return {"effect": change.mean(0), "low": low, "high": high}


# ---- sites of a result


def one_by_one(model: Model, inputs: Inputs, over: str | Site | Iterable[str | Site]) -> list[Site]:
    """The concrete sites a pattern (or several) names; `@*` becomes one site per position."""
    patterns = [over] if isinstance(over, str | Site) else list(over)
    found: list[Site] = []
    for site in (s for p in patterns for s in model.sites(p)):
        if site.at != "*":
            found.append(site)
            continue
        lengths = set(stream_of(inputs, site).lengths.tolist())
        if len(lengths) > 1:
            raise InputError(
                f"{str(site)!r} needs prompts of one length, and these have {sorted(lengths)}: name positions"
            )
        found += [site.at_position(i) for i in range(lengths.pop())]
    return list(dict.fromkeys(found))


def lay_out(sites: Sequence[Site], columns: Mapping[str, Any]) -> xr.Dataset:
    """Columns [site] as variables over layer, unit (head, neuron, ...) and position; over `site` where parts differ."""
    levels: dict[str, list[Any]] = {}
    if len({(s.part, s.stack, s.unit is None, s.layer is None, s.at is None) for s in sites}) == 1:
        one = sites[0]
        unit = "head" if one.port.startswith("head") else one.unit_dim
        fields = {"layer": "layer", unit: "unit", "position": "at"}
        levels = {
            dim: [getattr(s, name) for s in sites] for dim, name in fields.items() if getattr(one, name) is not None
        }
    levels = levels or {"site": [str(s) for s in sites]}
    index = pd.MultiIndex.from_arrays(list(levels.values()), names=list(levels))
    return xr.Dataset.from_dataframe(pd.DataFrame(dict(columns), index=index))


def provenance(model: Model, method: str, inputs: Inputs, seed: int | None, **arguments: Any) -> Provenance:
    return Provenance(
        method, model.name, digest=model.digest, inputs=list(inputs.texts), arguments=arguments, seed=seed
    )


def beside(checkpoint: str | Path | None, name: object) -> Path | None:
    """The file of one of several sweeps that a method keeps.

    >>> str(beside("trace", 2)), beside(None, 2)
    ('trace.2', None)
    """
    return None if checkpoint is None else Path(f"{checkpoint}.{name}")


# ---- many units at once


@dataclass(frozen=True, eq=False)
class Swap(Edit):
    """Units of a site take other values, position by position: many heads or neurons of a layer in one edit.

    values: [batch or 1, position, unit, ...] (or [batch or 1, position, ...] without units), position 0 the first real token.
    """

    values: Tensor = None  # type: ignore[assignment]
    units: tuple[int, ...] | None = None

    def new(self, x: Tensor, place: Place) -> Tensor:
        rows = torch.arange(len(x), device=x.device)[:, None] if len(self.values) > 1 else 0
        new = self.values[rows, place.positions.clamp(max=self.values.shape[1] - 1)].to(x.dtype)
        if self.units is None:
            return new
        x = x.clone()
        x[:, :, list(self.units)] = new
        return x


def swaps(model: Model, sites: Sequence[Site], source: Run) -> list[Edit]:
    """Edits that give all `sites` together the values of a run that kept them (their `whole`)."""
    units: dict[Site, list[int]] = {}
    for site in sites:
        unit = locate(model.anatomy, site).unit
        units.setdefault(replace(site.whole, at=site.at), []).extend([] if unit is None else [unit])
    made: list[Edit] = []
    for site, chosen in units.items():
        values = aligned_values(source, site.whole)
        made.append(Swap(site, values[:, :, chosen] if chosen else values, tuple(chosen) or None))
    return made


def aligned_values(run: Run, site: Site) -> Tensor:
    """The values at a site, [batch, position, unit, ...], position 0 the first real token of each row."""
    return left_aligned(*run.everywhere(site))[0]
