"""How steep is the metric at what each variant of a sweep puts in place?

A sweep with gradients: variants run on the same rungs as in `pellucid.engine.sweep`, resumed and packed, and one backward
pass for each batch gives every variant the gradient of its own metric. Variants do not meet, so their sum serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pellucid.anatomy.modes import evaluating
from pellucid.engine.edits import Edit, Place
from pellucid.engine.pausing import progress
from pellucid.engine.sweep import Plan
from pellucid.errors import InputError


@dataclass(frozen=True, eq=False)
class Leaf(Edit):
    """Puts in what `function` makes of the values there, cut off from them: gradients end here."""

    function: Callable[[Tensor], Tensor]
    put: list[Tensor] = field(default_factory=list)

    def new(self, x: Tensor, place: Place) -> Tensor:
        self.put.append(self.function(x).detach().requires_grad_())
        return self.put[-1]


@dataclass(frozen=True, eq=False)
class Slope:
    """Of variant `index`: `score` [batch] and the gradient of its sum at the values put in, [batch, n, ...]."""

    index: int
    score: Tensor
    gradient: Tensor


def slopes(plan: Plan, leaves: Sequence[Leaf]) -> Iterator[Slope]:
    """The slope of every variant of a plan, each of which is one of `leaves`; in the order they are computed.

    InputError for a metric without a gradient.
    """
    plan.job.anatomy.check_gradients()
    with torch.no_grad():
        plan.settle()
        plan.rung.clean(plan.job)  # recorded without a graph
    with evaluating(plan.job.anatomy.module), progress[None](what="runs", total=len(leaves)) as bar:
        for chunk in plan.chunks(plan.variants):
            with torch.enable_grad():
                scores = [plan.metric(read) for read in plan.logits(chunk)]
                whole = torch.stack(scores)
                if not whole.requires_grad:
                    raise InputError(
                        "this metric has no gradient (it counts, or reads nothing that was computed with gradients)"
                    )
                found = torch.autograd.grad(whole.sum(), [leaves[v.index].put[-1] for v in chunk])
            for variant, score, gradient in zip(chunk, scores, found, strict=True):
                leaves[variant.index].put.clear()
                yield Slope(variant.index, score.detach(), gradient)
            bar.step(len(chunk))
    plan.job.forget()
