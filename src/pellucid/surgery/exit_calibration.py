"""From which confidence on may a model stop early, with a guarantee?

`calibrate` finds the threshold at which the exits agree with the full model in at least 1 - delta of the cases, with
confidence 1 - epsilon (Learn then Test, Angelopoulos et al. 2021): thresholds are tested from the strictest on, each with its exact
binomial p, until one is not rejected. The guarantee is about texts drawn as these were; tokens of one text are no independent
cases, so one token is drawn from each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from pellucid.engine.pausing import progress
from pellucid.errors import InputError, at_least
from pellucid.lenses.tuned_lens import corpus_rows
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import binomial_p, fixed_sequence
from pellucid.surgery.exit_policy import Exit
from pellucid.surgery.exit_reading import costs, judge, passed
from pellucid.technique import technique

GRID = 40  # thresholds that are tried


@technique
def calibrate(
    model: Model,
    texts: Any,
    policy: Exit,
    *,
    delta: float = 0.1,
    epsilon: float = 0.05,
    per_text: int | None = 1,
    tokens: int = 20_000,
    context: int | None = 64,
    seed: int = 0,
) -> Result:
    """The lowest threshold at which exits agree with the full model in at least 1 - delta of cases, with confidence 1 - epsilon.

    A case is a token drawn at random from a row of text (`per_text` of each; None: all of them, as if they were independent,
    which tokens of one text are not: then the guarantee does not hold, and the title says so). Give one row for each text.
    Gives over `threshold`, from the strictest on, `agreement` on these cases, `p` of "disagrees more often than delta",
    `layer` (blocks run) and `saved`, the share of blocks that were not, `kept` (whether it was reached and rejected); `chosen`, infinity where none is: then `chosen_policy(result, policy)` never exits.

    >>> safe = chosen_policy(calibrate(model, texts, Exit("margin"), delta=0.1), Exit("margin"))
    """
    if not (0 < delta < 1 and 0 < epsilon < 1):
        raise InputError(f"delta={delta!r}, epsilon={epsilon!r}: expected numbers between 0 and 1")
    policy.check(model)
    layers, n = policy.checked(model), costs(model)[1]
    rows = corpus_rows(model, texts, tokens, context)
    rng = np.random.default_rng(seed)
    if per_text is not None:
        at_least(1, per_text=per_text)
    passes = []
    for row in progress([row for row in rows if len(row.ids) > 1], "calibration"):
        at = None if per_text is None else np.sort(rng.permutation(len(row.ids) - 1)[:per_text])
        passes.append(passed(model, row, [policy], at=at))
    grid = thresholds(policy.by, len(layers), _vocabulary(model))
    judged = [judge(passes, 0, layers, n, float(t)) for t in grid]
    wrong = np.array([(1 - j.agrees).sum() for j in judged])
    cases = len(judged[0].agrees)
    p = binomial_p(wrong, cases, delta)
    kept = fixed_sequence(p, epsilon)
    depth = np.array([j.layer.mean() for j in judged])
    data = xr.Dataset({"agreement": ("threshold", 1 - wrong / cases), "saved": ("threshold", 1 - depth / n), "p": ("threshold", p),
                       "kept": ("threshold", np.arange(len(grid)) < kept), "chosen": float(grid[kept - 1]) if kept else float("inf"), "cases": cases},
                      {"threshold": grid, "layer": ("threshold", depth)}, {"delta": delta, "epsilon": epsilon})  # fmt: skip
    independent = per_text == 1 or all(len(each.final) == 1 for each in passes)
    note = "" if independent else " (tokens of one text taken for independent: no guarantee)"
    said = (
        f"Exits by {policy.by} from {data.chosen.item():.3g} on agree in at least {1 - delta:g} of cases, {float(data.saved[kept - 1]):.0%} of blocks saved"
        if kept
        else f"No threshold of {policy.by} is shown to agree in {1 - delta:g} of cases"
    )
    return Result(data, kind="exit calibration curve", title=f"{said}, with confidence {1 - epsilon:g}{note}")


def chosen_policy(result: Result, policy: Exit) -> Exit:
    """The policy with the threshold that `calibrate` found."""
    return replace(policy, threshold=float(result.data.chosen))


def _vocabulary(model: Model) -> int:
    config: Any = model.module.config
    return int(getattr(config.get_text_config(), "vocab_size", 2))


def thresholds(by: str, checks: int, tokens: int) -> np.ndarray:
    """Strictest first, and chosen without the texts: what a fixed sequence of tests needs.

    >>> thresholds("stable", 3, 100)
    array([3., 2., 1.])
    """
    if by == "stable":
        return np.arange(checks, 0, -1.0)
    return -np.geomspace(1e-3, np.log(tokens), GRID) if by == "entropy" else 1 - np.geomspace(1e-4, 1, GRID)
