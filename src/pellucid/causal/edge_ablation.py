"""Which connection does the answer need? Remove what one part says to one other, and nothing else.

An edge is what a sender (a head, an MLP, the embedding) adds to the input of a receiver (a head or one of its q, k, v; an
MLP; the last residual) directly. It is removed as a site is (ablation.py), but for that receiver alone:

    effect(s -> r) = m(r reads its input with s removed, all else as it is) - m(intact)

The run is that of path patching (path_patching.py, steps 1 to 3) with the removed value in place of the other prompt's:
everything between s and r is held, everything after r reacts. The true circuit depends on what removing means
(Miller et al. 2024), so `how` has no default. Where what attention writes is normalised before it is added (gemma2), the
others of the layer are scaled anew without the head; pellucid.circuits holds that scale. For all edges of a model at once, in a graph, see pellucid.circuits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.ablation import Removing
from pellucid.causal.contrast import Metrics, ask, numbers
from pellucid.causal.grid import Grid, Over, described, named, over_prompts, totals
from pellucid.causal.path_patching import Paths
from pellucid.engine.edits import Edit, How
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

DEPTH = {"resid_pre": 0, "attn": 1, "cross": 2, "mixer": 1, "resid_mid": 3, "mlp": 4, "resid_post": 5}


@technique
def edge_ablation(
    model: Model,
    prompts: Any,
    *,
    over: Over,
    receivers: str | Site | Sequence[str | Site],
    how: How,
    reference: Any = None,
    metric: Metrics | Any = None,
    decoder: Any = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """The effect of removing every edge from a sender in `over` (or a set of them) to a receiver, one at a time.

    `how`, `reference`, `prompts` and `metric` are those of `ablation`, senders and receivers those of `path_patching`.
    Gives `effect` over the selectors of `over` and `receiver` with its interval over prompts and p, NaN where a sender does
    not come before a receiver; `value`, the metric of every prompt; `clean`, `corrupted`, the metric where every receiver has lost all these edges, and
    `total_effect`, between the two.

    >>> edge_ablation(model, "The capital of France is", over="layers.0:9.attn.heads.*", receivers="layers.9.mlp.out",
    ...               how="mean", reference=texts, metric=pl.metrics.logit(" Paris"))
    Edges removed by mean
    edge ablation: effect, clean, corrupted, total_effect, value over layer 9, head 8, receiver 1...
    """
    asked = ask(model, prompts, metric, decoder=decoder, several=True)
    inputs = asked.inputs
    grid, readers = Grid.of(model, over, inputs), named(model, receivers, inputs)
    sent = removed(model, inputs, grid, how, reference, seed)
    edges: list[tuple[int, int]] = []
    variants: list[list[Edit]] = []
    together: list[Edit] = []
    for column, reader in enumerate(readers):
        before = [i for i, group in enumerate(grid.groups) if all(reaches(s, reader) for s in group)]
        if not before:
            continue
        paths = Paths.between(model, inputs, sent, [reader], direct=True)
        edges += [(i, column) for i in before]
        variants += paths.variants([grid.groups[i] for i in before])
        together += paths.variants([[s for i in before for s in grid.groups[i]]])[0]
    if not edges:
        raise InputError(f"no sender of {over!r} comes before a receiver of {receivers!r}")
    swept = model.sweep(inputs, [*variants, together], asked.metric, checkpoint=checkpoint)
    values, clean = numbers(swept.values), numbers(swept.clean)
    axis = ("metric",) if asked.names else ()

    def laid_out(column: np.ndarray) -> np.ndarray:
        """[edge, ...] over sender x receiver."""
        made = np.full((len(grid.groups), len(readers), *column.shape[1:]), np.nan)
        made[tuple(zip(*edges, strict=True))] = column
        return made

    found = described("effect", np.moveaxis(values[:-1] - clean, 0, 1), seed, test=True)
    data = grid.data({name: laid_out(column) for name, column in found.items()}, "receiver", *axis)
    data = data.assign(totals(clean, values[-1], seed, axis=axis))
    data = data.assign(value=((*grid.dims, "receiver", "prompt", *axis), grid.place(laid_out(values[:-1]))))
    data = over_prompts(data.assign_coords(receiver=list(map(str, readers))), asked)
    return Result(data, kind="edge ablation", title=f"Edges removed by {how}")


def removed(model: Model, inputs: Inputs, grid: Grid, how: How, reference: Any, seed: int) -> dict[Site, Tensor]:
    """What stands at every sender's whole site when it is removed, [prompt, position, ...]; all removed in one run,
    since each comes from an intact reference."""
    wholes = grid.whole()
    edits = Removing.of(model, inputs, how, reference, wholes, seed).edits(wholes)
    with torch.no_grad():
        made = model.run(inputs, keep=wholes, edits=edits)
    return {site: made.everywhere(site)[0] for site in wholes}


def reaches(sender: Site, receiver: Site) -> bool:
    """Whether what the sender writes is in the stream when the receiver reads it."""
    if sender.stack != receiver.stack:
        return sender.stack == "encoder" and receiver.part.startswith("cross.")
    if sender.layer is None or receiver.layer is None:
        return sender.layer is None
    assert isinstance(sender.layer, int) and isinstance(receiver.layer, int)
    order = [(s.layer, DEPTH[s.part.partition(".")[0]]) for s in (sender, receiver)]
    return order[0] < order[1]
