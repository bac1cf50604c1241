"""Which linear function of "this word is there" mimics the model around the prompt?

    attribution = argmin over w of  sum over S of k(S) * (v(S) - w0 - w . 1_S)^2 + ridge * |w|^2

LIME (Ribeiro et al. 2016). Coalitions S of players are drawn as its code does for text: how many are absent is uniform
on 1 to all, then which. The kernel is on the vector of presences, of cosine distance to "all there":

    k(S) = sqrt(exp(-d^2 / width^2)),   d = 1 - sqrt(|S| / players)

which is what the code computes (the paper has no root). Words that occur twice are players of their own. The weights are
no contributions: they need not add up to anything, and the surrogate's R2 says how far they can be believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.attribution.absence import absence
from pellucid.attribution.batches import batched
from pellucid.attribution.case import Case
from pellucid.engine.edits import Edit
from pellucid.errors import InputError
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import weights as resampled
from pellucid.technique import technique

RESAMPLES = 200  # of the bootstrap


@technique
@batched
def lime(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    players: Any = "token",
    draws: int = 200,
    width: float = 0.25,
    ridge: float = 1.0,
    baseline: Any = None,
    keep_special: bool = True,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """The weights of a local linear surrogate fitted to `draws` masked variants of the prompt.

    `width` is the kernel's, `ridge` the penalty on weights (not on the intercept). The other options are those of
    `occlusion`. InputError for fewer than two draws, or a width or ridge out of range.

    Gives `attribution`, the weights [player] (or [position] of tokens; with [output] in front for a continuation), with
    their bootstrap standard `error` and 95 % interval `low` to `high`; `intercept`, the weighted `r2` of the surrogate,
    `score`, `baseline_score` and `evaluations`.

    >>> lime(model, "The capital of France is", " Paris", draws=100).r2
    <xarray.DataArray 'r2' ()>...
    """
    if draws < 2 or width <= 0 or ridge < 0:
        raise InputError(
            f"draws={draws}, width={width}, ridge={ridge}: expected 2 draws, a width above 0, no negative ridge"
        )
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
    game = absence(case, players, baseline, seed=seed, checkpoint=checkpoint)
    present = draw(len(game.players), draws, seed)
    values = game(torch.cat([torch.zeros_like(present[:1]), present]))[1:]  # [sample, output]
    weights = kernel(present, width)
    coefficients = fit(present, values, weights[None], ridge, game.seen)[0]  # [1 + player, output]
    fitted = coefficients[0] + present.double() @ coefficients[1:]
    times = torch.tensor(resampled(draws, RESAMPLES, seed))
    again = fit(present, values, weights * times, ridge, game.seen)[:, 1:].transpose(1, 2)  # [resample, output, player]
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    return game.result(
        f"LIME weights for {case.question.name}",
        {"attribution": coefficients[1:].T, "error": again.std(0), "low": low, "high": high,
         "intercept": coefficients[0], "r2": _r2(values, fitted, weights)},
        attrs={"kernel": f"sqrt(exp(-d^2 / {width}^2)), d the cosine distance of presences"},
    )  # fmt: skip


def draw(players: int, draws: int, seed: int) -> Tensor:
    """[sample, player] 1 where present; the first is the prompt itself."""
    rng = np.random.default_rng(seed)
    present = torch.ones(draws, players)
    for row, absent in zip(present[1:], rng.integers(1, players + 1, draws - 1), strict=True):
        row[rng.choice(players, absent, replace=False)] = 0
    return present


def kernel(present: Tensor, width: float) -> Tensor:
    """[sample]"""
    distance = 1 - present.double().mean(1).sqrt()
    return (-(distance**2) / width**2).exp().sqrt()


def fit(present: Tensor, values: Tensor, weights: Tensor, ridge: float, seen: Tensor) -> Tensor:
    """Weighted ridge regressions: [fit, 1 + player, output] from weights [fit, sample]; the intercept comes first. Each
    output is regressed on the players it has seen [output, player]."""
    x = torch.cat([torch.ones(len(present), 1), present], 1).double()
    penalty = ridge * torch.eye(x.shape[1], dtype=x.dtype)
    penalty[0, 0] = 0
    gram = torch.einsum("fs,si,sj->fij", weights.double(), x, x) + penalty
    right = torch.einsum("fs,si,so->fio", weights.double(), x, values.double())
    found = torch.zeros_like(right)
    for kept in seen.unique(dim=0):
        columns = torch.cat([torch.zeros(1, dtype=torch.long), kept.nonzero().flatten() + 1])
        outputs = (seen == kept).all(1).nonzero().flatten()
        solved = (
            torch.linalg.pinv(gram[:, columns[:, None], columns], hermitian=True) @ right[:, columns[:, None], outputs]
        )
        found[:, columns[:, None], outputs] = solved
    return found


def _r2(values: Tensor, fitted: Tensor, weights: Tensor) -> Tensor:
    """[output] the share of the weighted variance that the surrogate explains."""
    w = weights[:, None] / weights.sum()
    mean = (w * values).sum(0)
    return 1 - (w * (values - fitted).square()).sum(0) / (w * (values - mean).square()).sum(0)
