"""How much of the answer does each token account for, were the model linear?

    attribution_i = sum over d of x_i * dF/dx_i (x)

(Shrikumar et al. 2017; Denil et al. 2015.) The first term of a Taylor series towards the zero embedding: integrated
gradients from zero with a single gradient, taken at the prompt. Nothing makes it add up to the score.
"""

from __future__ import annotations

from typing import Any

from pellucid.attribution.case import Case
from pellucid.attribution.path import Embedded
from pellucid.attribution.players import Players
from pellucid.attribution.saliency import free
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
def gradient_x_input(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    players: Any = "token",
    keep_special: bool = True,
) -> Result:
    """The product of each token's embedding with the gradient there, from one forward and backward pass.

    `target`, `against`, `decoder` and `players` are those of `integrated_gradients`; fixed tokens (special ones) get 0.
    Refused where the model has no gradient.

    Gives `attribution` [position] (or [player]; with [output] in front for a continuation) and `score`.

    >>> gradient_x_input(model, "The capital of France is", " Paris").top(3)  # doctest: +SKIP
    """
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special)
    credited, embedded = Players.of(case, players), Embedded(case)
    score, gradient = embedded.gradients(embedded.values)
    values, labels = credited.pooled(case, (free(case, gradient[0]) * embedded.values).double().sum(-1).cpu())
    return case.result(
        f"Gradient x input of {case.question.name}",
        {"attribution": values, "score": score[0], "gradients": 1}, labels=labels,
    )  # fmt: skip
