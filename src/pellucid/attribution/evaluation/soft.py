"""What if every token is taken away a little, in proportion to its score?

Tokens are not kept or dropped whole: each dimension of a token's embedding is kept with a probability that follows the
token's score a (scaled to 0..1 over the prompt), and is that of the baseline otherwise (Zhao and Aletras 2023):

    sufficiency: kept with a          Soft-NS = (Soft-S - S(0)) / (1 - S(0)),  Soft-S = 1 - max(0, v(N) - v(kept))
    comprehensiveness: kept with 1-a  Soft-NC = Soft-C / (1 - S(0)),  Soft-C = max(0, v(N) - v(kept))

where S(0) = 1 - max(0, v(N) - v(0)) is the sufficiency of nothing. With D = max(0, v(N) - v(0)) that is

    Soft-NS = 1 - max(0, v(N) - v(kept)) / D        Soft-NC = max(0, v(N) - v(kept)) / D

so any target serves, not only a probability; where D = 0 there is nothing to explain, and both are NaN. More is better
for both. The paper's baseline is the zero embedding; here it is that of the game. Both are means over draws of which
dimensions are kept, with their standard errors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pellucid.attribution.absence import Absence, Replaced

Values = tuple[dict[str, float], dict[str, float]]


def soft(world: Absence, scores: Mapping[str, np.ndarray], draws: int = 20, seed: int = 0) -> dict[str, Values]:
    """For each method the two values and their standard errors; nothing where absence is no single embedding."""
    if not isinstance(world, Replaced) or len(world.games) > 1:
        return {}
    rise = max(0.0, float((world.all - world.none).sum()))
    found: dict[str, Values] = {}
    for name, values in scores.items():
        kept = unit(values)
        fallen = {}
        for metric, chance in (("soft comprehensiveness", 1 - kept), ("soft sufficiency", kept)):
            v = perturbed(world, chance, draws, seed)
            world.evaluations += draws
            lost = np.maximum(0.0, float(world.all.sum()) - v) / rise if rise > 0 else np.full(draws, np.nan)
            fallen[metric] = lost if metric == "soft comprehensiveness" else 1 - lost
        means = {metric: float(each.mean()) for metric, each in fallen.items()}
        errors = {
            metric: float(each.std(ddof=1)) / draws**0.5 if draws > 1 else float("nan")
            for metric, each in fallen.items()
        }
        found[name] = means, errors
    return found


def unit(scores: np.ndarray) -> np.ndarray:
    """Scaled to 0..1; one half where all are equal.

    >>> unit(np.array([-1.0, 0.0, 1.0]))
    array([0. , 0.5, 1. ])
    """
    span = float(np.ptp(scores))
    return (scores - scores.min()) / span if span > 0 else np.full(len(scores), 0.5)


def perturbed(world: Replaced, chance: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """v [draw] with each dimension of a player's tokens kept with its chance [player]."""
    game = world.games[0]
    own, absent = game.embedded.values, game.baseline.values
    keep = torch.ones(own.shape[1])
    for group, p in zip(world.players.members, chance, strict=True):
        keep[list(group)] = float(p)
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for rows in torch.arange(draws).split(game.embedded.batches(draws)):
        there = torch.rand(len(rows), *own.shape[1:], generator=generator) < keep[:, None]
        with torch.no_grad():
            made.append(game.embedded.scores(torch.where(there.to(own.device), own, absent)).double().cpu())
    return torch.cat(made).sum(1).numpy()
