"""A pattern of sites as a grid: one cell per site that is changed alone, one axis per selector.

    layers.*.resid_pre@*        layer x position           layers.*.attn.heads.*      layer x head
    layers.2:6.mlp.out@-1       layer                      layers.5.mlp.neurons.*     neuron
    layers.*                    layer: all that it adds to the residual, changed together
    several patterns            site                       names -> patterns          set: what a name stands for, together

Positions are taken one by one where the pattern says `@*`; any other `@` is changed as a whole. A cell that a
model does not have (a block without attention) is NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import block_of
from pellucid.engine.run import stream_of
from pellucid.errors import InputError, Refused
from pellucid.model import Model

Over = str | Site | Sequence[str | Site] | Mapping[str, str | Sequence[str]]
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
        """SiteError for a pattern that names nothing; InputError for `@*` over prompts of unequal length."""
        if isinstance(over, str | Site):
            return cls._of_pattern(model, over, inputs)
        if isinstance(over, Mapping):
            sets = {name: [each] if isinstance(each, str) else each for name, each in over.items()}
            groups = [[s for p in each for s in _sites(model, p, inputs)] for each in sets.values()]
            names: list[str] = list(sets)
        else:
            groups = [[s] for p in over for s in _sites(model, p, inputs)]
            names = [str(group[0]) for group in groups]
        axis = "set" if isinstance(over, Mapping) else "site"
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
        over = self.over
        return str(over) if isinstance(over, str | Site) else ", ".join(map(str, over))

    def whole(self) -> list[Site]:
        """The tensors the sites are part of: what a run must keep to change them from it."""
        return list(dict.fromkeys(s.whole for s in self.sites))

    def scores(
        self,
        model: Model,
        inputs: Inputs,
        edit: Callable[[Site], Edit],
        metric: Any,
        progress: bool,
        checkpoint: str | Path | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The metric under the edits of each group alone, [cell, prompt], and without any, [prompt], in float64."""
        variants = [[edit(site) for site in group] for group in self.groups]
        sweep = model.sweep(inputs, variants, metric, progress=progress, checkpoint=checkpoint)
        return sweep.values.double(), sweep.clean.double().cpu()

    def place(self, values: Tensor) -> np.ndarray:
        """Values [cell, ...] laid out on the axes."""
        shape = [len(self.coords[dim]) for dim in self.dims]
        made = np.full([*shape, *values.shape[1:]], np.nan)
        for cell, value in zip(self.cells, values.numpy(), strict=True):
            made[cell] = value
        return made


def with_interval(
    grid: Grid, statistic: Callable[[Tensor], Tensor], prompts: int, seed: int, draws: int = 1000
) -> dict[str, Any]:
    """The effect over all prompts and, for several, its 95 % bootstrap interval.

    `statistic` maps weights of prompts [draw, prompt], which add up to 1, to effects [draw, cell].
    """
    made = {"effect": statistic(torch.full((1, prompts), 1 / prompts, dtype=torch.float64))[0]}
    if prompts > 1:
        drawn = torch.randint(prompts, (draws, prompts), generator=torch.Generator().manual_seed(seed))
        weights = torch.nn.functional.one_hot(drawn, prompts).double().mean(1)
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        made["low"], made["high"] = statistic(weights).quantile(ends, 0)
    return {name: (grid.dims, grid.place(values)) for name, values in made.items()}


def dataset(grid: Grid, variables: dict[str, Any], inputs: Inputs) -> xr.Dataset:
    """Variables over the grid (and `prompt`, which goes where there is only one)."""
    data = xr.Dataset(
        variables,
        coords={**grid.coords, "text": ("prompt", list(inputs.texts))},
        attrs={"over": grid.name},
    )
    return data.isel(prompt=0) if len(inputs) == 1 else data


# ---- sites of a pattern


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
