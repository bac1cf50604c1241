"""What does each token add to the answer, on average over all orders in which the prompt could be put together?

    attribution_i = mean over orders of  v(those before i, and i) - v(those before i)

The Shapley value (Shapley 1953; Castro et al. 2009 for the sampling) of the game v of `pellucid.attribution.game`. Every
single order adds up to v(all) - v(none), so the estimate does exactly. Orders are drawn in pairs, each with its reverse
(antithetic: what is early in one is late in the other), and the standard error is that over pairs.

`exact_shapley` asks for all 2^n coalitions of up to 12 players instead.

Shapley values as a weighted regression on masked prompts.

    attribution = argmin over w of  sum over S of k(S) * (v(S) - v(none) - w . 1_S)^2,   sum of w = v(all) - v(none)
    k(S) = (n - 1) / (C(n, |S|) |S| (n - |S|))

Kernel SHAP (Lundberg and Lee 2017). The constraint is kept exactly, by elimination (their code and Captum's give the
empty and the full coalition a large weight instead). Coalitions are drawn with probability k(S), each with its
complement (Covert and Lee 2021), and weigh the same then; if all of them fit into the draws, all are asked for, and
the values are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.attribution.absence import absence
from pellucid.attribution.batches import batched
from pellucid.attribution.case import Case
from pellucid.attribution.game import Coalitions
from pellucid.engine.edits import Edit
from pellucid.errors import InputError
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import weights as resampled
from pellucid.technique import technique

MOST = 12  # players whose coalitions can all be asked for


@technique
@batched
def shapley(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
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

    >>> shapley(model, "The capital of France is", " Paris", draws=10).top(3)
    position token special attribution error score baseline_score evaluations
    ...
    """
    if draws < 2 or draws % 2:
        raise InputError(f"draws={draws}: expected an even number of them, as each comes with its reverse")
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
    game = absence(case, players, baseline, seed=seed, checkpoint=checkpoint)
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(len(game.players)) for _ in range(draws // 2)]
    orders = torch.tensor(np.array([order for one in drawn for order in (one, one[::-1])]))
    value, error = paired(marginals(game, orders))
    return game.result(
        f"Shapley values of {case.question.name}", {"attribution": value, "error": error},
    )  # fmt: skip


@technique
@batched
def exact_shapley(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    players: Any = "token",
    baseline: Any = None,
    keep_special: bool = True,
    checkpoint: str | Path | None = None,
) -> Result:
    """Shapley values from all coalitions of at most 12 players. Options are those of `occlusion`.

    InputError for more players. Gives `attribution` [player] (or [position] of tokens; with [output] in front for a
    continuation), which adds up to `score` - `baseline_score`, and `evaluations`, 2^players.

    >>> exact_shapley(model, "The capital of France is", " Paris").top(3)
    position token special attribution score baseline_score evaluations
    ...
    """
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
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


RESAMPLES = 200  # of the bootstrap
ROOM = 16  # no more than 2^16 coalitions are listed


@technique
@batched
def kernel_shap(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    players: Any = "token",
    draws: int = 200,
    baseline: Any = None,
    keep_special: bool = True,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """Shapley values by regression on `draws` masked variants of the prompt (an even number).

    The other options are those of `occlusion`. InputError if there are fewer draws than twice the players, which
    would leave the regression undetermined.

    Gives `attribution` [player] (or [position] of tokens; with [output] in front for a continuation) and its standard
    `error` by bootstrap over pairs (0 where all coalitions were asked for); they add up to `score` - `baseline_score`
    exactly. `evaluations` counts the variants of the prompt that were run.

    >>> kernel_shap(model, "The capital of France is", " Paris", draws=64).top(3)
    position token special attribution error score baseline_score evaluations
    ...
    """
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
    game = absence(case, players, baseline, seed=seed, checkpoint=checkpoint)
    n = len(game.players)
    complete = n <= ROOM and 2**n - 2 <= draws
    if not complete and (draws < 2 * n or draws % 2):
        raise InputError(
            f"draws={draws} for {n} players: expected an even number, at least {2 * n}; or use larger players"
        )
    rng = np.random.default_rng(seed)
    present, weights = _all(n) if complete else (draw(n, draws, rng), torch.ones(draws).double())
    values = game(torch.cat([torch.ones(1, n), torch.zeros(1, n), present]))
    rise, above = values[0] - values[1], values[2:] - values[1]
    found = solve(present, above, weights[None], rise, game.seen)[0]
    error = torch.zeros_like(found)
    if not complete:
        pairs = draws // 2
        times = torch.tensor(resampled(pairs, RESAMPLES, seed)).repeat_interleave(2, 1)
        error = solve(present, above, weights * times, rise, game.seen).std(0)
    return game.result(
        f"Kernel SHAP values of {case.question.name}", {"attribution": found, "error": error},
    )  # fmt: skip


def draw(players: int, draws: int, rng: np.random.Generator) -> Tensor:
    """[sample, player] coalitions by the Shapley kernel, each followed by its complement."""
    sizes = np.arange(1, players)
    chance = 1 / (sizes * (players - sizes))
    present = torch.zeros(draws, players)
    for i, size in enumerate(rng.choice(sizes, draws // 2, p=chance / chance.sum())):
        present[2 * i, rng.choice(players, size, replace=False)] = 1
        present[2 * i + 1] = 1 - present[2 * i]
    return present


def _all(players: int) -> tuple[Tensor, Tensor]:
    """Every coalition but the empty and the full one, with its kernel."""
    present = coalitions(players)[1:-1].float()
    sizes = present.sum(1).double()
    return present, 1 / (_choose(players, sizes) * sizes * (players - sizes))


def _choose(n: int, k: Tensor) -> Tensor:
    return (torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)).exp()


def solve(present: Tensor, above: Tensor, weights: Tensor, rise: Tensor, seen: Tensor) -> Tensor:
    """[fit, output, player] of the constrained regressions with weights [fit, sample]: by Lagrange's multiplier.

    w = A^-1 (b - 1 (1' A^-1 b - rise) / (1' A^-1 1)),   A = sum k 1_S 1_S',   b = sum k 1_S (v(S) - v(none))

    An output gives nothing to players it has not seen [output, player]: their Shapley value is known to be 0."""
    x = present.double()
    gram = torch.einsum("fs,si,sj->fij", weights, x, x)
    right = torch.einsum("fs,si,so->foi", weights, x, above)
    found = torch.zeros_like(right)
    for kept in seen.unique(dim=0):
        columns, outputs = kept.nonzero().flatten(), (seen == kept).all(1).nonzero().flatten()
        if len(columns) == 1:
            found[:, outputs, columns] = rise[outputs]
            continue
        inverse = torch.linalg.pinv(gram[:, columns[:, None], columns], hermitian=True)
        free, one = right[:, outputs[:, None], columns] @ inverse, inverse.sum(2)[:, None]
        missed = free.sum(2, keepdim=True) - rise[outputs, None]
        found[:, outputs[:, None], columns] = free - one * missed / one.sum(2, keepdim=True)
    return found
