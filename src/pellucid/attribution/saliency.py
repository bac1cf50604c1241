"""How fast does the answer change as a token's embedding moves?

    g_i = dF/dx_i (x),   attribution_i = |g_i|  (or the sum of its entries, which keeps a sign)

(Simonyan et al. 2014, there the largest entry's size.) The gradient says what an infinitely small change does, not what
the word contributes: where the answer is saturated it is near zero for the very words the answer rests on.

How much of the answer does each token account for, were the model linear?

    attribution_i = sum over d of x_i * dF/dx_i (x)

(Shrikumar et al. 2017; Denil et al. 2015.) The first term of a Taylor series towards the zero embedding: integrated
gradients from zero with a single gradient, taken at the prompt. Nothing makes it add up to the score.

How fast does the answer change as a token's embedding moves, on average around the prompt?

    g_i = mean over n draws of dF/dx_i (x + e),   e ~ N(0, (noise * (max x - min x))^2),   attribution_i = |g_i|

(Smilkov et al. 2017, who average sizes for pictures in their code and gradients in the formula; we follow the formula.)
The standard error is the jackknife's over the draws; for norms, which are positive even where the mean gradient is zero,
compare the attribution with it before reading anything into small values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pellucid.attribution.batches import batched
from pellucid.attribution.case import Case
from pellucid.attribution.path import Embedded
from pellucid.attribution.players import Players
from pellucid.engine.edits import Edit
from pellucid.errors import InputError, one_of
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

Norm = Literal["l2", "l1", "max", "signed"]


@technique
@batched
def saliency(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    norm: Norm = "l2",
    players: Any = "token",
    keep_special: bool = True,
) -> Result:
    """The size of the gradient of the target at each token's embedding, from one forward and backward pass.

    `norm` makes one number of the gradient's entries: "l2", "l1", "max" (the largest size) or "signed" (their sum). A
    word's entries are those of all its tokens. `target`, `against`, `decoder` and `players` are those of
    `integrated_gradients`; fixed tokens (special ones) get 0. InputError for an unknown norm, Refused where the model
    has no gradient.

    Gives `attribution` [position] (or [player]; with [output] in front for a continuation) and `score`.

    >>> saliency(model, "The capital of France is", " Paris").top(3)
    position token special attribution score gradients
    ...
    """
    check(norm)
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
    credited, embedded = Players.of(case, players), Embedded(case)
    score, gradient = embedded.gradients(embedded.values)
    values, labels = pooled(case, credited, size(free(case, gradient[0]), norm), norm)
    return case.result(
        f"Saliency ({norm}) of {case.question.name}",
        {"attribution": values, "score": score[0], "gradients": 1},
        labels=labels, attrs={"norm": norm},
    )  # fmt: skip


def check(norm: str) -> None:
    one_of(norm, Norm, "unknown norm ")


def free(case: Case, values: Tensor) -> Tensor:
    """Values [..., position, d] with zeros at fixed tokens."""
    return values.masked_fill(torch.tensor(case.fixed, device=values.device)[:, None], 0.0)


def size(gradient: Tensor, norm: Norm) -> Tensor:
    """One number for the last dimension."""
    wide = gradient.double()
    if norm == "signed":
        return wide.sum(-1).cpu()
    if norm == "max":
        return wide.abs().amax(-1).cpu()
    return wide.norm(dim=-1, p=1 if norm == "l1" else 2).cpu()


def pooled(case: Case, players: Players, sizes: Tensor, norm: Norm) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """The same norm over a player's tokens, from theirs [..., position]."""
    values = sizes.numpy()
    if players.unit == "token":
        return values, None
    if norm == "l2":
        return np.sqrt(players.pool(values**2)), players.labels
    if norm == "max":
        return np.stack([values[..., list(g)].max(-1) for g in players.members], -1), players.labels
    return players.pool(values), players.labels


@technique
@batched
def gradient_x_input(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    players: Any = "token",
    keep_special: bool = True,
) -> Result:
    """The product of each token's embedding with the gradient there, from one forward and backward pass.

    `target`, `against`, `decoder` and `players` are those of `integrated_gradients`; fixed tokens (special ones) get 0.
    Refused where the model has no gradient.

    Gives `attribution` [position] (or [player]; with [output] in front for a continuation) and `score`.

    >>> gradient_x_input(model, "The capital of France is", " Paris").top(3)
    position token special attribution score gradients
    ...
    """
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
    credited, embedded = Players.of(case, players), Embedded(case)
    score, gradient = embedded.gradients(embedded.values)
    values, labels = credited.pooled(case, (free(case, gradient[0]) * embedded.values).double().sum(-1).cpu())
    return case.result(
        f"Gradient x input of {case.question.name}",
        {"attribution": values, "score": score[0], "gradients": 1}, labels=labels,
    )  # fmt: skip


@technique
@batched
def smoothgrad(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    draws: int = 50,
    noise: float = 0.1,
    norm: Norm = "l2",
    players: Any = "token",
    keep_special: bool = True,
    seed: int = 0,
) -> Result:
    """The gradient at each token's embedding, averaged over noisy copies of the prompt.

    The noise's standard deviation is `noise` times the range of the prompt's embedding values; fixed tokens (special
    ones) get none, and no credit. The other options are those of `saliency`. InputError for fewer than two draws or
    noise that is not positive.

    Gives `attribution` and its standard `error` [position] (or [player]; with [output] in front for a continuation),
    and `score`, that of the prompt.

    >>> smoothgrad(model, "The capital of France is", " Paris", draws=20, seed=1).error
    <xarray.DataArray 'error' (position: 5)>...
    """
    check(norm)
    if draws < 2 or noise <= 0:
        raise InputError(f"draws={draws}, noise={noise}: expected at least 2 draws and noise above 0")
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
    credited, embedded = Players.of(case, players), Embedded(case)
    with torch.no_grad():
        score = embedded.scores(embedded.values)[0]
    gradients = _gradients(embedded, draws, noise, seed)  # [sample, output, position, d]
    total = gradients.double().sum(0)
    values, labels = pooled(case, credited, size(total / draws, norm), norm)
    without = torch.stack(
        [torch.as_tensor(pooled(case, credited, size((total - g) / (draws - 1), norm), norm)[0]) for g in gradients]
    )
    error = ((draws - 1) * (without - without.mean(0)).square().mean(0)).sqrt()
    return case.result(
        f"SmoothGrad ({norm}) of {case.question.name}",
        {"attribution": values, "error": error, "score": score, "gradients": draws, "evaluations": 1},
        labels=labels, attrs={"norm": norm},
    )  # fmt: skip


def _gradients(embedded: Embedded, draws: int, noise: float, seed: int) -> Tensor:
    x, case = embedded.values, embedded.case
    spread = noise * float(x.max() - x.min())
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows in torch.arange(draws).split(embedded.batches(draws)):
        drawn = spread * torch.randn(len(rows), *x.shape[1:], generator=generator)
        found.append(free(case, embedded.gradients(x + free(case, drawn.to(x)))[1]))
    return torch.cat(found)
