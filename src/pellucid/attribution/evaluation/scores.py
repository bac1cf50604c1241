"""What is a method's score of each player? Results and bare numbers, brought to one array [player]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pellucid.attribution.case import Case
from pellucid.attribution.methods import METHODS
from pellucid.attribution.players import Players
from pellucid.engine.pausing import quiet
from pellucid.errors import InputError, nearest
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

Scores = Result | np.ndarray | Sequence[float]
Method = Callable[..., Any]  # gives a Result, or bare scores
RANDOM = "random"


def read_scores(case: Case, players: Players, scores: Scores) -> np.ndarray:
    """[player]. Scores of tokens are summed over a player, those of a continuation over its outputs. InputError if there
    is not one for each token or each player, or they are no finite numbers."""
    if isinstance(scores, Result):
        main = scores.main
        values = main.sum("output").values if "output" in main.dims else main.values
    else:
        values = np.asarray(scores)
    values = np.asarray(values, dtype=float)
    if values.shape not in ((len(players),), (len(case.tokens),)):
        raise InputError(
            f"the scores are {list(values.shape)}: expected one for each of {len(players)} players or {len(case.tokens)} tokens"
        )
    if values.shape != (len(players),) or _by_position(scores):
        values = players.pool(values)
    if not np.isfinite(values).all():
        raise InputError("the scores are not all finite numbers")
    return values


def _by_position(scores: Scores) -> bool:
    return isinstance(scores, Result) and "position" in scores.main.dims


def methods_named(methods: Mapping[str, Method] | Sequence[str] | None) -> dict[str, Method]:
    """Methods by name: all of `pellucid.attribution.METHODS` for None. InputError for an unknown one."""
    if isinstance(methods, Mapping):
        return dict(methods)
    known: Mapping[str, Method] = METHODS
    for name in methods or ():
        if name not in known and name != RANDOM:
            raise InputError(f"unknown method {name!r}{nearest(name, known)}")
    return {name: known[name] for name in (known if methods is None else methods) if name != RANDOM}


def explain(method: Method, model: Model, prompt: Any, target: Any, against: Any, players: Any) -> Scores:
    """One call of a method, without a progress bar of its own."""
    with quiet():
        scores: Scores = method(model, prompt, target, against=against, players=players)
    return scores


@technique
def random_attribution(
    model: Model, prompt: Any, target: Any = None, *, against: Any = None, players: Any = "token", seed: int = 0
) -> Result:
    """The control: scores drawn from a normal distribution, which know nothing of the model."""
    case = Case.of(model, prompt, target, against=against)
    parts = Players.of(case, players)
    values = np.random.default_rng(seed).standard_normal(len(parts))
    return case.result(
        "Random scores", {"attribution": ("player", values), "evaluations": 0},
        labels=parts.labels,
    )  # fmt: skip


def cost(scores: Scores) -> float:
    """Forward passes a result took: rows of forwards, and rows of forward and backward as three. Bare numbers took none."""
    if not isinstance(scores, Result):
        return 0.0
    data = scores.data
    return float(data.get("evaluations", 0.0)) + 3.0 * float(data.get("gradients", data.get("steps", 0.0)))
