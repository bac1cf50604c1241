"""Which attention weights does the answer depend on?

For a score y and every attention weight A (the gradient is that of the unnormalised weight: rows need not keep summing
to 1),

    attention_gradient    A * dy/dA              signed: to first order, what removing the weight takes from y
    gradient_weighted     A * max(0, dy/dA)      Grad-SAM (Barkan et al. 2021)

Both for every kind of attention. Grad-SAM's score of a token is the mean over layers, heads and queries of what it
receives as a key; `token` gives it for both (Barkan et al. leave out padding, which is never in here).

Which tokens does the answer rest on, followed through all layers of attention with its gradients?

Chefer et al. (2021b), "Generic attention-model explainability": relevance starts as the identity for each stack and
every attention adds to it, in the order of the forward pass, with gradients choosing and weighing the heads:

    A_bar = mean over heads of max(0, dy/dA * A)
    self-attention of a stack s        R_ss <- R_ss + A_bar R_ss        R_sq <- R_sq + A_bar R_sq
    cross-attention of s to q          R_sq <- R_sq + N(R_ss)^T A_bar N(R_qq)
    N(R) = I + (R - I) with its rows scaled to sum to 1 (rows of nothing stay nothing)

Paper and released code agree on these (the code's `handle_residual` is N). A classifier is read at the row its head
reads; here rows are weighed by how much the score depends on them (see `answers.rows_read`), which gives that row,
also for pooled means, masks and decoders. Relevance is not additive: it has no completeness, and is never negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.attention.comparing import last_residual, rows_read
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

    >>> attention_gradient(model, "The capital of France is", " Paris").top(3)
    layer head query key query_token key_token weighted token score
    ...
    """
    question = asked(model, prompt, target, against, decoder)
    return _weighted(question, edits, lambda a, g: a * g, "Attention times gradient")


@technique
def gradient_weighted(
    model: Model, prompt: Any, target: Any = None, *, against: Answers | None = None,
    decoder: str | None = None, edits: Sequence[Edit] = (),
) -> Result:  # fmt: skip
    """Attention times the positive part of its gradient (Grad-SAM). Arguments and results as in `attention_gradient`.

    >>> gradient_weighted(model, "The capital of France is", " Paris").token
    <xarray.DataArray 'token' (key: 5)>...
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


@technique
def relevance(
    model: Model, prompt: Any, target: Any = None, *, against: Answers | None = None,
    decoder: str | None = None, edits: Sequence[Edit] = (),
) -> Result:  # fmt: skip
    """Chefer-style relevance of every token for a score (self-attention, cross-attention, encoder-decoders).

    Arguments as in `attention_gradient`. One stack: `relevance` [key], `matrix` [query, key] and `read` [query], the
    weights of the rows. Encoder-decoder: `source` [source_key] beside it, with `source_matrix` [query, source_key] and
    `encoder_matrix` [source_query, source_key].

    >>> relevance(model, "The capital of France is", " Paris").top(3)
    key key_token relevance score
    ...
    """
    question, last = asked(model, prompt, target, against, decoder), last_residual(model)
    found = with_gradients(question, edits, keep=[last] if last else [])
    made = relevances(found)
    main = found.main
    read = rows_read(model, found.run).to(made[main.stack, main.stack])
    query, key = main.tokens
    variables: dict[str, Any] = {
        "relevance": (key, read @ made[main.stack, main.stack]),
        "matrix": ((query, key), made[main.stack, main.stack]),
        "read": (query, read),
    }
    if found.paired:
        variables["source"] = ("source_key", read @ made[main.stack, "encoder"])
        variables["source_matrix"] = ((query, "source_key"), made[main.stack, "encoder"])
        variables["encoder_matrix"] = (("source_query", "source_key"), made["encoder", "encoder"])
    assert found.run.metric is not None
    variables = {n: (dims, values.numpy()) for n, (dims, values) in variables.items()}
    data = labelled(xr.Dataset(variables), found).assign(score=float(found.run.metric[0]))
    return Result(data, kind="attention relevance", title=f"Relevance through attention for {question.name}")


def relevances(found: Attended) -> dict[tuple[str, str], Tensor]:
    """(stack of the rows, stack of the columns) -> R in float64, after the last layer."""
    made: dict[tuple[str, str], Tensor] = {}
    stacks = list(dict.fromkeys(kind.stack for kind in found.kinds))
    events = [
        (stacks.index(kind.stack), layer, kind.area == "cross", kind, i)
        for kind in found.kinds
        for i, layer in enumerate(kind.layers)
    ]
    for *_, kind, i in sorted(events, key=lambda e: e[:3]):
        pattern, gradient = found.values[kind][i].double(), found.gradients[kind][i].double()
        weights = (pattern * gradient).clamp_min(0).mean(0)
        own, (rows, columns) = (kind.stack, kind.stack), weights.shape
        made.setdefault(own, torch.eye(rows, dtype=torch.float64, device=weights.device))
        cross = (kind.stack, "encoder")
        if kind.area == "attn":
            made[own] = made[own] + weights @ made[own]
            if cross in made and cross != own:
                made[cross] = made[cross] + weights @ made[cross]
        else:
            added = normalised(made[own]).T @ weights @ normalised(made["encoder", "encoder"])
            made[cross] = made.get(cross, added.new_zeros(rows, columns)) + added
    return made


def normalised(r: Tensor) -> Tensor:
    """N(R)."""
    rest = r - torch.eye(len(r), dtype=r.dtype, device=r.device)
    total = rest.sum(-1, keepdim=True)
    return torch.eye(len(r), dtype=r.dtype, device=r.device) + rest / torch.where(total > 0, total, 1.0)
