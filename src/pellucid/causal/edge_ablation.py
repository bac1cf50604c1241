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

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.ablation import intact, removal
from pellucid.causal.contrast import effects, numbers, one_by_one, provenance, summary
from pellucid.causal.path_patching import Paths
from pellucid.engine.edits import Edit, How
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.tasks import Prompts

DEPTH = {"resid_pre": 0, "attn": 1, "cross": 2, "mixer": 1, "resid_mid": 3, "mlp": 4, "resid_post": 5}


def edge_ablation(
    model: Model,
    prompts: Any,
    *,
    senders: str | Site | Iterable[str | Site],
    receivers: str | Site | Iterable[str | Site],
    how: How,
    reference: Any = None,
    metric: Any = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Result:
    """The effect of removing every edge from a sender to a receiver, one at a time.

    `how`, `reference`, `prompts` and `metric` are those of `ablation`, senders and receivers those of `path_patching`.
    Gives `effect` [sender, receiver] with its interval over prompts, NaN where a sender does not come before a receiver;
    `clean`, `corrupted`, the metric where every receiver has lost all these edges, and `total_effect`, between the two.

    >>> edge_ablation(model, "The capital of France is", senders="layers.0:9.attn.heads.*", receivers="layers.9.mlp.out",
    ...               how="mean", reference=texts, metric=logit(" Paris"))                           # doctest: +SKIP
    """
    spans = None
    if isinstance(prompts, Prompts):
        metric = prompts.metric() if metric is None else metric
        prompts, spans = prompts.clean, prompts.spans
    if metric is None:
        raise InputError("edge_ablation needs a metric, such as metric=pellucid.metrics.logit(' Paris')")
    inputs = model.inputs(prompts, spans=spans)
    bound = model.bind(metric, len(inputs))
    sources, readers = one_by_one(model, inputs, senders), one_by_one(model, inputs, receivers)
    sent = removed(model, inputs, sources, how, reference, seed)
    edges: list[tuple[int, int]] = []
    variants: list[list[Edit]] = []
    together: list[Edit] = []
    for column, reader in enumerate(readers):
        before = [i for i, s in enumerate(sources) if reaches(s, reader)]
        if not before:
            continue
        paths = Paths.between(model, inputs, sent, [reader], direct=True)
        edges += [(i, column) for i in before]
        variants += paths.variants([[sources[i]] for i in before])
        together += paths.variants([[sources[i] for i in before]])[0]
    if not edges:
        raise InputError(f"no sender of {senders!r} comes before a receiver of {receivers!r}")
    sweep = model.sweep(inputs, [*variants, together], bound, progress=progress,
                        checkpoint=checkpoint)  # fmt: skip
    found = effects(sweep.values[:-1], sweep.clean, seed)
    columns = {name: np.full((len(sources), len(readers)), np.nan) for name in found}
    for name, values in found.items():
        columns[name][tuple(zip(*edges, strict=True))] = values
    about = provenance(
        model, "edge_ablation", inputs, seed, senders=senders, receivers=receivers, how=how,
        reference=reference if isinstance(reference, str | list | tuple) else None, metric=bound.name,
    )  # fmt: skip
    data = xr.Dataset(
        {name: (("sender", "receiver"), values) for name, values in columns.items()},
        {"sender": [str(s) for s in sources], "receiver": [str(r) for r in readers]},
    ).assign(summary(numbers(sweep.clean), numbers(sweep.values[-1]), seed))
    return Result(data, kind="edge ablation", title=f"Edges removed by {how}", provenance=about)


def removed(
    model: Model, inputs: Inputs, senders: list[Site], how: How, reference: Any, seed: int
) -> dict[Site, Tensor]:
    """What stands at every sender's whole site when it is removed, [prompt, position, ...]; all removed in one run,
    since each comes from an intact reference."""
    wholes = list(dict.fromkeys(s.whole for s in senders))
    run = intact(model, inputs, how, reference, wholes)
    edits: list[Edit] = [removal(how, seed, run, reference is None, site) for site in wholes]
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
