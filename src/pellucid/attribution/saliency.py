"""How fast does the answer change as a token's embedding moves?

    g_i = dF/dx_i (x),   attribution_i = |g_i|  (or the sum of its entries, which keeps a sign)

(Simonyan et al. 2014, there the largest entry's size.) The gradient says what an infinitely small change does, not what
the word contributes: where the answer is saturated it is near zero for the very words the answer rests on.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pellucid.attribution.case import Case
from pellucid.attribution.path import Embedded
from pellucid.attribution.players import Players
from pellucid.errors import InputError
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

Norm = Literal["l2", "l1", "max", "signed"]


@technique
def saliency(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
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

    >>> saliency(model, "The capital of France is", " Paris").top(3)  # doctest: +SKIP
    """
    check(norm)
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special)
    credited, embedded = Players.of(case, players), Embedded(case)
    score, gradient = embedded.gradients(embedded.values)
    values, labels = pooled(case, credited, size(free(case, gradient[0]), norm), norm)
    return case.result(
        f"Saliency ({norm}) of {case.question.name}",
        {"attribution": values, "score": score[0], "gradients": 1},
        labels=labels, attrs={"norm": norm},
    )  # fmt: skip


def check(norm: str) -> None:
    if norm not in get_args(Norm):
        raise InputError(f"unknown norm {norm!r}: expected one of {', '.join(get_args(Norm))}")


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
