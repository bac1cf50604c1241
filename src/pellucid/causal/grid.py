"""A pattern of sites as a grid: one cell per site that is changed alone, one axis per selector.

    layers.*.resid_pre@*        layer x position           layers.*.attn.heads.*      layer x head
    layers.2:6.mlp.out@-1       layer                      layers.5.mlp.neurons.*     neuron

Positions are taken one by one where the pattern says `@*`; any other `@` is changed as a whole. A cell that a
model does not have (a block without attention) is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs
from pellucid.engine.run import stream_of
from pellucid.errors import InputError
from pellucid.model import Model

Axis = tuple[str, list[int]]


@dataclass(frozen=True, eq=False)
class Grid:
    """The concrete `sites` of a pattern on some inputs, the axes they lie on and the cell of each."""

    pattern: str
    sites: list[Site]
    cells: list[tuple[int, ...]]
    axes: list[Axis]
    coords: dict[str, Any]

    @classmethod
    def of(cls, model: Model, pattern: str, inputs: Inputs) -> Grid:
        """SiteError for a pattern that names nothing; InputError for `@*` over prompts of unequal length."""
        asked = Site.parse(pattern)
        found = model.sites(asked.at_position(None) if asked.at == "*" else asked)
        positions = _length(asked, inputs) if asked.at == "*" else 0
        sites = [s.at_position(p) for s in found for p in range(positions)] if positions else found
        keys: dict[str, list[Any]] = {}
        if isinstance(asked.layer, str):
            keys["layer"] = [s.layer for s in sites]
        if isinstance(asked.unit, str):
            keys[_unit_name(asked)] = [s.unit for s in sites]
        if positions:
            keys["position"] = [s.at for s in sites]
        axes = [(name, sorted(set(values))) for name, values in keys.items()]
        columns = [[where.index(v) for v in keys[name]] for name, where in axes]
        cells: list[tuple[int, ...]] = [tuple(c[i] for c in columns) for i in range(len(sites))]
        coords: dict[str, Any] = {name: np.array(where) for name, where in axes}
        labels = stream_of(inputs, asked).labels
        if positions and all(row == labels[0] for row in labels):
            coords["token"] = ("position", list(labels[0]))
        return cls(pattern, sites, cells, axes, coords)

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    def whole(self) -> list[Site]:
        """The tensors the sites are part of: what a run must keep to change them from it."""
        return list(dict.fromkeys(s.whole for s in self.sites))

    def scores(
        self, model: Model, inputs: Inputs, edit: Callable[[Site], Edit], metric: Any, progress: bool
    ) -> tuple[Tensor, Tensor]:
        """The metric under each edit alone, [cell, prompt], and without any, [prompt], in float64."""
        sweep = model.sweep(inputs, [edit(site) for site in self.sites], metric, progress=progress)
        return sweep.values.double(), sweep.clean.double().cpu()

    def place(self, values: Tensor) -> np.ndarray:
        """Values [cell, ...] laid out on the axes."""
        shape = [len(where) for _, where in self.axes]
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
        attrs={"over": grid.pattern},
    )
    return data.isel(prompt=0) if len(inputs) == 1 else data


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
