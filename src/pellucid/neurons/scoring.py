"""Is a description right? Three tests on contexts that nobody described anything from.

    detection    which contexts activate the unit?            AUROC of the judge's answers, contexts with an active token
                                                               against those without
    fuzzing      are these the active tokens?                  AUROC, the active tokens marked against as many others of
                                                               the same contexts
    simulation   how active is the unit at each token?         Pearson correlation with the true activations (Bills et al.
                                                               2023) over all tokens of the contexts

Detection and fuzzing as in Paulo et al. 2024, who report accuracies. The contexts are those of `read_contexts`: half around
large activations, half at random, so that the numbers say how well the unit's upper end is described ("top and random").
Intervals are 95 %, over contexts.

The control: the same judge is given the descriptions of other units on the same contexts. A description that says
"common words" scores well on any unit; what counts is `gain`, own score minus the mean of the others'. Units made of
random directions are a second baseline: harvest some (`random_directions`) and describe and score them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from pellucid import controls
from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.neurons.contexts import Context, UnitContexts
from pellucid.neurons.harvest import Units
from pellucid.neurons.judges import Judge, Simulate, as_judge
from pellucid.neurons.naming import Description, as_descriptions
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique

RANGE = {"detection": (0.0, 1.0), "fuzzing": (0.0, 1.0), "simulation": (-1.0, 1.0)}
TESTS = tuple(RANGE)


@technique
def random_directions(model: Model, site: str, n: int, *, seed: int = 0, name: str = "random") -> Units:
    """`n` random directions of length 1 at a site with one vector per token, to be harvested beside its own units."""
    found = model.sites(site)
    if len(found) != 1 or n < 1 or found[0].dims[:2] != ("batch", "position"):
        raise InputError(f"{n} directions at {site!r}: expected at least 1, at one site with a vector per token")
    where = found[0]
    ids = torch.zeros(1, 2, dtype=torch.long)
    run = model.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, keep=[where])
    return Units(site, controls.random_directions(n, run.tensor(where).flatten(2).shape[2], seed=seed), name)


@technique
def score_descriptions(
    contexts: Sequence[UnitContexts],
    descriptions: Sequence[Description | str],
    judge: Judge | Simulate | None = None,
    *,
    tests: Sequence[str] = TESTS,
    draws: int = 3,
    seed: int = 0,
) -> Result:
    """How well each unit's description predicts where it fires, beside descriptions of other units.

    Gives over `unit` and `test` (those of `tests`): `gain` with its interval `gain_low` to `gain_high`, `score`
    with `low` to `high`, `control` (the mean over the descriptions of `draws` other units, drawn by `seed`); `description`
    [unit]; `beats` [test], the share of units whose own description scores above the control, and `beats_surely`, the share
    whose interval of the gain lies above 0. NaN where a unit's contexts leave nothing to tell apart. InputError for fewer
    than two units, lists of unequal length, or an unknown test.

    >>> score_descriptions(contexts, describe(contexts)).beats
    <xarray.DataArray 'beats' (test: 3)>...
    """
    if len(contexts) != len(descriptions) or len(contexts) < 2 or draws < 1:
        raise InputError(
            f"{len(contexts)} units, {len(descriptions)} descriptions, draws={draws}: expected one each, at least two "
            "units, and at least one other"
        )
    tests = [tests] if isinstance(tests, str) else tests
    unknown = [test for test in tests if test not in TESTS]
    if unknown or not tests:
        raise InputError(f"there is no test {', '.join(unknown) or 'asked for'}: expected some of {', '.join(TESTS)}")
    judge = as_judge(judge)
    said = as_descriptions(descriptions)
    rng = np.random.default_rng(seed)
    shape = len(contexts), len(tests)
    (score, gain), ends = np.full((2, *shape), np.nan), np.full((2, 2, *shape), np.nan)  # low and high of both
    for u, each in enumerate(progress(contexts, "units scored")):
        rest = [i for i in range(len(said)) if i != u]
        chosen = [said[u], *(said[i] for i in rng.permutation(rest)[:draws])]
        exams = dict(zip(TESTS, _exams(each, rng), strict=True))
        for t, test in enumerate(tests):
            exam = exams[test]
            if exam is None:
                continue
            marks = [exam.answered(judge, d) for d in chosen]
            told, n = _with_gain(marks), len(exam.contexts)
            score[u, t], gain[u, t] = told(np.ones((1, n)))[0]
            ends[:, :, u, t] = interval(told, seed, n=n)
            ends[:, 0, u, t] = ends[:, 0, u, t].clip(*RANGE[test])
    known = np.maximum((~np.isnan(gain)).sum(0), 1)
    over = ("unit", "test")
    data = xr.Dataset(
        {
            "gain": (over, gain), "gain_low": (over, ends[0, 1]), "gain_high": (over, ends[1, 1]),
            "score": (over, score), "low": (over, ends[0, 0]), "high": (over, ends[1, 0]), "control": (over, score - gain),
            "beats": ("test", (gain > 0).sum(0) / known), "beats_surely": ("test", (ends[0, 1] > 0).sum(0) / known),
            "description": ("unit", np.array([d.text for d in said], dtype=object)),
        },
        {"unit": [c.unit for c in contexts], "test": list(tests)},
    )  # fmt: skip
    return Result(data, kind="description scores", title="Descriptions on held-out contexts")


# ---- the tests


Mark = Callable[[np.ndarray], np.ndarray]  # weights [draw, context], how often each context counts -> [draw]


def _with_gain(marks: Sequence[Mark]) -> Mark:
    """[draw, 2] the first one's score, and that less the mean of the others'."""

    def told(weights: np.ndarray) -> np.ndarray:
        own, *others = (mark(weights) for mark in marks)
        return np.stack([own, own - np.mean(others, axis=0)], 1)

    return told


@dataclass(frozen=True, eq=False)
class Exam:
    """One test of one unit on its contexts."""

    contexts: Sequence[Context]

    def answered(self, judge: Judge, description: Description) -> Mark:
        """The score, by how often each context counts."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Detection(Exam):
    active: np.ndarray  # [context]

    def answered(self, judge: Judge, description: Description) -> Mark:
        answers, on = judge.detect(description, self.contexts), self.active
        return lambda weights: auroc(answers[on], answers[~on], weights[:, on], weights[:, ~on])


@dataclass(frozen=True, eq=False)
class Fuzzing(Exam):
    right: Sequence[np.ndarray]  # of each context the active tokens
    wrong: Sequence[np.ndarray]  # and as many others

    def answered(self, judge: Judge, description: Description) -> Mark:
        good, bad = (
            judge.fuzz(description, list(zip(self.contexts, marks, strict=True))) for marks in (self.right, self.wrong)
        )
        return lambda weights: auroc(good, bad, weights, weights)


@dataclass(frozen=True, eq=False)
class Simulation(Exam):
    def answered(self, judge: Judge, description: Description) -> Mark:
        sums = []
        for context in self.contexts:
            x = judge.simulate(description, context)[context.counted]
            y = context.activations[context.counted]
            sums.append([len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y])
        return lambda weights: _correlation(weights @ np.array(sums))


def _correlation(sums: np.ndarray) -> np.ndarray:
    """[draw] of sums [draw, 6]: n, x, y, xx, yy, xy; 0 where one side is constant."""
    n, x, y, xx, yy, xy = sums.T
    spread = np.sqrt(np.clip(xx - x * x / n, 0, None) * np.clip(yy - y * y / n, 0, None))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-9 * np.maximum(yy, 1e-30), (xy - x * y / n) / spread, 0.0)


def _exams(unit: UnitContexts, rng: np.random.Generator) -> tuple[Detection | None, Fuzzing | None, Simulation | None]:
    """The tests that a unit's held-out contexts allow."""
    contexts = [c for c in unit.held_out if c.counted.any()]
    above = [c.above(unit.level) for c in contexts]
    active = np.array([a.any() for a in above], dtype=bool)
    if not active.any():
        return None, None, None
    marks = [(c, a, _others(c, a, rng)) for c, a in zip(contexts, above, strict=True) if a.any()]
    marks = [(c, a, w) for c, a, w in marks if w.any()]
    fuzzing = None
    if marks:
        fuzzing = Fuzzing(*zip(*marks, strict=True))
    return None if active.all() else Detection(contexts, active), fuzzing, Simulation(contexts)


def _others(context: Context, active: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many tokens that are not active, or all there are."""
    rest = np.flatnonzero(context.counted & ~active)
    made = np.zeros(len(active), dtype=bool)
    made[rng.permutation(rest)[: active.sum()]] = True
    return made


def auroc(good: np.ndarray, bad: np.ndarray, weigh_good: np.ndarray, weigh_bad: np.ndarray) -> np.ndarray:
    """[draw] how often one of `good` is above one of `bad` (a tie is half), weighed [draw, n]; NaN where one side is not drawn.

    >>> auroc(np.array([2.0, 1.0]), np.array([1.0, 0.0]), np.ones((1, 2)), np.ones((1, 2)))
    array([0.875])
    """
    wins = (good[:, None] > bad[None]) + 0.5 * (good[:, None] == bad[None])
    total = weigh_good.sum(1) * weigh_bad.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, ((weigh_good @ wins) * weigh_bad).sum(1) / total, np.nan)
