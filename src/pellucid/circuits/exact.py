"""What happens to the metric when one edge, and no other, is switched off? Measured, edge by edge.

    effect(s -> r) = m(every edge on but s -> r) - m(every edge on)

This is the truth that attribution estimates: activation patching at the level of edges. It costs about half a
pass per edge, so name the `edges` on a large model.

Whole heads are patched by the sweep planner (`model.sweep` over `layers.*.attn.heads.*`). It cannot express an
edge: its edits replace a tensor for everybody who reads it, and what one reader alone hears (a query before its
rotation, an MLP's input beside the residual that passes it by) is no site. Its ladder is climbed here instead:
edges of one reader share a batch, a run starts at the reader's block, since nothing before it changes, and
nothing is unembedded but what the metric reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pellucid.causal.contrast import ask
from pellucid.circuits.ablation import How
from pellucid.circuits.away import scored
from pellucid.circuits.execution import Runner, capacity, chunks, wire
from pellucid.circuits.graph import Split
from pellucid.circuits.scores import EdgeScores
from pellucid.engine.pausing import progress
from pellucid.metrics import Metric
from pellucid.model import Model
from pellucid.technique import technique


@technique
def exact_patching(
    model: Model,
    prompts: Any,
    metric: Metric | Any = None,
    *,
    how: How,
    reference: Any = None,
    edges: Iterable[str] | None = None,
    split: Split | None = None,
    seed: int = 0,
) -> EdgeScores:
    """The exact effect of each edge (or of those named in `edges`), by as many partial runs as there are
    edges.

    `prompts` are a task's `Prompts`, or prompts with a metric; `reference` are the corrupted prompts of
    "resample" or those a mean is taken over. Refused where the model's readers cannot be parted.

    >>> task = pl.tasks.indirect_objects(model.tokenizer, 4)
    >>> scores = exact_patching(model, task, how="resample")
    >>> scores.circuit(20)
    <Circuit of 20 of 222 edges (9.0%), ... nodes>
    """
    wiring = wire(model, split)
    question = ask(model, prompts, metric, reference)
    runner = Runner.of(wiring, question, how, seed)
    graph = wiring.graph
    chosen = list(graph.edges()) if edges is None else [graph.edge(e) for e in edges]
    each = torch.zeros(len(question.inputs), *graph.possible.shape)
    groups = [
        [(s, reader) for s in some]
        for reader in sorted({r for _, r in chosen})
        for some in chunks([s for s, r in chosen if r == reader], capacity(runner))
    ]  # edges of one reader run together, from its layer on
    masks = ([_without(graph.possible, edge) for edge in group] for group in groups)
    with progress[None](what="edges", total=len(chosen)) as bar:
        found = scored(runner, how, seed, chain([[graph.possible]], masks))
        clean = next(found)[0]
        for group, scores in zip(groups, found, strict=True):
            for (s, r), score in zip(group, scores, strict=True):
                each[:, s, r] = (score - clean).float().cpu()
            bar.step(len(group))
    return EdgeScores.of(graph, each, "exact patching", how)


def _without(possible: Tensor, edge: tuple[int, int]) -> Tensor:
    on = possible.clone()
    on[edge] = False
    return on
