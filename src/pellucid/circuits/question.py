"""What is asked of a model: prompts, what they are contrasted with, and one number for the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        return Stream(s.ids[rows], s.mask[rows], tuple(s.labels[i] for i in rows))

    tensors = {
        k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == batch else v for k, v in inputs.tensors.items()
    }
    return Inputs(tensors, {k: cut(s) for k, s in inputs.streams.items()}, tuple(inputs.texts[i] for i in rows))


def ask(model: Model, prompts: Any, metric: Metric | Any = None, reference: Any = None) -> Question:
    """A question from a task's `Prompts` (which bring corrupted prompts and metric) or from prompts of any
    other form.

    A `reference` or metric given by hand goes before the task's own. InputError without a metric.
    """
    if isinstance(prompts, Prompts):
        metric = prompts.metric() if metric is None else metric
        reference = prompts.corrupted if reference is None else reference
        prompts = prompts.clean
    if metric is None:
        raise InputError("a circuit needs a metric, such as metrics.logit_difference(' Mary', ' John')")
    inputs = model.inputs(prompts)
    return Question(inputs, None if reference is None else model.inputs(reference), model.bind(metric, len(inputs)))
