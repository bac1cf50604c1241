"""What is asked by a causal method? Prompts, others they are contrasted with, and one number (or several) for the answer.

A task (`pellucid.tasks.Prompts`) brings all of it, and its named spans. Several metrics, a mapping name -> metric, are one
metric of several outputs: a sweep under all of them is still one sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.engine.inputs import Inputs
from pellucid.engine.run import Run
from pellucid.errors import InputError
from pellucid.metrics import AnswerMetric, BoundMetric, Metric, placed
from pellucid.model import Model
from pellucid.question import Continuation, Question, continuation, measured, together
from pellucid.tasks import Prompts

Metrics = Metric | Callable[[Tensor], Tensor] | Mapping[str, Metric | Callable[[Tensor], Tensor]]


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts, what they are contrasted with (corrupted prompts, or those that stand in for what is switched off), a
    metric, and the names of its outputs where it is several."""

    inputs: Inputs
    reference: Inputs | None
    metric: BoundMetric
    names: tuple[str, ...] = ()

    def sides(self, denoise: bool) -> tuple[Inputs, Inputs]:
        """What is run, and what it is patched from."""
        assert self.reference is not None
        return (self.reference, self.inputs) if denoise else (self.inputs, self.reference)

    def score(self, model: Model, run: Run) -> np.ndarray:
        """The metric [prompt] or [prompt, output] of a run of them."""
        return numbers(model.score(run, self.metric))


def ask(
    model: Model,
    prompts: Any,
    metric: Metrics | Any = None,
    reference: Any = None,
    *,
    decoder: Any = None,
    several: bool = False,
    aligned: bool = False,
) -> Asked:
    """A question from a task's `Prompts` (which bring corrupted prompts and metric) or from prompts of any other form.

    The metric may be any target that attribution takes but a reading: an answer (" Paris", a class, a span's text), `label`,
    `similarity`, or a `continuation`, which is then put behind the prompt and behind its counterpart. A `reference` or metric given by hand goes before the task's own; named spans hold there too where it is `aligned`.
    InputError without a metric, and for a mapping of metrics unless `several` are wanted.
    """
    spans = None
    if isinstance(prompts, Prompts):
        metric = prompts.metric() if metric is None else metric
        reference = prompts.corrupted if reference is None else reference
        prompts, spans = prompts.clean, prompts.spans
    if metric is None:
        raise InputError(
            "this needs a metric, such as metric=pellucid.metrics.logit_difference(' Mary', ' John'), or a task "
            "(pellucid.tasks.Prompts), which brings one"
        )
    inputs = model.inputs(prompts, decoder=decoder, spans=spans)
    other = None
    if reference is not None:
        other = model.inputs(reference, decoder=decoder, spans=spans if aligned else None)
    if isinstance(metric, Mapping):
        if any(isinstance(each, Continuation) for each in metric.values()):
            raise InputError(
                "a continuation is put behind the prompt, so it cannot be one of several metrics: ask it alone"
            )
        metric = {name: measured(model, inputs, each) for name, each in metric.items()}
    elif isinstance(metric, Continuation):
        question = Question.of(model, inputs, metric)
        if other is not None and (aligned or len(other) == 1):
            same = continuation(question.answers[0].ids, of=metric.of)
            other = Question.of(model, other, same).inputs
        inputs, metric = question.inputs, together(question, metric)
    else:
        metric = measured(model, inputs, metric)
    for each in metric.values() if isinstance(metric, Mapping) else [metric]:
        known = isinstance(each, AnswerMetric)
        if known and aligned and other is not None and placed(model, other, each) != placed(model, inputs, each):
            raise InputError(
                "clean and corrupted prompts are answered at different places: put the mask at the same token of both"
            )
    if not isinstance(metric, Mapping):
        return Asked(inputs, other, model.bind(metric, len(inputs), inputs))
    if not several or not metric:
        raise InputError(f"expected one metric, got {len(metric)} in a mapping: give one at a time")
    return Asked(inputs, other, joined(model, metric, inputs), tuple(metric))


def contrast(
    model: Model, clean: Any, corrupted: Any = None, metric: Metrics | Any = None, decoder: Any = None
) -> Asked:
    """Clean and corrupted prompts that align, pair by pair. `clean` may be `tasks.Prompts`, which brings all three.

    InputError where something is missing or prompts do not align; it shows where they part.
    """
    if not isinstance(clean, Prompts) and (corrupted is None or metric is None):
        raise InputError(
            "give clean and corrupted prompts and a metric, or a task (pellucid.tasks.Prompts) with all three"
        )
    asked = ask(model, clean, metric, corrupted, decoder=decoder, several=True, aligned=True)
    check_aligned(*asked.sides(denoise=False))
    return asked


def check_aligned(clean: Inputs, corrupted: Inputs) -> None:
    """InputError unless prompts come in pairs of equal token length; it shows where they part."""
    if len(clean) != len(corrupted):
        raise InputError(f"{len(clean)} clean but {len(corrupted)} corrupted prompts: give them in pairs")
    for name in clean.streams:
        for i, (a, b) in enumerate(zip(clean.streams[name].labels, corrupted.streams[name].labels, strict=True)):
            if len(a) != len(b):
                first = next(j for j, (x, y) in enumerate(zip_longest(a, b)) if x != y)
                near = slice(max(0, first - 1), first + 3)
                shown = [" ".join(map(repr, labels[near])) for labels in (a, b)]
                raise InputError(
                    f"pair {i} does not align: clean has {len(a)} tokens and corrupted {len(b)}; from token {first} on "
                    f"clean is ... {shown[0]} ... and corrupted ... {shown[1]} ...; choose words of equal token length"
                )
        if not torch.equal(clean.streams[name].mask, corrupted.streams[name].mask):
            raise InputError(
                "clean and corrupted prompts are padded differently: pad both on the same side, equally far"
            )


# ---- several metrics


def joined(model: Model, metrics: Mapping[str, Any], inputs: Inputs) -> BoundMetric:
    """Several metrics as one of as many outputs, which reads what they read together."""
    parts = [model.bind(metric, len(inputs), inputs) for metric in metrics.values()]
    name, size = ", ".join(metrics), len(parts)
    if any(part.outputs is not None for part in parts):
        raise InputError("a metric of several outputs cannot be one of several metrics: name its outputs apart")
    if len({part.classes for part in parts}) > 1:
        raise InputError("metrics of a classifier and of tokens cannot share a sweep: their logits differ")
    if parts[0].classes or any(part.positions is None for part in parts):
        read = partial(_whole, parts, None if parts[0].classes else inputs.stream("").mask)
        return BoundMetric(name, None, None, read, parts[0].classes, size)
    positions = tuple(dict.fromkeys(p for part in parts for p in part.positions or ()))
    tokens = [part.tokens for part in parts if part.tokens is not None]
    rows = max((len(each) for each in tokens), default=1)
    together = torch.cat([each.expand(rows, -1) for each in tokens], 1) if len(tokens) == size else None
    return BoundMetric(name, positions, together, partial(_read, parts, positions, together is None), outputs=size)


def _whole(parts: Sequence[BoundMetric], mask: Tensor | None, logits: Tensor) -> Tensor:
    """[prompt, metric] from all logits as they lie in the batch."""
    return torch.stack([part.score(logits, mask) for part in parts], 1)


def _read(parts: Sequence[BoundMetric], positions: tuple[int, ...], whole: bool, logits: Tensor) -> Tensor:
    """[prompt, metric] from logits [prompt, position, token] at all their positions, for the `whole` vocabulary or for
    their tokens side by side."""
    scores, start = [], 0
    for part in parts:
        z = logits[:, [positions.index(p) for p in part.positions or ()]]
        if part.tokens is not None and whole:
            z = z.gather(2, part.tokens.to(z.device)[:, None].expand(*z.shape[:2], -1))
        elif part.tokens is not None:
            z = z[..., start : start + part.tokens.shape[1]]
            start += part.tokens.shape[1]
        scores.append(part(z))
    return torch.stack(scores, 1)


# ---- small things


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def beside(checkpoint: str | Path | None, name: object) -> Path | None:
    """The file of one of several sweeps that a method keeps.

    >>> str(beside("trace", 2)), beside(None, 2)
    ('trace.2', None)
    """
    return None if checkpoint is None else Path(f"{checkpoint}.{name}")
