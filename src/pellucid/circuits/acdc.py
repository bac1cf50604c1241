"""Which edges can be cut, one after the other, without the answer changing much?

ACDC (Conmy et al. 2023): from the logits back to the embedding, for each reader and each of its edges (latest
source first), switch the edge off; if the answer moves by less than a threshold, leave it off.

    distance "metric"   how much the metric differs from the whole model's, in mean absolute value over
                        prompts
    distance "kl"       the mean KL divergence of the prediction at the last token from the whole model's

Verdicts are those of the sequential algorithm, but found for less: a pass starts at the reader's layer,
because all edges before it are still on, and several edges are tried in one batch as if those before them had
been cut; the batch counts up to the first that has to stay, and batches grow only while everything is cut. An edge
whose cut leaves what its reader computes the same to the bit is cut without a run: everything before the reader
is as in the clean run, so this is known from its own projection.
`forwards` in the circuit's `attrs` says what it cost, in full passes of the prompts (a run from block l of L on counts
(L - l) / L, and every variant of a batch counts, tried in vain or not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid.causal.contrast import ask
from pellucid.circuits.ablation import How
from pellucid.circuits.circuit import Circuit
from pellucid.circuits.execution import Runner, capacity, wire
from pellucid.circuits.graph import Split
from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.metrics import Metric
from pellucid.model import Model
from pellucid.technique import technique

Distance = Literal["metric", "kl"]
Far = Callable[[Tensor], Tensor]  # masks [variant, source, reader] -> [variant] how far the answer has moved


@technique
def acdc(
    model: Model,
    prompts: Any,
    metric: Metric | Any = None,
    *,
    threshold: float,
    how: How,
    reference: Any = None,
    distance: Distance = "metric",
    split: Split | None = None,
    batch: int = 8,
    seed: int = 0,
) -> Circuit:
    """The circuit that is left at a threshold. `scores` of kept edges: how much more the answer moved when
    each was cut.

    `batch`: how many edges are tried at once at most; 1 is the algorithm as published. The verdicts are the
    same.

    >>> acdc(model, prompts, threshold=0.05, how="resample")
    <Circuit of ... of 222 edges ...>
    """
    if not threshold > 0:
        raise InputError(f"a threshold must be positive, got {threshold}: it is how far the answer may move")
    wiring = wire(model, split)
    question = ask(model, prompts, metric, reference)
    runner = Runner.of(wiring, question, how, seed)
    on, scores = cut(runner, _distance(runner, distance), threshold, min(batch, capacity(runner)))
    return Circuit(wiring.graph, on, scores, how, {"forwards": runner.forwards})


def acdc_scores(thresholds: Sequence[float], circuits: Sequence[Circuit]) -> Tensor:
    """[source, reader] the largest threshold at which each edge was still kept, 0 where never: a ranking of
    the edges."""
    best = torch.zeros(circuits[0].on.shape)
    for threshold, circuit in sorted(zip(thresholds, circuits, strict=True), key=lambda pair: pair[0]):
        best[circuit.on] = threshold
    return best


def cut(runner: Runner, far: Far, threshold: float, batch: int) -> tuple[Tensor, Tensor]:
    """(edges left on, how much more each one's cut moved the answer)."""
    graph = runner.wiring.graph
    on, scores = graph.possible.clone(), torch.zeros(graph.possible.shape)
    now = 0.0
    for r in progress(range(len(graph.readers) - 1, -1, -1), "readers"):
        if graph.readers[r].kind != "logits" and not any(bool(on[i].any()) for i in graph.owners(r)):
            on[:, r] = False  # nobody hears what this reader is for: its edges cannot matter
            continue
        quiet = runner.silent(on, r)
        on[quiet, r] = False
        waiting, size = on[:, r].nonzero().flatten().flip(0).tolist(), 1
        while waiting:
            tried = waiting[:size]
            masks = on.repeat(len(tried), 1, 1)
            for i, s in enumerate(tried):
                masks[i:, s, r] = False
            stopped = len(tried)
            for i, value in enumerate(far(masks).tolist()):
                if value - now >= threshold:
                    scores[tried[i], r] = value - now
                    stopped = i
                    break
                now = value
            for s in tried[:stopped]:
                on[s, r] = False
            size = min(batch, 2 * size) if stopped == len(tried) else 1
            waiting = waiting[stopped + 1 :] if stopped < len(tried) else waiting[stopped:]
    return on, scores


def _distance(runner: Runner, distance: Distance) -> Far:
    graph = runner.wiring.graph
    if distance == "metric":
        clean = runner.scores(graph.possible)
        return lambda masks: (runner.scores(masks) - clean).abs().mean(1)
    if distance != "kl":
        raise InputError(f"no distance {distance!r}: expected 'metric' or 'kl'")
    stream = runner.question.inputs.stream("")
    last = stream.starts + stream.lengths - 1
    rows = torch.arange(len(last))

    def answers(masks: Tensor) -> Tensor:
        _, logits = runner.run(masks)
        assert logits is not None
        return logits.unflatten(0, (-1, len(last)))[:, rows, last].float().log_softmax(-1)

    with torch.no_grad():
        clean = answers(graph.possible)
    return lambda masks: (
        torch.nn.functional.kl_div(answers(masks), clean.expand(len(masks), -1, -1), reduction="none", log_target=True)
        .sum(-1)
        .mean(-1)
    )
