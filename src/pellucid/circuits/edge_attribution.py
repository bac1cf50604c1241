"""What would exact edge patching say, roughly, for all edges at the price of a few passes?

To first order, switching the edge s -> r off changes the metric by the change of its message times the
gradient at r:

    score(s -> r) = sum over positions of  (message of s - its replacement) . dm/d(input of r)

"eap"                  the gradient on the clean prompts (Syed et al. 2023; attribution patching, Nanda 2023)
"eap-ig-inputs"        its mean over `steps` points k = 0 .. steps-1 between the replaced and the clean
                       embedding, at replaced + k / steps (clean - replaced) (Hanna et al. 2024, as their
                       released code has it)
"eap-ig-activations"   its mean over the same points between the source's own replaced and clean message, for
                       each source, heads of a layer together; costs a pass per step, attention and MLP

No pass with split queries, keys and values is needed: the gradient at the input of a head's query is the
gradient at its columns of the projection, pushed back through the weights and the Jacobian of the norm.
Scores have the sign of `exact_patching`: positive where the edge supports the answer, the opposite of
EAP-IG's released code. Two faults of that code are not repeated: its "mean" hands every source one and the
same vector, and its neuron scores are those of the node.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pellucid.circuits.ablation import How, Recorder, alternatives, messages_of
from pellucid.circuits.execution import wire
from pellucid.circuits.graph import Embedding
from pellucid.circuits.passing import Listener, Score, forward
from pellucid.circuits.question import Question, ask
from pellucid.circuits.scores import EdgeScores, provenance
from pellucid.circuits.wiring import Reading, Wiring
from pellucid.errors import InputError
from pellucid.metrics import Metric
from pellucid.model import Model

Method = Literal["eap", "eap-ig-inputs", "eap-ig-activations"]


def edge_attribution(
    model: Model,
    prompts: Any,
    metric: Metric | Any = None,
    *,
    ablation: How,
    reference: Any = None,
    method: Method = "eap",
    steps: int = 5,
    embedding: Embedding = "whole",
    seed: int = 0,
) -> EdgeScores:
    """Scores of all edges at once. Compare some with `exact_patching`: the estimate can be far off where the
    model is not linear between message and replacement (attention patterns, saturated softmax, zero
    ablation).

    `prompts` are a task's `Prompts`, or prompts with a metric; `reference` are the corrupted prompts of
    "resample" or those a mean is taken over.

    >>> task = tasks.indirect_objects(model.tokenizer)                      # doctest: +SKIP
    >>> scores = edge_attribution(model, task, ablation="resample")         # doctest: +SKIP
    >>> scores.circuit(fraction=0.02) # doctest: +SKIP
    """
    if method not in get_args(Method):
        raise InputError(f"no attribution {method!r}: expected one of {', '.join(get_args(Method))}")
    if steps < 1:
        raise InputError(f"integrated gradients need at least one step, got {steps}")
    wiring = wire(model, embedding)
    question = ask(model, prompts, metric, reference)
    replaced = alternatives(wiring, question.inputs, ablation, question.reference, seed)
    each = {"eap": _plain, "eap-ig-inputs": _over_inputs, "eap-ig-activations": _over_activations}[method](
        wiring, question, replaced, steps
    )
    arguments = {"ablation": ablation, "method": method, "embedding": embedding} | (
        {} if method == "eap" else {"steps": steps}
    )
    about = provenance("edge_attribution", model, question, seed, **arguments)
    return EdgeScores(wiring.graph, each.cpu(), f"edge attribution ({method})", ablation, about)


def _plain(wiring: Wiring, question: Question, replaced: Tensor, steps: int) -> Tensor:
    """The one clean pass gives both the messages and the gradients."""
    difference = replaced if replaced.is_contiguous() else replaced.clone()
    recorder = Recorder(len(wiring.graph.sources), minus=difference)
    pull = gradients(wiring, question, Gradients(recorder=recorder))
    return _dots(wiring, difference, pull)


def _over_inputs(wiring: Wiring, question: Question, replaced: Tensor, steps: int) -> Tensor:
    clean = messages_of(wiring, question.inputs)
    embeds = len(wiring.embeds)
    start, way = replaced[:embeds].clone(), clean[:embeds] - replaced[:embeds]
    difference = clean.neg_().add_(replaced)
    total: Tensor | float = 0.0
    for k in range(steps):
        points = list(start + k / steps * way)
        total = total + _dots(wiring, difference, gradients(wiring, question, Gradients(points=points)))
    assert isinstance(total, Tensor)
    return total / steps


def _over_activations(wiring: Wiring, question: Question, replaced: Tensor, steps: int) -> Tensor:
    clean = messages_of(wiring, question.inputs)
    difference = replaced - clean
    batch = len(question.inputs)
    each = difference.new_zeros(batch, *wiring.graph.possible.shape)
    embeds = len(wiring.embeds)
    bounds = [0, *(w.first for w in wiring.writings), len(wiring.graph.sources)]
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        for k in range(steps):
            moved = (1 - k / steps) * difference[first:last]
            if i == 0:
                listener = Gradients(points=list(clean[:embeds] + moved))
            else:
                listener = Gradients(at=first, push=moved.sum(0) / wiring.writings[i - 1].coefficient)
            found = _dots(wiring, difference, gradients(wiring, question, listener), first, last)
            each[:, first:last] += found[:, first:last] / steps
    return each


# ---- the gradients at every reader's input

Pull = Callable[[Reading], "Tensor | None"]  # a reading -> gradients [reader, batch, position, d]


class Gradients(Listener):
    """Keeps what readers read, as tensors to differentiate by. `points`: embeddings to start from instead of
    the prompts' own; `push`: what is added to the contribution of the sources from `at` on."""

    def __init__(
        self,
        recorder: Recorder | None = None,
        points: list[Tensor] | None = None,
        at: int = -1,
        push: Tensor | None = None,
    ) -> None:
        self.recorder, self.points, self.at, self.push = recorder, points, at, push
        self.met: dict[Reading, tuple[Tensor, Tensor]] = {}

    def embed(self, i: int, x: Tensor) -> Tensor:
        return (x if self.points is None else self.points[i].to(x.dtype)).detach().requires_grad_()

    def wrote(self, first: int, count: int, messages: Callable[[], Tensor]) -> None:
        if self.recorder is not None:
            self.recorder.wrote(first, count, messages)

    def adds(self, first: int, x: Tensor) -> Tensor | None:
        return x + self.push.to(x.dtype) if first == self.at and self.push is not None else None

    def reads(self, reading: Reading, native: Tensor, resid: Tensor) -> Tensor:
        native = native.view_as(native)  # a tensor of its own: what others read of the same stream does not count
        self.met[reading] = (native, resid.detach())
        return native


def gradients(wiring: Wiring, question: Question, listener: Gradients) -> Pull:
    """d(metric, summed over prompts) / d(input of every reader)."""
    score = Score(wiring, question.inputs, question.metric)
    with torch.enable_grad():
        value = score(*forward(wiring, question.inputs, listener, whole=score.whole))
        found = torch.autograd.grad(value.sum(), [native for native, _ in listener.met.values()], allow_unused=True)
    grads = dict(zip(listener.met, found, strict=True))

    def pull(reading: Reading) -> Tensor | None:
        grad = grads[reading]
        return None if grad is None else reading.pull(grad, listener.met[reading][1])

    return pull


def _dots(wiring: Wiring, difference: Tensor, pull: Pull, first: int = 0, last: int | None = None) -> Tensor:
    """[batch, source, reader] minus the difference of each message times the gradient at each reader."""
    each = difference.new_zeros(difference.shape[1], *wiring.graph.possible.shape)
    for reading in wiring.readings:
        stop = reading.feeds if last is None else min(last, reading.feeds)
        with torch.no_grad():
            grad = pull(reading) if stop > first else None
        if grad is not None:
            messages, found = (
                x.flatten(2).transpose(0, 1) for x in (difference[first:stop], grad)
            )  # [batch, *, t * d]
            each[:, first:stop, reading.readers] = (messages @ found.mT).neg_()
    return each
