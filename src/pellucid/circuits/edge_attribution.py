"""What would exact edge patching say, roughly, for all edges at the price of a few passes?

To first order, switching the edge s -> r off changes the metric by the change of its message times the
gradient at r:

    effect(s -> r) = sum over positions of  (replacement of s's message - the message) . dm/d(input of r)

"eap"                  the gradient on the clean prompts (Syed et al. 2023; attribution patching, Nanda 2023)
"eap-ig-inputs"        its mean over `steps` points k = 0 .. steps-1 between the replaced and the clean
                       embedding, at replaced + k / steps (clean - replaced) (Hanna et al. 2024, as their
                       released code has it)
"eap-ig-activations"   its mean over the same points between the source's own replaced and clean message, for
                       each source, heads of a layer together; costs a pass per step, attention and MLP

No pass with split queries, keys and values is needed: the gradient at the input of a head's query is the
gradient at its columns of the projection, pushed back through the weights and the Jacobian of the norm.
Effects have the sign of `exact_patching` and of everything here, switched off minus on: negative where the edge
supports the answer, as in EAP-IG's released code. Two faults of that code are not repeated: its "mean" hands every source one and the
same vector, and its neuron scores are those of the node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid.causal.contrast import Asked, ask
from pellucid.circuits.ablation import How, Recorder, alternatives, means_of, messages_of, partners
from pellucid.circuits.away import get_question, get_split, put_question
from pellucid.circuits.execution import MEMORY, chunks, wire
from pellucid.circuits.graph import Split
from pellucid.circuits.nodes import places
from pellucid.circuits.passing import Listener, Score, forward
from pellucid.circuits.scores import EdgeScores
from pellucid.circuits.wiring import Reading, Stage, Wiring
from pellucid.engine.pausing import pause, progress
from pellucid.errors import InputError, one_of
from pellucid.metrics import Metric
from pellucid.model import Model
from pellucid.technique import technique
from pellucid.workers.errand import Errand, Tensors, Values, Work, done
from pellucid.workers.job import get_metric, put_metric

Method = Literal["eap", "eap-ig-inputs", "eap-ig-activations"]


@technique
def edge_attribution(
    model: Model,
    prompts: Any,
    metric: Metric | Any = None,
    *,
    how: How,
    reference: Any = None,
    method: Method = "eap",
    steps: int = 5,
    split: Split | None = None,
    seed: int = 0,
) -> EdgeScores:
    """Scores of all edges at once. Compare some with `exact_patching`: the estimate can be far off where the
    model is not linear between message and replacement (attention patterns, saturated softmax, zero
    ablation).

    `prompts` are a task's `Prompts`, or prompts with a metric; `reference` are the corrupted prompts of
    "resample" or those a mean is taken over.

    >>> task = pl.tasks.indirect_objects(model.tokenizer, 8)
    >>> scores = edge_attribution(model, task, how="resample")
    >>> scores.circuit(fraction=0.02)
    <Circuit of 4 of 222 edges (1.8%), ... nodes>
    """
    one_of(method, Method, "no attribution ")
    if steps < 1:
        raise InputError(f"integrated gradients need at least one step, got {steps}")
    wiring = wire(model, split)
    question = ask(model, prompts, metric, reference)
    if how == "resample":  # each prompt with its own
        question = replace(question, reference=partners(question.inputs, question.reference, seed))
    shared = means_of(wiring, question, how)
    errand = Errand(model, "circuits.edge_attribution:Portions", partial(_said, question, wiring, how, shared, method, steps),
                    Portions.of(wiring, question, how, shared, method, steps))  # fmt: skip
    portions = _portions(wiring, question)
    each = []
    for _, found in progress(done(errand, portions), "portions of the prompts", len(portions)):
        each.append(found["scores"])
    return EdgeScores.of(wiring.graph, torch.cat(each), f"edge attribution ({method})", how)


def _portions(wiring: Wiring, question: Asked) -> list[list[int]]:
    """Prompts whose messages take about `MEMORY` bytes; all, where the metric may know them all."""
    batch, d = len(question.inputs), wiring.model.anatomy.stacks[-1].d_model
    one = 2 * 4 * len(wiring.base.sources) * wiring.width(question.inputs) * d
    size = batch if question.metric.rows([0]) is None else max(1, MEMORY // one)
    return [list(rows) for rows in chunks(range(batch), size)]


class Portions(Work):
    """Attributes the edges of some of the prompts; a piece is their numbers."""

    errand = "edge attribution"

    def __init__(self, model: Model, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        question = get_question(model, about, tensors, get_metric(about["metric"], tensors))
        shared = tensors.get("shared")
        self._begin(wire(model, get_split(about)), question, about["how"], shared, about["method"], about["steps"])

    @classmethod
    def of(cls, *given: Any) -> Portions:
        made = cls.__new__(cls)
        made._begin(*given)
        return made

    def _begin(
        self, wiring: Wiring, question: Asked, how: How, shared: Tensor | None, method: Method, steps: int
    ) -> None:
        self.wiring, self.question, self.how, self.shared, self.steps = wiring, question, how, shared, steps
        self.method = {"eap": _plain, "eap-ig-inputs": _over_inputs, "eap-ig-activations": _over_activations}[method]

    def first(self) -> Tensors:
        with torch.no_grad():
            metric = self.question.metric
            return {"clean": self.wiring.model.score(self.wiring.model.run(self.question.inputs), metric)}

    def __call__(self, piece: Sequence[int]) -> Tensors:
        question, whole = self.question, len(piece) == len(self.question.inputs)
        if not whole:
            reference = question.reference.rows(piece) if self.how == "resample" and question.reference else None
            metric = question.metric.rows(piece)
            assert metric is not None
            question = Asked(question.inputs.rows(piece), reference, metric)
        if self.shared is not None:
            replaced = self.shared.expand(-1, len(self.question.inputs), -1, -1)[:, piece]
        else:
            replaced = alternatives(self.wiring, question.inputs, self.how, question.reference)
        return {"scores": self.method(self.wiring, question, replaced, self.steps).cpu()}


def _said(question: Asked, wiring: Wiring, how: How, shared: Tensor | None, method: Method, steps: int) -> Values:
    about, tensors = put_question(question, wiring.graph.split)
    if shared is not None:
        tensors["shared"] = shared.contiguous()
    about |= {"metric": put_metric(question.metric, tensors), "how": how, "method": method, "steps": steps}
    return about, tensors


def _plain(wiring: Wiring, question: Asked, replaced: Tensor, steps: int) -> Tensor:
    """The one clean pass gives both the messages and the gradients."""
    difference = replaced if replaced.is_contiguous() else replaced.clone()
    recorder = Recorder(len(wiring.base.sources), wiring.width(question.inputs), minus=difference)
    listener = Gradients(recorder=recorder)
    return _dots(wiring, question, difference, gradients(wiring, question, listener))


def _over_inputs(wiring: Wiring, question: Asked, replaced: Tensor, steps: int) -> Tensor:
    clean = messages_of(wiring, question.inputs)
    embeds = wiring.embedding
    start, way = replaced[embeds], clean[embeds] - replaced[embeds]
    difference = clean.neg_().add_(replaced)
    total: Tensor | float = 0.0
    for k in progress(range(steps), "steps"):
        listener = Gradients(points=list(start + k / steps * way))
        total = total + _dots(wiring, question, difference, gradients(wiring, question, listener))
    assert isinstance(total, Tensor)
    return total / steps


def _over_activations(wiring: Wiring, question: Asked, replaced: Tensor, steps: int) -> Tensor:
    """Sources that write together move together: the embedding, the heads of an attention, an MLP with its
    neurons."""
    clean = messages_of(wiring, question.inputs)
    difference = replaced - clean
    embeds = wiring.embedding
    total: Tensor | float = 0.0
    groups = [
        (span.start, span.start + sum(span.start <= e < span.stop for e in embeds), None)
        for span in wiring.spans().values()
    ]
    for first, last, writing in [*groups, *((w.first, w.first + w.count, w) for w in wiring.writings)]:
        for k in progress(range(steps), "steps"):
            moved = (1 - k / steps) * difference[first:last]
            if writing is None:
                points = clean.clone()
                points[first:last] += moved
                listener = Gradients(points=list(points[embeds]))
            else:
                push = moved[:, :, : wiring.length(question.inputs, writing.stack)].sum(0) / writing.coefficient
                listener = Gradients(at=first, push=push)
            listener = gradients(wiring, question, listener)
            total = total + _dots(wiring, question, difference, listener, first, last)
    assert isinstance(total, Tensor)
    return total / steps


# ---- the gradients at every reader's input


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
        self.streams: dict[Stage, Tensor] = {}
        self.pulled: dict[Reading, Tensor | None] = {}

    def embed(self, i: int, x: Tensor) -> Tensor:
        point = x if self.points is None else self.points[i][:, : x.shape[-2]].to(x.dtype)
        return point.detach().requires_grad_()

    def wrote(self, first: int, count: int, messages: Callable[[], Tensor]) -> None:
        if self.recorder is not None:
            self.recorder.wrote(first, count, messages)

    def adds(self, first: int, x: Tensor) -> Tensor | None:
        return x + self.push.to(x.dtype) if first == self.at and self.push is not None else None

    def passes(self, stage: Stage, x: Tensor) -> None:
        self.streams[stage] = x.detach()

    def reads(self, reading: Reading, native: Tensor, resid: Tensor) -> Tensor:
        native = native.view_as(native)  # a tensor of its own: what others read of the same stream does not count
        self.met[reading] = (native, resid.detach())
        return native


def gradients(wiring: Wiring, question: Asked, listener: Gradients) -> Gradients:
    """The listener, with `pulled`: d(metric, summed over prompts) / d(what a reading is computed into)."""
    pause()
    wiring.model.anatomy.check_gradients()
    score = Score(wiring, question.inputs, question.metric)
    with torch.enable_grad():
        value = score(*forward(wiring, question.inputs, listener, whole=score.whole))
        found = torch.autograd.grad(value.sum(), [native for native, _ in listener.met.values()], allow_unused=True)
    listener.pulled = dict(zip(listener.met, found, strict=True))
    return listener


def _dots(
    wiring: Wiring,
    question: Asked,
    difference: Tensor,
    listener: Gradients,
    lowest: int = 0,
    highest: int | None = None,
) -> Tensor:
    """[batch, source, reader] the difference of each message times the gradient at each reader, which
    comes back to an early source through the norms between. For the sources from `lowest` up to `highest`."""
    split = wiring.graph.split
    where = places(question.inputs, split.positions).to(difference.device)
    base = wiring.base.possible.shape
    each = difference.new_zeros(difference.shape[1], *base, max(1, len(split.places)))
    for reading in wiring.readings:
        grad = listener.pulled[reading]
        if grad is None or reading.feeds <= lowest:
            continue
        with torch.no_grad():
            grad = reading.pull(grad, listener.met[reading][1])
            for stage in reversed(wiring.stages[reading.stack]):
                last = min(stage.last, reading.feeds)
                if stage.first >= last:
                    continue
                if stage.norm is not None and last == stage.last:
                    grad = stage.norm.pull(listener.streams[stage], grad)
                first, last = max(stage.first, lowest), last if highest is None else min(last, highest)
                if first < last:
                    own = difference[first:last, :, : grad.shape[2]]
                    each[:, first:last, reading.readers] = _products(own, grad, where, each.shape[-1])
    return wiring.graph.unfold(each)


def _products(messages: Tensor, grad: Tensor, where: Tensor, places: int) -> Tensor:
    """[batch, source, reader, place] sums of products over width, and over the positions of each place."""
    if places == 1:
        return (messages.flatten(2).transpose(0, 1) @ grad.flatten(2).transpose(0, 1).mT)[..., None]
    tokens = torch.einsum("sbtd,rbtd->bsrt", messages, grad)
    found = tokens.new_zeros(*tokens.shape[:3], places)
    return found.scatter_add_(3, where[:, None, None].expand_as(tokens), tokens)
