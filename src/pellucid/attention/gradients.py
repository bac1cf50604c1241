"""Which attention weights does the answer depend on?

For a score y and every attention weight A (the gradient is that of the unnormalised weight: rows need not keep summing
to 1),

    attention_gradient    A * dy/dA              signed: to first order, what removing the weight takes from y
    gradient_weighted     A * max(0, dy/dA)      Grad-SAM (Barkan et al. 2021)

Both for every kind of attention. Grad-SAM's score of a token is the mean over layers, heads and queries of what it
receives as a key; `token` gives it for both (Barkan et al. leave out padding, which is never in here).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.attention.patterns import Attended, asked, attended, labelled, stacked
from pellucid.engine.edits import Edit
from pellucid.errors import InputError
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.question import Question
from pellucid.results import Result
from pellucid.technique import technique


@technique
def attention_gradient(
    model: Model, prompt: Any, target: Any = None, *, against: Answers | None = None,
    decoder: str | None = None, edits: Sequence[Edit] = (),
) -> Result:  # fmt: skip
    """Attention times its gradient, signed.

    `target`, `against` and `decoder` (the decoder's text in an encoder-decoder) are those of `pellucid.question`. Dimensions and names are those of `patterns` (`weighted` for `pattern`), in units of the
    score; `token` [key] is the mean received by each token, `source_token` that of source tokens. Raises as `patterns`
    does; InputError for targets that are not one token.

    >>> attention_gradient(model, "The capital of France is", " Paris").top(3)  # doctest: +SKIP
    """
    question = asked(model, prompt, target, against, decoder)
    return _weighted(question, edits, lambda a, g: a * g, "Attention times gradient")


@technique
def gradient_weighted(
    model: Model, prompt: Any, target: Any = None, *, against: Answers | None = None,
    decoder: str | None = None, edits: Sequence[Edit] = (),
) -> Result:  # fmt: skip
    """Attention times the positive part of its gradient (Grad-SAM). Arguments and results as in `attention_gradient`.

    >>> gradient_weighted(model, "The capital of France is", " Paris").token  # doctest: +SKIP
    """
    question = asked(model, prompt, target, against, decoder)
    return _weighted(question, edits, lambda a, g: a * g.clamp_min(0), "Gradient-weighted attention")


def with_gradients(question: Question, edits: Sequence[Edit], keep: Sequence[str] = ()) -> Attended:
    """The patterns of one prompt with the gradients of the score. InputError where a site is read instead of logits."""
    if question.metric is None:
        raise InputError(f"the gradient of attention is taken of an answer or a metric, not of a {question.kind}")
    return attended(question.model, question.inputs, edits, grad_of=question.metric, keep=keep)


def _weighted(
    question: Question, edits: Sequence[Edit], product: Callable[[Tensor, Tensor], Tensor], what: str
) -> Result:
    found = with_gradients(question, edits)
    variables: dict[str, Any] = {}
    received: dict[str, list[np.ndarray]] = {}
    for kind in found.kinds:
        values = stacked([product(a, g) for a, g in zip(found.values[kind], found.gradients[kind], strict=True)])
        variables["weighted" if kind == found.main else kind.variable] = (kind.dims, values.numpy())
        received.setdefault(kind.tokens[1], []).append(torch.nanmean(values, dim=(0, 1, 2)).numpy())
    order = sorted(variables, key=lambda name: name != "weighted")
    tokens = {key.replace("key", "token"): (key, np.mean(rows, 0)) for key, rows in received.items()}
    data = labelled(xr.Dataset({**{n: variables[n] for n in order}, **tokens}), found)
    assert found.run.metric is not None
    data = data.assign(score=float(found.run.metric[0]))
    title = f"{what} of {question.name}"
    return Result(data, kind="gradient-weighted attention", title=title)
