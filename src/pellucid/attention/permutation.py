"""Does the prediction notice when attention is shuffled?

For each layer the weights of every row are permuted among the keys it can see, and the change of the prediction is
measured (Jain and Wallace 2019, "Attention is not Explanation", section 4.2.1):

    change[layer] = median over permutations of tv(prediction, prediction under permuted attention)

There a model has a single attention; here `over` says which patterns are shuffled one at a time, those of layers (all heads
at once) or of heads, and `all` is the change when every layer is shuffled. Where the change is small although attention
is sharp, its weights cannot be what the prediction rests on. `uniform` is the change when attention is spread evenly
instead. All variants go through the planner in one sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.attention.comparing import moved
from pellucid.attention.patterns import Kind, asked, attended, labelled, single, visible
from pellucid.engine.edits import Edit, Patch
from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
def permuted_attention(
    model: Model,
    prompt: Any,
    *,
    over: str | Site = "layers.*.attn.pattern",
    draws: int = 20,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    seed: int = 0,
    checkpoint: str | None = None,
) -> Result:
    """How the prediction changes when attention is permuted, on one prompt.

    `over` is a pattern of sites: "layers.*.attn.pattern" or "layers.2:6.attn.heads.*.pattern".
    Gives `change` [layer] (or [layer, head]), the median total variation distance over `draws` permutations with `low`
    and `high`, its quartiles, `sharpest` (the mean over rows of the largest weight that was moved), `uniform` [layer]
    or [layer, head], `all` and `all_uniform`. In an encoder-decoder: of the decoder's self-attention. InputError for
    draws below 1 and sites that are no pattern of self-attention; raises as `patterns` does.

    >>> permuted_attention(classifier, "A dull and lifeless film.").change
    <xarray.DataArray 'change' (layer: 2)>...
    """
    at_least(1, draws=draws)
    inputs = single(model, prompt, decoder)
    found = attended(model, inputs, edits)
    kind = found.main
    layers, seen = found.values[kind], visible(found.values[kind])
    units = _units(model, kind, over)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [[shuffle(a, s, generator) for a, s in zip(layers, seen, strict=True)] for _ in range(draws)]
    even = [s / s.sum(1, keepdim=True) * a.sum(-1, keepdim=True) for a, s in zip(layers, seen, strict=True)]
    variants = [[*edits, edit(kind, i, h, draw[i])] for i, h in units for draw in (*shuffled, even)]
    variants += [[*edits, *(edit(kind, i, None, draw[i]) for i in range(len(layers)))] for draw in (*shuffled, even)]
    question = asked(model, inputs)
    before = question.distribution(found.run).detach()
    distance = question.whole("total_variation", lambda z: moved(question.probabilities(z), before.to(z.device)))
    sweep = model.sweep(inputs, variants, distance, checkpoint=checkpoint)
    values = np.asarray(sweep.values)[:, 0].reshape(len(units) + 1, draws + 1)
    low, change, high = np.quantile(values[:, :-1], (0.25, 0.5, 0.75), axis=1)
    largest = [float(layers[i].amax(-1).mean() if h is None else layers[i][h].amax(-1).mean()) for i, h in units]
    shape = (len(layers),) if units[0][1] is None else (len(layers), max(map(len, layers)))
    rows = {"change": change[:-1], "low": low[:-1], "high": high[:-1], "uniform": values[:-1, -1], "sharpest": largest}
    variables: dict[str, Any] = {}
    for name, row in rows.items():
        grid = np.full(shape, np.nan)
        for (i, h), value in zip(units, row, strict=True):
            grid[i if h is None else (i, h)] = value
        variables[name] = (kind.dims[: len(shape)], grid)
    data = labelled(xr.Dataset({**variables, "all": change[-1], "all_uniform": values[-1, -1]}), found)
    return Result(data, kind="permuted attention", title="Does the prediction notice shuffled attention?")


def _units(model: Model, kind: Kind, over: str | Site) -> list[tuple[int, int | None]]:
    """The patterns that are shuffled one at a time: a layer by its row among those that attend, a head or None for all."""
    asked = Site.parse(over)
    if asked.part != f"{kind.area}.pattern" or asked.stack not in ("", kind.stack) or asked.at is not None:
        raise InputError(
            f"over={str(over)!r}: expected patterns, 'layers.*.attn.pattern' or 'layers.*.attn.heads.*.pattern'"
        )
    found = model.sites(replace(asked, stack=kind.stack))
    return [(kind.layers.index(s.layer), s.unit) for s in found]  # type: ignore[misc]


def shuffle(pattern: Tensor, seen: Tensor, generator: torch.Generator) -> Tensor:
    """[head, query, key] with every row's weights permuted among its visible keys [query, key]."""
    keys = torch.rand(pattern.shape, generator=generator).masked_fill(~seen, torch.inf)
    order = keys.argsort(-1)  # the visible keys in random order, then the masked ones
    home = torch.where(seen, torch.arange(seen.shape[1]), seen.shape[1]).sort(-1).values  # the visible keys in order
    home = home.expand_as(pattern).clamp(max=seen.shape[1] - 1)
    weights = pattern.gather(-1, order) * (torch.arange(seen.shape[1]) < seen.sum(1, keepdim=True))
    return torch.zeros_like(pattern).scatter_add(-1, home, weights)


def edit(kind: Kind, row: int, head: int | None, pattern: Tensor) -> Edit:
    """Put in a pattern [head, query, key] of a layer (by its row among those that attend), or one head's."""
    if head is None:
        return Patch(kind.site(kind.layers[row]), pattern.transpose(0, 1)[None])
    site = kind.site(kind.layers[row]).replace(f"{kind.area}.pattern", f"{kind.area}.heads.{head}.pattern")
    return Patch(site, pattern[head][None])
