"""What is asked of a model: prompts, what they are contrasted with, and one number for the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.engine.inputs import Inputs, Stream
from pellucid.errors import InputError
from pellucid.metrics import BoundMetric, Metric
from pellucid.model import Model
from pellucid.tasks.prompts import Prompts


@dataclass(frozen=True, eq=False)
class Question:
    """Prompts, the reference their messages are replaced from (corrupted prompts, or those to average over),
    a metric."""

    inputs: Inputs
    reference: Inputs | None
    metric: BoundMetric


def chosen(inputs: Inputs, index: Sequence[int]) -> Inputs:
    """Some of the prompts, in any order and as often as wanted, as inputs of their own."""
    rows, batch = list(index), len(inputs)

    def cut(s: Stream) -> Stream:
        spans = {name: [each[i] for i in rows] for name, each in s.spans.items()}
        return Stream(s.ids[rows], s.mask[rows], tuple(s.labels[i] for i in rows), spans)

    tensors = {
        k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == batch else v for k, v in inputs.tensors.items()
    }
    return Inputs(tensors, {k: cut(s) for k, s in inputs.streams.items()}, tuple(inputs.texts[i] for i in rows))


def ask(model: Model, prompts: Any, metric: Metric | Any = None, reference: Any = None) -> Question:
    """A question from a task's `Prompts` (which bring corrupted prompts and metric) or from prompts of any
    other form.

    A `reference` or metric given by hand goes before the task's own. InputError without a metric.
    """
    spans = None
    if isinstance(prompts, Prompts):
        spans = prompts.spans
        metric = prompts.metric() if metric is None else metric
        reference = prompts.corrupted if reference is None else reference
        prompts = prompts.clean
    if metric is None:
        raise InputError("a circuit needs a metric, such as metrics.logit_difference(' Mary', ' John')")
    inputs = model.inputs(prompts, spans=spans)
    return Question(inputs, None if reference is None else model.inputs(reference), model.bind(metric, len(inputs)))


def places(inputs: Inputs, positions: Sequence[str]) -> Tensor:
    """[batch, position] which of some addresses each position belongs to; none of them: len(positions), the rest.

    InputError where two of them name the same position.
    """
    stream = inputs.stream("")
    found = torch.full(stream.ids.shape, len(positions))
    for i, at in enumerate(positions):
        columns = stream.find(int(at) if re.fullmatch(r"-?\d+", at) else at)
        if columns is None:
            raise InputError(f"'@{at}' is every position: expected some, such as -1 or a span of the prompts")
        rows = torch.arange(len(columns))[:, None]
        taken = found[rows, columns.cpu()]
        if bool((taken < len(positions)).any()):
            both = positions[int(taken.min())]
            raise InputError(f"'@{both}' and '@{at}' name the same position of a prompt: positions must not overlap")
        found[rows, columns.cpu()] = i
    return found
