"""What does each head write, in words?

A head adds z_h W_O[h] to the residual stream. With the scale of the final norm held at its value in this run, that
changes every logit directly by

    W_U norm(z_h W_O[h])

(Elhage et al. 2021), so the tokens it raises and lowers most are what it says; the numbers are those of
`direct_logit_attribution` by head, for the whole vocabulary. Logits are read before a soft cap. A fitted `TunedLens` over `layers.*.attn.heads.*.out`
(`through`) reads it in the head's own basis instead (Sakarvadia et al. 2023), as probabilities.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.frozen import linearised
from pellucid.engine.run import Run
from pellucid.errors import InputError, Refused
from pellucid.lenses.logit_lens import unembed
from pellucid.lenses.tuned_lens import TunedLens, last_residual
from pellucid.model import Model
from pellucid.results import Provenance, Result
from pellucid.tasks.tokens import texts

ROWS = 64  # heads read at a time


@torch.no_grad()
def head_lens(
    model: Model,
    prompt: Any,
    *,
    position: int | str = -1,
    top: int = 5,
    layers: str = "*",
    target: str | None = None,
    through: TunedLens | None = None,
) -> Result:
    """The tokens every head of the last stack raises (and lowers) most at one position of one prompt.

    Gives over `layer` x `head` `raised` and `raised_token` [top], `lowered` and `lowered_token` [top], changes of logits,
    and `size`, the norm of what is written; through a tuned lens `raised` holds probabilities and nothing is lowered.
    Layers whose heads do not write to the stream by themselves are left out; Refused if all are.

    >>> head_lens(model, "The Eiffel Tower is located in the city of").top(3)  # doctest: +SKIP
    """
    if through is not None:
        through.check(model)
    inputs = model.inputs(prompt, decoder=target)
    if len(inputs) != 1:
        raise InputError(f"the head lens reads one prompt at a time, got {len(inputs)}")
    stack = model.anatomy.stacks[-1]
    written = [
        s for s in model.sites(f"{stack.prefix}layers.{layers}.attn.heads.*") if _writes(model, int(s.layer or 0))
    ]
    if not written:
        raise Refused(f"no head of {model.name} writes to the residual stream by itself: there is nothing to read")
    at = position if isinstance(position, int) else repr(position)
    names = [f"{site}.out" for site in written]
    run = model.run(inputs, keep=[*names, last_residual(model)])
    wrote = torch.stack([run.tensor(f"{name}@{at}")[0, 0] for name in names])
    read = _Direct(model, run, at) if through is None else None
    top = min(top, run.logits.shape[-1])
    found: dict[str, list[Tensor]] = {"raised": [], "raised_token": [], "lowered": [], "lowered_token": []}
    for part in torch.arange(len(names)).split(ROWS):
        logits = (
            read(wrote[part])
            if read is not None
            else _translated(model, through, [names[int(i)] for i in part], wrote[part])
        )
        for name, sign in (("raised", 1), ("lowered", -1))[: 1 + (through is None)]:
            best = (sign * logits).topk(top, -1)
            found[name].append(sign * best.values)
            found[f"{name}_token"].append(best.indices)
    shape = {"layer": sorted({int(s.layer or 0) for s in written}), "head": sorted({int(s.unit or 0) for s in written})}
    made: dict[str, Any] = {"size": (("layer", "head"), _grid(wrote.float().norm(dim=-1).numpy(), written, shape))}
    for name, parts in found.items():
        if parts:
            values = torch.cat(parts).numpy()
            values = texts(model.tokenizer, values) if name.endswith("token") else values
            made[name] = (("layer", "head", "top"), _grid(values, written, shape))
    made = {name: made[name] for name in ("raised", "raised_token", "lowered", "lowered_token", "size") if name in made}
    provenance = Provenance(
        "head_lens", model.name, digest=model.digest, inputs=list(inputs.texts),
        arguments={"position": position, "layers": layers, "through": through is not None},
    )  # fmt: skip
    data = xr.Dataset(made, coords=shape)
    return Result(data, kind="head lens", title=f"What the heads of {model.name} write", provenance=provenance)


def _writes(model: Model, layer: int) -> bool:
    block = model.anatomy.stacks[-1].blocks[layer]
    attention = block.attentions.get("attn")
    return attention is not None and attention.o_proj is not None and "attn.heads.out" not in block.refused


class _Direct:
    """The model's own head with its norm held as it was at one position of a run."""

    def __init__(self, model: Model, run: Run, at: int | str) -> None:
        head = model.anatomy.head
        if head is None or "head" in model.anatomy.refusals:
            raise Refused(
                f"{model.name} cannot be read through its head: {model.anatomy.refusals.get('head', 'it has none')}"
            )
        here = run.tensor(f"{last_residual(model)}@{at}")
        self.frozen, _ = linearised(head.steps[: head.after], head.names[: head.after], here)
        self.nothing = self.frozen(torch.zeros_like(here))

    def __call__(self, written: Tensor) -> Tensor:
        """[row, vocabulary] changes of the logits by written [row, d]."""
        return (self.frozen(written[:, None].to(self.nothing)) - self.nothing)[:, 0].float()


def _translated(model: Model, lens: TunedLens | None, names: list[str], written: Tensor) -> Tensor:
    assert lens is not None
    moved = torch.stack([lens.translate(name, row.float()) for name, row in zip(names, written, strict=True)])
    return unembed(model, moved[None].to(written.dtype))[0].float().softmax(-1)


def _grid(values: np.ndarray, sites: list[Any], shape: dict[str, list[int]]) -> np.ndarray:
    """Rows placed by layer and head; NaN (or "") where a layer has no such head."""
    empty: Any = "" if values.dtype == object else np.nan
    grid = np.full((len(shape["layer"]), len(shape["head"]), *values.shape[1:]), empty, dtype=values.dtype)
    for row, site in zip(values, sites, strict=True):
        grid[shape["layer"].index(int(site.layer)), shape["head"].index(int(site.unit))] = row
    return grid
