"""What is changed one by one, and what does each change do? One cell per site, or set of sites, that is changed alone.

    layers.*.resid_pre@*        layer x position           layers.*.attn.heads.*      layer x head
    layers.2:6.mlp.out@-1       layer                      layers.5.mlp.neurons.*     neuron
    layers.*                    layer: all that it adds to the residual, changed together
    several patterns            site                       names -> patterns          set: what a name stands for, together

A pattern's axes are its selectors, so one that names a single site is a single value. Positions are taken one by one
where the pattern says `@*`; any other `@` (an index, a slice, a span of each prompt) is changed as a whole. A cell that a
model does not have (a block without attention) is NaN. Whatever the change,

    effect = mean over prompts of  metric(changed) - metric(unchanged)
    share  = effect / total,   total = mean over prompts of  metric(changed altogether) - metric(unchanged)

where changed altogether is the run that values were taken from. Over several prompts an effect has its 95 % interval and
`p`, a sign-flip test corrected for the number of cells (both in `pellucid.statistics`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import Asked, numbers
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import block_of
from pellucid.engine.run import stream_of
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.statistics import interval, sign_flip

Over = str | Site | Sequence[str | Site] | Mapping[str, str | Site | Sequence[str | Site]]
CONTRIBUTIONS = ("attn.out", "cross.out", "mixer.out", "mlp.out")


@dataclass(frozen=True, eq=False)
class Grid:
    """The concrete sites `over` names on some inputs in `groups`, each changed alone, the axes and the cell of each."""

    over: Over
    groups: list[list[Site]]
    cells: list[tuple[int, ...]]
    coords: dict[str, Any]

    @classmethod
    def of(cls, model: Model, over: Over, inputs: Inputs) -> Grid:
        """SiteError for a pattern that names nothing; InputError for `@*` over prompts of unequal length, or a set of no sites."""
        if isinstance(over, str | Site):
            return cls._of_pattern(model, over, inputs)
        over = over if isinstance(over, Mapping) else list(over)
        if isinstance(over, Mapping):
            groups = [named(model, each, inputs) for each in over.values()]
            axis, names = "set", list(over)
            if empty := [name for name, group in zip(names, groups, strict=True) if not group]:
                raise InputError(f"{empty[0]!r} names no site: a set needs one or more")
        else:
            groups = [[site] for site in named(model, over, inputs)]
            axis, names = "site", [str(group[0]) for group in groups]
        return cls(over, groups, [(i,) for i in range(len(groups))], {axis: np.array(names, dtype=object)})

    @classmethod
    def _of_pattern(cls, model: Model, over: str | Site, inputs: Inputs) -> Grid:
        sites = _sites(model, over, inputs)
        asked = _pattern(over)
        fields = {"layer": ("layer", isinstance(asked.layer, str)), "position": ("at", asked.at == "*")}
        fields = {"layer": fields["layer"], _unit_name(asked): ("unit", isinstance(asked.unit, str))} | fields
        dims = {dim: [getattr(s, name) for s in sites] for dim, (name, varies) in fields.items() if varies}
        where = {dim: sorted(set(values)) for dim, values in dims.items()}
        groups: dict[tuple[int, ...], list[Site]] = {}
        for i, site in enumerate(sites):
            groups.setdefault(tuple(where[dim].index(values[i]) for dim, values in dims.items()), []).append(site)
        coords: dict[str, Any] = {dim: np.array(values) for dim, values in where.items()}
        labels = stream_of(inputs, sites[0]).labels
        if "position" in where and all(row == labels[0] for row in labels):
            coords["token"] = ("position", list(labels[0]))
        return cls(over, list(groups.values()), list(groups), coords)

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(name for name in self.coords if name != "token")

    @property
    def sites(self) -> list[Site]:
        return [site for group in self.groups for site in group]

    @property
    def name(self) -> str:
        """`over` as a title says it."""
        over = self.over
        return str(over) if isinstance(over, str | Site) else ", ".join(map(str, over))

    @property
    def names(self) -> list[str]:
        """Of the cells: a set's own, or the address of what is changed."""
        if "set" in self.coords:
            return list(self.coords["set"])
        return [str(group[0]) if len(group) == 1 else " + ".join(map(str, group)) for group in self.groups]

    def whole(self) -> list[Site]:
        """The tensors the sites are part of: what a run must keep to change them from it."""
        return list(dict.fromkeys(s.whole for s in self.sites))

    def sweep(
        self,
        model: Model,
        inputs: Inputs,
        edits: Callable[[list[Site]], Sequence[Edit]],
        metric: Any,
        checkpoint: str | Path | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The metric under the edits of each group alone, [cell, prompt], and without any, [prompt]."""
        swept = model.sweep(inputs, [edits(group) for group in self.groups], metric, checkpoint=checkpoint)
        return numbers(swept.values), numbers(swept.clean)

    def place(self, values: np.ndarray) -> np.ndarray:
        """Values [cell, ...] laid out on the axes."""
        made = np.full([*(len(self.coords[dim]) for dim in self.dims), *values.shape[1:]], np.nan)
        for cell, value in zip(self.cells, values, strict=True):
            made[cell] = value
        return made

    def data(self, columns: Mapping[str, np.ndarray], *more: str) -> xr.Dataset:
        """Columns [cell, *more] as variables over the axes."""
        dims = (*self.dims, *more)
        return xr.Dataset(
            {name: (dims, self.place(x)) for name, x in columns.items()}, self.coords, {"over": self.name}
        )


# ---- what the changes do


def effects(
    grid: Grid,
    asked: Asked,
    values: np.ndarray,
    unchanged: np.ndarray,
    altogether: np.ndarray,
    seed: int,
    *,
    denoise: bool = False,
    share: bool = True,
) -> xr.Dataset:
    """The formulas above over a grid, from the metric `values` [cell, prompt], `unchanged` and changed `altogether`
    [prompt] (each with a last axis [metric] where several are asked for).

    Gives `effect`, `low`, `high`, `p`, and its `share` with `share_low`, `share_high`; `value`, the metric of every
    prompt; `clean` and `corrupted`, without the changes, and `total_effect` with `total_low`, `total_high`.
    """
    change = np.moveaxis(values - unchanged, 0, 1)
    axis = ("metric",) if asked.names else ()
    columns = described("effect", change, seed, test=True)
    if share:
        columns |= shares(change, altogether - unchanged, seed)
    data = grid.data(columns, *axis).assign(value=((*grid.dims, "prompt", *axis), grid.place(values)))
    data = data.assign(totals(unchanged, altogether, seed, denoise=denoise, axis=axis))
    return over_prompts(data, asked)


def described(
    name: str, values: np.ndarray, seed: int, prefix: str = "", *, test: bool = False, **options: Any
) -> dict[str, Any]:
    """The mean of values [prompt, ...] by `name`, and over several prompts its interval (with its options) and p."""
    made = {name: values.mean(0)}
    if len(values) > 1:
        made[f"{prefix}low"], made[f"{prefix}high"] = interval(values, seed, **options)
        if test:
            made[f"{prefix}p"] = sign_flip(values, seed)
    return made


def shares(change: np.ndarray, total: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Ratio of means of changes [prompt, cell, ...] to the total [prompt, ...]; NaN where that is 0."""
    here = np.where(np.abs(total.mean(0)) > 1e-6 * np.maximum(1.0, np.abs(total).max(0)), 1.0, np.nan)
    made = {"share": change.mean(0) / (total.mean(0) * here)}
    if len(change) > 1:
        over = np.broadcast_to(total[:, None], change.shape)
        made["share_low"], made["share_high"] = (end * here for end in interval(change, seed, over=over))
    return made


def totals(
    unchanged: np.ndarray, altogether: np.ndarray, seed: int, *, denoise: bool = False, axis: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The metric on both sides, [prompt], and the total effect, from what is changed to what it is changed to."""
    clean, corrupted = (altogether, unchanged) if denoise else (unchanged, altogether)
    total = described("total_effect", altogether - unchanged, seed, "total_")
    sides = {"clean": (("prompt", *axis), clean), "corrupted": (("prompt", *axis), corrupted)}
    return sides | {name: (axis, value) for name, value in total.items()}


def over_prompts(data: xr.Dataset, asked: Asked) -> xr.Dataset:
    """With the prompts' texts and the metrics' names; without the dimension of prompts where there is one."""
    data = data.assign_coords(text=("prompt", list(asked.inputs.texts)))
    if asked.names:
        data = data.assign_coords(metric=list(asked.names))
    return data.isel(prompt=0) if len(asked.inputs) == 1 else data


# ---- sites of a pattern


def named(model: Model, patterns: str | Site | Sequence[str | Site], inputs: Inputs) -> list[Site]:
    """All sites that a pattern, or several, names."""
    patterns = [patterns] if isinstance(patterns, str | Site) else patterns
    return list(dict.fromkeys(site for pattern in patterns for site in _sites(model, pattern, inputs)))


def _pattern(over: str | Site) -> Site:
    """The pattern as a site; a whole layer as the first of its contributions."""
    whole = _whole_layer(over)
    return Site.parse(over) if whole is None else Site.parse(f"{whole[0]}.{CONTRIBUTIONS[0]}{whole[1]}")


def _whole_layer(over: str | Site) -> tuple[str, str] | None:
    """(`decoder.layers.*`, `@-1`) of a pattern that names layers and no part of them."""
    match = re.fullmatch(r"((?:\w+\.)?layers\.[^.@]+)(@.+)?", over) if isinstance(over, str) else None
    return None if match is None else (match[1], match[2] or "")


def _sites(model: Model, over: str | Site, inputs: Inputs) -> list[Site]:
    """The concrete sites a pattern names, `@*` as one site per position."""
    whole = _whole_layer(over)
    asked = _pattern(over)
    bare = replace(asked, at=None) if asked.at == "*" else asked
    found = model.sites(bare) if whole is None else _layers(model, bare)
    if asked.at != "*":
        return found
    return [s.at_position(p) for s in found for p in range(_length(asked, inputs))]


def _layers(model: Model, asked: Site) -> list[Site]:
    """All that the layers add to the residual. Refused where a part of a layer cannot be met."""
    made: list[Site] = []
    for state in model.sites(replace(asked, part="resid_pre")):
        block = block_of(model.anatomy, state)
        for part in CONTRIBUTIONS:
            why = block.refused.get(part) or block.refused.get(part.partition(".")[0]) or block.refused.get("resid")
            if part in block.taps:
                made.append(replace(state, part=part))
            elif why:
                raise Refused(f"layer {state.layer} cannot be changed as a whole: {part!r} is refused, {why}")
    return made


def _unit_name(site: Site) -> str:
    if site.port == "experts":
        return "expert"
    return "head" if site.port in ("head", "heads") else site.unit_dim


def _length(site: Site, inputs: Inputs) -> int:
    lengths = stream_of(inputs, site).lengths
    if int(lengths.min()) != int(lengths.max()):
        raise InputError(
            f"'{site}' takes positions one by one, but the prompts have {int(lengths.min())} to "
            f"{int(lengths.max())} tokens: give prompts of one length, or name a position they share, "
            "such as @-1 or a span"
        )
    return int(lengths[0])
