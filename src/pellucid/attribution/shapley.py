"""What does each token add to the answer, on average over all orders in which the prompt could be put together?

    attribution_i = mean over orders of  v(those before i, and i) - v(those before i)

The Shapley value (Shapley 1953; Castro et al. 2009 for the sampling) of the game v of `pellucid.attribution.game`. Every
single order adds up to v(all) - v(none), so the estimate does exactly. Orders are drawn in pairs, each with its reverse
(antithetic: what is early in one is late in the other), and the standard error is that over pairs.

`exact_shapley` asks for all 2^n coalitions of up to 12 players instead.
"""

from __future__ import annotations

from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.attribution.absence import absence
from pellucid.attribution.case import Case
from pellucid.attribution.game import Coalitions
from pellucid.errors import InputError
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

MOST = 12  # players whose coalitions can all be asked for


@technique
def shapley(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    players: Any = "token",
    draws: int = 20,
    baseline: Any = None,
    keep_special: bool = True,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """Shapley values estimated from random orders; each costs as many runs as there are players, less one.

    `draws` is even, as each order comes with its reverse. The other options are those of `occlusion`.
    InputError for an odd or non-positive number.

    Gives `attribution` [player] (or [position] of tokens; with [output] in front for a continuation) and its standard
    `error` (NaN for a single pair); they add up to `score` - `baseline_score` exactly. `evaluations` counts the variants
    of the prompt that were run.

    >>> shapley(model, "The capital of France is", " Paris", draws=10).top(3)  # doctest: +SKIP
    """
    if draws < 2 or draws % 2:
        raise InputError(f"draws={draws}: expected an even number of them, as each comes with its reverse")
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special)
    game = absence(case, players, baseline, seed=seed, checkpoint=checkpoint)
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(len(game.players)) for _ in range(draws // 2)]
    orders = torch.tensor(np.array([order for one in drawn for order in (one, one[::-1])]))
    value, error = paired(marginals(game, orders))
    return game.result(
        f"Shapley values of {case.question.name}", {"attribution": value, "error": error},
    )  # fmt: skip


@technique
def exact_shapley(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    players: Any = "token",
    baseline: Any = None,
    keep_special: bool = True,
    checkpoint: str | Path | None = None,
) -> Result:
    """Shapley values from all coalitions of at most 12 players. Options are those of `occlusion`.

    InputError for more players. Gives `attribution` [player] (or [position] of tokens; with [output] in front for a
    continuation), which adds up to `score` - `baseline_score`, and `evaluations`, 2^players.

    >>> exact_shapley(model, "The capital of France is", " Paris").top(3)  # doctest: +SKIP
    """
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special)
    game = absence(case, players, baseline, checkpoint=checkpoint)
    n = len(game.players)
    if n > MOST:
        raise InputError(
            f"{n} players have 2^{n} coalitions: exact Shapley values take at most {MOST}; "
            "use shapley(...), or larger players such as 'word' or spans"
        )
    values = game(coalitions(n))
    return game.result(f"Shapley values of {case.question.name}", {"attribution": exact(values, n)})


def marginals(game: Coalitions, orders: Tensor) -> Tensor:
    """[order, output, player] what each player adds when it joins those before it in each order [order, player]."""
    n = orders.shape[1]
    rank = orders.argsort(1)  # [order, player] when each joins
    present = rank[:, None, :] < torch.arange(n + 1)[:, None]  # [order, joined, player]
    values = game(present.flatten(0, 1).float()).unflatten(0, (len(orders), n + 1))
    steps = values.diff(dim=1)  # [order, step, output]
    return steps.gather(1, rank[..., None].expand(-1, -1, steps.shape[2])).transpose(1, 2)


def paired(found: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over orders and its standard error, where every second order is the reverse of the one before."""
    pairs = found.unflatten(0, (-1, 2)).mean(1)
    nothing = torch.full_like(pairs[0], float("nan"))
    return pairs.mean(0), pairs.std(0) / len(pairs) ** 0.5 if len(pairs) > 1 else nothing


def coalitions(n: int) -> Tensor:
    """[2^n, n]: row s has the players whose bits are set in s."""
    return (torch.arange(2**n)[:, None] >> torch.arange(n)) % 2


def exact(values: Tensor, n: int) -> Tensor:
    """[output, player] from the values [2^n, output] of all coalitions."""
    members = coalitions(n).bool()
    sizes = members.sum(1)
    weight = torch.tensor([factorial(s) * factorial(n - s - 1) / factorial(n) for s in range(n)], dtype=torch.float64)
    found = []
    for i in range(n):
        without = (~members[:, i]).nonzero().flatten()
        found.append((weight[sizes[without], None] * (values[without + 2**i] - values[without])).sum(0))
    return torch.stack(found, 1)
