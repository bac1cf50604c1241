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

from pellucid.attention.answers import Target, scored
from pellucid.attention.patterns import Attended, attended, labelled, single, stacked
from pellucid.engine.edits import Edit
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
def attention_gradient(
    model: Model, prompt: Any, target: Target | None = None, *, against: Answers | None = None,
    decoder: str | None = None, edits: Sequence[Edit] = (),
) -> Result:  # fmt: skip
    """Attention times its gradient, signed.

    `target` is a token or class (minus `against`) or any metric; by default the prediction. `decoder` is the decoder's
    text in an encoder-decoder. Dimensions and names are those of `patterns` (`weighted` for `pattern`), in units of the
    score; `token` [key] is the mean received by each token, `source_token` that of source tokens. Raises as `patterns`
    does; InputError for targets that are not one token.

    >>> attention_gradient(model, "The capital of France is", " Paris").top(3)  # doctest: +SKIP
    """
    return _weighted(model, prompt, target, against, decoder, edits, lambda a, g: a * g, "attention_gradient")


@technique
def gradient_weighted(
    model: Model, prompt: Any, target: Target | None = None, *, against: Answers | None = None,
    decoder: str | None = None, edits: Sequence[Edit] = (),
) -> Result:  # fmt: skip
    """Attention times the positive part of its gradient (Grad-SAM). Arguments and results as in `attention_gradient`.

    >>> gradient_weighted(model, "The capital of France is", " Paris").token  # doctest: +SKIP
    """
    return _weighted(
        model, prompt, target, against, decoder, edits, lambda a, g: a * g.clamp_min(0), "gradient_weighted"
    )


def with_gradients(
    model: Model, inputs: Any, target: Target | None, against: Answers | None, edits: Sequence[Edit],
    keep: Sequence[str] = (),
) -> tuple[Attended, str]:  # fmt: skip
    """The patterns of one prompt with the gradients of the score, and the score's name."""
    score = scored(model, inputs, target, against)
    return attended(model, inputs, edits, grad_of=score, keep=keep), score.name


def _weighted(
    model: Model, prompt: Any, target: Target | None, against: Answers | None, decoder: str | None,
    edits: Sequence[Edit], product: Callable[[Tensor, Tensor], Tensor], method: str,
) -> Result:  # fmt: skip
    inputs = single(model, prompt, decoder)
    found, name = with_gradients(model, inputs, target, against, edits)
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
    title = (
        f"{'Attention times gradient' if method == 'attention_gradient' else 'Gradient-weighted attention'} of {name}"
    )
    return Result(data, kind="gradient-weighted attention", title=title)
