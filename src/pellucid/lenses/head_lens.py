"""What does each head write, in words?

A head adds z_h W_O[h] to the residual stream. With the scale of the final norm held at its value in this run, that
changes every logit directly by

    W_U norm(z_h W_O[h])

(Elhage et al. 2021), so the tokens it raises and lowers most are what it says; the numbers are those of
`direct_logit_attribution` by head, for the whole vocabulary. Logits are read before a soft cap. A fitted `TunedLens` over `layers.*.attn.heads.*.out`
(`through`) reads it in the head's own basis instead (Sakarvadia et al. 2023), as probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from pellucid.engine.edits import Edit
from pellucid.errors import InputError, Refused
from pellucid.lenses.lens import (
    Held,
    Layers,
    Lens,
    Positions,
    answer_texts,
    last_residual,
    layer_numbers,
    logits,
    one_column,
)
from pellucid.model import Model
from pellucid.question import extremes
from pellucid.results import Result
from pellucid.technique import technique

ROWS = 64  # heads read at a time


@technique
@torch.no_grad()
def head_lens(
    model: Model,
    prompt: Any,
    *,
    positions: Positions = -1,
    top: int = 5,
    layers: Layers = None,
    decoder: str | None = None,
    through: Lens | None = None,
    edits: Sequence[Edit] = (),
) -> Result:
    """The tokens every head of the last stack raises (and lowers) most at one position of one prompt.

    Gives over `layer` x `head` `raised` and `raised_token` [top], `lowered` and `lowered_token` [top], changes of logits,
    and `size`, the norm of what is written; through a tuned lens `raised` holds probabilities and nothing is lowered. Under
    `edits`, what the heads write in the edited run. Layers whose heads do not write to the stream by themselves are left out; Refused if all are.

    >>> head_lens(model, "The Eiffel Tower is located in the city of").top(3)
    layer head top raised raised_token lowered lowered_token size
    ...
    """
    if through is not None:
        through.check(model)
    inputs = model.inputs(prompt, decoder=decoder)
    if len(inputs) != 1:
        raise InputError(f"the head lens reads one prompt at a time, got {len(inputs)}")
    prefix, writing = model.anatomy.stacks[-1].prefix, [n for n in layer_numbers(model, layers) if _writes(model, n)]
    written = [s for n in writing for s in model.sites(f"{prefix}layers.{n}.attn.heads.*")]
    if not written:
        raise Refused(f"no head of {model.name} writes to the residual stream by itself: there is nothing to read")
    column = one_column(inputs, positions, "the head lens")[0]
    names = [f"{site}.out" for site in written]
    run = model.run(inputs, keep=[*names, last_residual(model)], edits=edits)
    wrote = torch.stack([run.tensor(name)[0, column] for name in names])
    read = Held(model, run.tensor(last_residual(model))[:1, column][:, None]) if through is None else None
    found = []
    for part in torch.arange(len(names)).split(ROWS):
        said = (
            read(wrote[part])
            if read is not None
            else torch.cat([logits(model, wrote[i : i + 1], names[i], through) for i in part.tolist()]).softmax(-1)
        )
        found.append(extremes(said, top))
    shape = {"layer": sorted({int(s.layer or 0) for s in written}), "head": sorted({int(s.unit or 0) for s in written})}
    made: dict[str, Any] = {}
    for name in list(found[0])[: 4 if through is None else 2]:  # probabilities lower nothing
        values = torch.cat([each[name] for each in found]).cpu().numpy()
        values = answer_texts(model, values) if name.endswith("token") else values
        made[name] = (("layer", "head", "top"), _grid(values, written, shape))
    made["size"] = (("layer", "head"), _grid(wrote.float().norm(dim=-1).cpu().numpy(), written, shape))
    data = xr.Dataset(made, coords=shape)
    return Result(data, kind="head lens", title=f"What the heads of {model.name} write")


def _writes(model: Model, layer: int) -> bool:
    block = model.anatomy.stacks[-1].blocks[layer]
    attention = block.attentions.get("attn")
    return attention is not None and attention.o_proj is not None and "attn.heads.out" not in block.refused


def _grid(values: np.ndarray, sites: list[Any], shape: dict[str, list[int]]) -> np.ndarray:
    """Rows placed by layer and head; NaN (or "") where a layer has no such head."""
    empty: Any = "" if values.dtype == object else np.nan
    grid = np.full((len(shape["layer"]), len(shape["head"]), *values.shape[1:]), empty, dtype=values.dtype)
    for row, site in zip(values, sites, strict=True):
        grid[shape["layer"].index(int(site.layer)), shape["head"].index(int(site.unit))] = row
    return grid
