"""When should the model rather say "I am not sure"? Answers kept by a score, what is wrong among them, and a promise about it.

    risk(k)     the share of wrong answers among the k questions it is surest of; the curve over coverage k / n
    aurc        the mean of risk(k) over k (Geifman et al. 2019); `optimal` that of a score that knows which are wrong, and
                `at_random` the error itself
    area        the chance that a right answer is surer than a wrong one (AUROC)

Risk control sets the lowest threshold that keeps a promise, from questions whose answers are known:

    average      (n / (n + 1)) R + 1 / (n + 1) <= risk, R the share of all n questions that are answered *and* wrong
                 (conformal risk control, Angelopoulos et al. 2022): on average over such sets; in many of them it is above
    confidence   the exact upper bound on the share of wrong among the *answered* is at most `risk`, tested at twenty
                 coverages together (Learn then Test with Bonferroni, Angelopoulos et al. 2021): in 1 - confidence of such sets
                 it is above. That costs most of the coverage where the score is no better than here

How both hold on questions that they were not set on is measured on random halves (of whole topics, if there are any), and the
share of halves above the promise is told.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.probing.roc import area, area_interval
from pellucid.results import Result
from pellucid.safety.calibrating import several
from pellucid.safety.thresholds import Promise
from pellucid.safety.uncertainty import asked
from pellucid.safety.uncertainty import confidence as surely
from pellucid.statistics import binomial_bound, interval
from pellucid.tasks.tokens import answer_ids
from pellucid.technique import technique

LEVELS = 20  # coverages that are tested together
POINTS = np.linspace(0.05, 1.0, 20)


def answered_right(
    model: Model, prompts: Sequence[Any], target: Any, *, decoder: Any = None, batch: int = 8
) -> np.ndarray:
    """[prompt] whether the model's own first choice is the answer (of a text of several tokens its first)."""
    right = []
    if model.anatomy.answering.meaning == "tokens" and not isinstance(target, str | int):
        target = [_first(model, t) if isinstance(t, str) else t for t in target]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of words without the space before them
        for question, _ in asked(model, several("prompts", prompts), target, decoder, batch):
            best = question.rows(model.run(question.inputs)).argmax(-1).tolist()
            right += [i in answer.ids for i, answer in zip(best, question.answers, strict=True)]
    return np.array(right)


def _first(model: Model, text: str) -> int | str:
    """The first token of an answer that says something of it (some tokenizers begin with a bare space)."""
    ids = answer_ids(model.tokenizer, text) if model.tokenizer is not None else []
    told = [i for i in ids if str(model.tokenizer.decode([i])).strip()] or ids
    return int(told[0]) if len(ids) > 1 else text


def set_threshold(scores: np.ndarray, right: np.ndarray, risk: float, promise: Promise, confidence: float) -> float:
    """From which score on questions are answered; infinite where no threshold keeps the promise."""
    order = np.argsort(-scores, kind="stable")
    s, wrong, n = scores[order], np.cumsum(~right[order]), len(scores)
    last = np.append(s[1:] != s[:-1], True)  # a threshold takes all that are alike
    if promise == "average":
        kept = (n / (n + 1)) * (wrong / n) + 1 / (n + 1) <= risk
        kept = np.minimum.accumulate(kept)  # the risk only grows
    else:
        at = np.zeros(n, dtype=bool)
        at[np.unique(np.ceil(np.arange(1, LEVELS + 1) / LEVELS * n).astype(int)) - 1] = True
        bound = binomial_bound(wrong, np.arange(1, n + 1), 1 - (1 - confidence) / LEVELS)
        kept = at & (bound <= risk)
    found = np.flatnonzero(kept & last)
    return float(s[found[-1]]) if len(found) else float("inf")


@technique
def abstain(
    model: Model,
    prompts: Sequence[Any],
    target: Any,
    *,
    score: Any = "max_probability",
    risk: float = 0.1,
    promise: Promise = "average",
    confidence: float = 0.95,
    topics: Sequence[Any] | None = None,
    decoder: Any = None,
    draws: int = 200,
    batch: int = 8,
    seed: int = 0,
) -> Result:
    """What the model would answer if it kept silent where it is not sure; `target` [prompt] are the right answers.

    `score` is a name (`pellucid.safety.uncertainty`), a fitted `ConfidenceProbe`, a function of (model, prompts), or numbers.
    Over `coverage`: `risk`, wrong among the answered, with its 95 % interval (bootstrap of `topics` or questions by `seed`), and
    `optimal_risk`; and `area`, `aurc` with intervals, `optimal_aurc`, `random_aurc`; `threshold` at the promise, from all
    questions. On `draws` random halves, set on one and measured on the other: `held_out_risk` (of all for "average", of the
    answered for "confidence"), `held_out_coverage`, and `above`, the share of halves whose risk is above `risk`.
    `right` and `sure` [question]. InputError where all answers are right, or all wrong.
    """
    prompts = several("prompts", prompts)
    at_least(1, draws=draws)
    if not 0 < risk < 1 or not 0 < confidence < 1 or promise not in ("average", "confidence"):
        raise InputError(
            f"risk={risk!r}, promise={promise!r}, confidence={confidence!r}: expected shares, and 'average' or 'confidence'"
        )
    right = answered_right(model, prompts, target, decoder=decoder, batch=batch)
    sure = surely(model, prompts, score, decoder=decoder, batch=batch)
    named = score if isinstance(score, str) else type(score).__name__ if hasattr(score, "confidence") else "your score"
    if right.all() or not right.any():
        raise InputError(
            f"all {len(right)} answers are {'right' if right.all() else 'wrong'}: there is nothing to tell apart"
        )
    groups = np.arange(len(right)) if topics is None else np.unique(np.asarray(topics), return_inverse=True)[1]
    if len(groups) != len(right):
        raise InputError(f"{len(groups)} topics for {len(right)} questions: give one for each")
    return _result(model, named, right, sure, groups, risk, promise, confidence, draws, seed)


def _tied(sure: np.ndarray, right: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """The surest first: weights [draw, question], where each group of equally sure ones starts, and over these groups
    [draw, group] their weight and that of the wrong among them."""
    order = np.argsort(-sure, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(sure[order]) != 0))
    w = weights[:, order]
    return w, starts, *(np.add.reduceat(x, starts, axis=1) for x in (w, w * ~right[order]))


def curve(sure: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[draw, coverage] the share of wrong among the surest, where question i counts `weights` [draw, i] times; of questions that
    are equally sure each has the error of all of them."""
    w, _, sums, wrong = _tied(sure, right, weights)
    n, total = np.cumsum(sums, 1), np.cumsum(wrong, 1)
    made = np.empty((len(w), len(POINTS)))
    for d in range(len(w)):
        at = POINTS * n[d, -1]
        made[d] = np.interp(at, np.append(0, n[d]), np.append(0, total[d])) / at
    return made


def aurc(sure: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[draw] the mean risk over all coverages; equal scores in the middle of their orders."""
    w, starts, sums, wrong = _tied(sure, right, weights)
    share = np.divide(wrong, sums, out=np.zeros_like(wrong, dtype=float), where=sums > 0)
    each = np.repeat(share, np.diff(np.append(starts, len(sure))), axis=1)
    n = np.cumsum(w, 1)
    risk = np.divide(np.cumsum(w * each, 1), n, out=np.zeros_like(n, dtype=float), where=n > 0)
    return np.asarray((risk * w).sum(1) / w.sum(1))


def _result(
    model: Model, named: str, right: np.ndarray, sure: np.ndarray, groups: np.ndarray, risk: float, promise: Promise,
    sure_by: float, draws: int, seed: int,
) -> Result:  # fmt: skip
    once = np.ones((1, len(right)))
    low, high = interval(lambda w: curve(sure, right, w), seed, groups=groups, within=(0.0, 1.0))
    a_low, a_high = interval(lambda w: aurc(sure, right, w), seed, groups=groups, within=(0.0, 1.0))
    r_low, r_high = area_interval(sure, right, groups, seed)
    held = np.array([_held(right, sure, groups, risk, promise, sure_by, seed + d) for d in range(draws)])
    optimal = right.astype(float)
    found: dict[str, Any] = {
        "risk": ("coverage", curve(sure, right, once)[0]), "low": ("coverage", low), "high": ("coverage", high),
        "optimal_risk": ("coverage", curve(optimal, right, once)[0]),
        "random_risk": ("coverage", np.full(len(POINTS), 1 - right.mean())),
        "area": area(sure, right), "area_low": float(r_low), "area_high": float(r_high),
        "aurc": float(aurc(sure, right, once)[0]), "aurc_low": float(a_low), "aurc_high": float(a_high),
        "optimal_aurc": float(aurc(optimal, right, once)[0]), "random_aurc": 1 - right.mean(),
        "threshold": set_threshold(sure, right, risk, promise, sure_by),
        "held_out_risk": np.nanmean(held[:, 0]), "held_out_coverage": held[:, 1].mean(), "above": (held[:, 0] > risk).mean(),
        "right": ("question", right), "sure": ("question", sure),
    }  # fmt: skip
    title = f"{named} on {model.name}: area {found['area']:.3f}"
    if found["area_high"] < 0.5:
        title += ", upside down"
    elif found["area_low"] <= 0.5:
        title += ", not told from chance"
    title += f"; at a risk of {risk:.0%} ({promise}) it answers {found['held_out_coverage']:.0%}, above it in {found['above']:.0%} of halves"
    return Result(xr.Dataset(found, coords={"coverage": POINTS.round(2)}), kind="selective prediction", title=title)


def _held(
    right: np.ndarray, sure: np.ndarray, groups: np.ndarray, risk: float, promise: Promise, sure_by: float, seed: int
) -> tuple[float, float]:
    """Risk and coverage on one half, of a threshold that was set on the other."""
    names = np.random.default_rng(seed).permutation(groups.max() + 1)
    test = np.isin(groups, names[: max(1, len(names) // 2)])
    if test.all():
        raise InputError("all questions are of one topic: it cannot be left out")
    level = set_threshold(sure[~test], right[~test], risk, promise, sure_by)
    answered = sure[test] >= level
    wrong = (answered & ~right[test]).sum()
    over = len(answered) if promise == "average" else max(1, answered.sum())
    return wrong / over, float(answered.mean())
