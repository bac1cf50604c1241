"""What does the answer lose when a token is taken out?

    attribution_i = v(all) - v(all but i)

Leave-one-out (Zeiler and Fergus 2014; Li et al. 2016) on the game v of `pellucid.attribution.game`, where what is taken
out is replaced by the baseline. A token whose news another one repeats gets little, though the answer may rest on the
two. With a window several neighbours are taken out together, and a token gets the mean over the windows it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pellucid.attribution.absence import absence
from pellucid.attribution.batches import batched
from pellucid.attribution.case import Case
from pellucid.engine.edits import Edit
from pellucid.errors import InputError
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
@batched
def occlusion(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    players: Any = "token",
    window: int = 1,
    stride: int = 1,
    baseline: Any = None,
    keep_special: bool = True,
    checkpoint: str | Path | None = None,
) -> Result:
    """The drop of the target when each player (or each stretch of `window` players) is replaced by the baseline.

    `players` are "token", "word", "sentence" or spans (see `Players.of`); windows start at every `stride`-th of them
    (the last one ends with the last player). `baseline` says what absent means: "pad", "mask", any token, "zero", "mean", a
    prompt or ids put in its place; "remove" leaves it out, "resample" draws what could stand there (see
    `pellucid.attribution.absence`); by default the first of "mask", "pad" that the tokenizer has, else "mean". `checkpoint` is a
    file that keeps what is done, so that an interrupted run continues. InputError if the stride leaves gaps.

    Gives `attribution` [position] (or [player]; with [output] in front for a continuation), `score`, `baseline_score`
    (everything absent) and `evaluations`, the variants of the prompt that were run.

    >>> occlusion(model, "The capital of France is", " Paris", players="word").top(3)
    player text attribution score baseline_score evaluations
    ...
    """
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
    game = absence(case, players, baseline, checkpoint=checkpoint)
    there = _windows(len(game.players), window, stride)
    whole, nothing = torch.ones(1, len(game.players)), torch.zeros(1, len(game.players))
    values = game(torch.cat([whole, nothing, 1 - there]))
    drops = values[0] - values[2:]  # [window, output]
    share = there / there.sum(0)
    return game.result(f"Occlusion of {case.question.name}", {"attribution": drops.T @ share.double()})


def _windows(players: int, window: int, stride: int) -> torch.Tensor:
    """[window, player] 1 on the players of each."""
    if not 1 <= stride <= window:
        raise InputError(f"window={window}, stride={stride}: expected a stride of 1 to the window's size")
    last = max(0, players - window)
    starts = [*range(0, last, stride), last]
    at = torch.arange(players)
    return torch.stack([((at >= s) & (at < s + window)).float() for s in starts])
