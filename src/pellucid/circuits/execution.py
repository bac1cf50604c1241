"""What does the model answer when only some edges carry their message?

Every reader reads the sum of all messages, where each edge that is off brings its replacement instead:

    input of r = residual + sum over edges s -> r that are off of  (replacement of s - message of s)

Messages are those of the run itself, so a changed head changes what it sends on. The model stays as it is:
the change is made where each reader takes the stream in (`pellucid.circuits.wiring`). Masks may be fractions
between on and off, and gradients flow to them. Several masks run as one batch, from the first layer where an
edge is off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.opening import main_output
from pellucid.anatomy.proofs import TOLERANCE
from pellucid.circuits.ablation import How, alternatives, messages_of
from pellucid.circuits.graph import Embedding
from pellucid.circuits.passing import Listener, Score, forward
from pellucid.circuits.question import Question, chosen
from pellucid.circuits.wiring import Reading, Wiring, find_wiring
from pellucid.engine.inputs import Inputs, read_inputs
from pellucid.engine.recording import Recording, record
from pellucid.engine.stubbed import skipping
from pellucid.errors import Refused
from pellucid.metrics import as_metric
from pellucid.model import Model


def wire(model: Model, embedding: Embedding = "whole") -> Wiring:
    """The wiring of a model, found and proven once: every edge off must give the logits the replacements come
    from.

    Refused with the reason where a reader has no input of its own, or where the proof fails.
    """
    known: dict[str, Wiring] = vars(model).setdefault("_wirings", {})  # lives and dies with the model
    if embedding not in known:
        wiring = find_wiring(model, embedding)
        prove(wiring)
        known[embedding] = wiring
    return known[embedding]


def prove(wiring: Wiring) -> None:
    """On the probe's two prompts: with every edge on, the logits of one; with every edge off, those of the
    other."""
    tensors = wiring.model.anatomy.inputs
    one, other = (read_inputs(wiring.model.module, None, {k: _row(v, i) for k, v in tensors.items()}) for i in (0, 1))
    free = as_metric(lambda logits: logits.flatten(1)[:, 0]).bind(None, 1)
    runner = Runner(wiring, Question(one, other, free), messages_of(wiring, other))
    on = wiring.graph.possible.to(runner.replacements.dtype)
    with torch.no_grad():
        wanted = [main_output(wiring.model.module(**each.tensors)) for each in (one, other)]
    for mask, want in zip((on, 0 * on), wanted, strict=True):
        made = runner.run(mask)[1]
        assert made is not None
        gap = float((made - want).abs().max() / want.abs().max().clamp_min(1e-6))
        if not gap <= 30 * TOLERANCE.get(want.dtype, 4e-2):
            raise Refused(
                "circuits are refused on this model: something besides heads, MLPs and logits reads the "
                f"residual stream (with {'all' if mask is on else 'no'} edges on, logits are {gap:.1e} off)"
            )


def _row(value: Any, i: int) -> Any:
    return value[i : i + 1] if isinstance(value, Tensor) and value.ndim else value


class Masked(Listener):
    """Edits what every reader reads. `off` [variant, source, reader] is 1 where an edge is off."""

    def __init__(self, runner: Runner, off: Tensor, start: int) -> None:
        self.off, self.start, self.batch = off, start, len(runner.question.inputs)
        self.replacements, self.clean = runner.replacements, runner.clean
        self.differences: list[tuple[int, Tensor]] = []
        self.totals: dict[
            int, Any
        ] = {}  # number of sources -> the sum of their differences [variant, batch, position, d]
        self.sum: Any = 0.0
        self.learnt = off.requires_grad and torch.is_grad_enabled()
        self.cut = runner.wiring.graph.possible if self.learnt else off.any(0)  # [source, reader]
        self.needed = self.cut.any(1)
        self.graph = runner.wiring.graph
        if start:
            assert self.clean is not None
            first = next(r.feeds for r in self.graph.readers if r.layer == start)
            clean = self.clean
            self._add(0, first, lambda: clean[:first].repeat(1, len(off), 1, 1))

    def _add(self, first: int, count: int, messages: Callable[[], Tensor]) -> None:
        if bool(self.needed[first : first + count].any()):
            theirs = self.replacements[first : first + count, None]
            difference = theirs - messages().unflatten(1, (-1, self.batch))
            self.differences.append((first, difference))
            self.sum = self.sum + difference.sum(0)
        self.totals[first + count] = self.sum

    def wrote(self, first: int, count: int, messages: Callable[[], Tensor]) -> None:
        if not (self.start and self.graph.sources[first].layer < self.start):
            self._add(first, count, messages)

    def reads(self, reading: Reading, native: Tensor, resid: Tensor) -> Tensor | None:
        if reading.layer < self.start:
            return None
        cut = self.cut[: reading.feeds, reading.readers].any(0).tolist()
        if not any(cut):
            return None
        reading = reading.only([i for i, c in enumerate(cut) if c])
        off = self.off[:, : reading.feeds, reading.readers]
        change = self._change(off, reading.feeds)
        return reading.value(resid + change.transpose(0, 1).flatten(1, 2), native)

    def _change(self, off: Tensor, feeds: int) -> Tensor:
        """[variant, reader, batch, position, d] the sum of differences of the edges that are off, or, where
        those are the many, the sum of all differences minus those of the edges that are on."""
        many = not self.learnt and float(off.mean()) > 0.5
        weight = off - 1 if many else off
        change = self.totals[feeds][:, None] if many else None
        for first, difference in self.differences:
            here = weight[:, first : first + len(difference)]
            if first >= feeds:
                continue
            rows = torch.ones(here.shape[1], dtype=torch.bool) if self.learnt else here.any(0).any(1)
            if not bool(rows.any()):
                continue
            if not bool(rows.all()):
                here, difference = here[:, rows], difference[rows]
            part = (here.mT @ difference.flatten(2).transpose(0, 1)).unflatten(2, difference.shape[2:])
            change = part if change is None else change + part
        assert change is not None
        return change


class Runner:
    """Runs circuits on the prompts of a question. `forwards` counts what it cost, in full passes of those
    prompts."""

    def __init__(self, wiring: Wiring, question: Question, replacements: Tensor) -> None:
        self.wiring, self.question, self.replacements = wiring, question, replacements
        self.score = Score(wiring, question.inputs, question.metric)
        self.forwards = 0.0
        self.clean: Tensor | None = None
        self._recording: Recording | None = None

    @classmethod
    def of(cls, wiring: Wiring, question: Question, ablation: How, seed: int = 0) -> Runner:
        made = alternatives(wiring, question.inputs, ablation, question.reference, seed)
        return cls(wiring, question, made)

    def scores(self, on: Tensor) -> Tensor:
        """The metric [variant, batch] under each mask [variant, source, reader] (1 on, 0 off; booleans or
        numbers)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and on.requires_grad):
            return self.score(*self.run(on, whole=self.score.whole))

    def run(self, on: Tensor, whole: bool = True) -> tuple[Tensor, Tensor | None]:
        """The last residual as the logits read it, and the logits, [variant * batch, ...]."""
        on = on if on.ndim == 3 else on[None]
        on = on.to(self.replacements)
        off = (1 - on) * self.wiring.graph.possible.to(on.device)
        start = 0 if torch.is_grad_enabled() and off.requires_grad else self._start(off)
        blocks = len(self.wiring.entries)
        self.forwards += len(off) * (blocks - start) / blocks
        context = nullcontext()
        if start:
            self._prepare()
            context = skipping(self.wiring.model.anatomy, self._recording, start, len(off), len(self.question.inputs))  # type: ignore[assignment]
        grad = torch.is_grad_enabled() and off.requires_grad
        with torch.set_grad_enabled(grad), context:
            return forward(self.wiring, self._grown(len(off)), Masked(self, off, start), whole=whole)

    def _start(self, off: Tensor) -> int:
        """The first layer with an edge off into it; layers before it are as in the clean run."""
        cut = off.any(0).any(0).tolist()
        layers = [r.layer for r, c in zip(self.wiring.graph.readers, cut, strict=True) if c]
        return min([*layers, len(self.wiring.entries) - 1])

    def _prepare(self) -> None:
        if self._recording is None:
            stack = self.wiring.model.anatomy.stacks[0]
            self._recording = record(self.wiring.model.anatomy, stack, self.question.inputs)
            self.clean = messages_of(self.wiring, self.question.inputs)

    def _grown(self, n: int) -> Inputs:
        return chosen(self.question.inputs, list(range(len(self.question.inputs))) * n)


def chunks(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def capacity(runner: Runner, memory: int = 400 << 20) -> int:
    """How many masks to run as one batch, so that the messages of all take about `memory` bytes."""
    one = runner.replacements.numel() * runner.replacements.element_size()
    return max(1, min(64, memory // max(1, 2 * one)))
