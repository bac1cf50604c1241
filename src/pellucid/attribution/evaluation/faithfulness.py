"""Does the answer follow the tokens that an attribution names?

Players are taken away, most important first, and the target v is read again (v(N): all there, v(0): none):

    comprehensiveness   mean over k of v(N) - v(N without the top k)            more is better
    sufficiency         mean over k of v(N) - v(the top k alone)                less is better
    deletion            area under v(N without the top k) over k / n            less is better
    insertion           area under v(the top k alone) over k / n                more is better
    infidelity          mean over S of (sum of scores of S - (v(N) - v(N without S)))^2      less is better
    monotonicity        share of steps that do not lower v when players come, the least important first
    leave-one-out       Spearman's correlation of the scores with v(N) - v(N without i)

Comprehensiveness and sufficiency are those of ERASER (DeYoung et al. 2020), averaged over the top 1, 5, 10, 20 and 50 %
(AOPC): as k is rounded up to whole players, shares that give the same k are counted once, where the released code counts
them again. Deletion and insertion are those of Petsiuk et al. 2018. Infidelity is that of Yeh et al. 2019 with S drawn by
its size first (1 to n - 1, equally likely); scores are scaled by the factor that makes it least, as in the authors' code,
so that methods without a unit can be compared, or not (`scaled=False`). Monotonicity is that of Luss et al. 2019 and
AIX360, whose yes is a share of 1 here (at the steps of the curves). Leave-one-out follows Nguyen and Martinez 2020, with
signs; occlusion has 1 by its definition, so it is no ground to prefer occlusion.

All are in the unit of the target: attribute and measure a probability for numbers between 0 and 1. Soft variants are in
`soft`, sensitivity in `sensitivity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import xarray as xr

from pellucid.attribution.absence import Absence, absence
from pellucid.attribution.case import Case
from pellucid.attribution.evaluation.scores import Scores, read_scores
from pellucid.attribution.evaluation.soft import soft
from pellucid.attribution.players import Players
from pellucid.errors import InputError, nearest
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import area, spearman
from pellucid.technique import technique

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
STEPS = 10  # of a curve
Better = Literal["more", "less"]


def counts(n: int, shares: Sequence[float] = SHARES) -> np.ndarray:
    """How many of n players each share is, rounded up, every number once.

    >>> counts(12)
    array([1, 2, 3, 6])
    """
    return np.unique([min(n, max(1, int(np.ceil(share * n - 1e-9)))) for share in shares])


def curve(n: int) -> np.ndarray:
    """The numbers of players a curve is read at: 0 to n in at most STEPS steps."""
    return np.unique(np.round(np.linspace(0, n, min(n, STEPS) + 1)).astype(int))


def top(scores: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """[k, player] the k players with the largest scores; of equal ones the first."""
    place = np.argsort(np.argsort(-scores, kind="stable"), kind="stable")
    return place[None] < np.asarray(ks)[:, None]


class Metric(Protocol):
    """What is asked of the game for given scores [player], and the number made of the answers v [n]."""

    @property
    def name(self) -> str: ...
    @property
    def better(self) -> Better: ...
    def coalitions(self, scores: np.ndarray) -> np.ndarray: ...
    def value(self, scores: np.ndarray, v: np.ndarray, whole: float) -> float: ...


@dataclass(frozen=True)
class Comprehensiveness:
    shares: tuple[float, ...] = SHARES
    name: str = "comprehensiveness"
    better: Better = "more"

    def coalitions(self, scores: np.ndarray) -> np.ndarray:
        return ~top(scores, counts(len(scores), self.shares))

    def value(self, scores: np.ndarray, v: np.ndarray, whole: float) -> float:
        return float((whole - v).mean())


@dataclass(frozen=True)
class Sufficiency:
    shares: tuple[float, ...] = SHARES
    name: str = "sufficiency"
    better: Better = "less"

    def coalitions(self, scores: np.ndarray) -> np.ndarray:
        return top(scores, counts(len(scores), self.shares))

    def value(self, scores: np.ndarray, v: np.ndarray, whole: float) -> float:
        return float((whole - v).mean())


@dataclass(frozen=True)
class Deletion:
    name: str = "deletion"
    better: Better = "less"

    def coalitions(self, scores: np.ndarray) -> np.ndarray:
        return ~top(scores, curve(len(scores)))

    def value(self, scores: np.ndarray, v: np.ndarray, whole: float) -> float:
        return area(v, curve(len(scores)) / len(scores))


@dataclass(frozen=True)
class Insertion:
    name: str = "insertion"
    better: Better = "more"

    def coalitions(self, scores: np.ndarray) -> np.ndarray:
        return top(scores, curve(len(scores)))

    def value(self, scores: np.ndarray, v: np.ndarray, whole: float) -> float:
        return area(v, curve(len(scores)) / len(scores))


@dataclass(frozen=True)
class Infidelity:
    samples: int = 50
    scaled: bool = True
    seed: int = 0
    name: str = "infidelity"
    better: Better = "less"

    def coalitions(self, scores: np.ndarray) -> np.ndarray:
        """The same for every method: sizes first, then who is absent."""
        rng, n = np.random.default_rng(self.seed), len(scores)
        absent = np.zeros((self.samples, n), dtype=bool)
        for row in absent:
            row[rng.permutation(n)[: rng.integers(1, max(2, n))]] = True
        return ~absent

    def value(self, scores: np.ndarray, v: np.ndarray, whole: float) -> float:
        told, true = ~self.coalitions(scores) @ scores, whole - v
        size = float(told @ told)
        scale = (float(told @ true) / size if size > 0 else 0.0) if self.scaled else 1.0
        return float(((scale * told - true) ** 2).mean())


@dataclass(frozen=True)
class Monotonicity:
    name: str = "monotonicity"
    better: Better = "more"

    def coalitions(self, scores: np.ndarray) -> np.ndarray:
        return ~top(scores, curve(len(scores))[::-1])

    def value(self, scores: np.ndarray, v: np.ndarray, whole: float) -> float:
        return float((np.diff(v) >= 0).mean())


@dataclass(frozen=True)
class LeaveOneOut:
    name: str = "leave-one-out"
    better: Better = "more"

    def coalitions(self, scores: np.ndarray) -> np.ndarray:
        return ~np.eye(len(scores), dtype=bool)

    def value(self, scores: np.ndarray, v: np.ndarray, whole: float) -> float:
        return spearman(scores, whole - v)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Comprehensiveness(),
        Sufficiency(),
        Deletion(),
        Insertion(),
        Infidelity(),
        Monotonicity(),
        LeaveOneOut(),
    )
}
SOFT: dict[str, Better] = {"soft comprehensiveness": "more", "soft sufficiency": "more"}


def named(metrics: Sequence[str | Metric] | None) -> list[Metric]:
    """Metrics by name; all for None. InputError for an unknown one."""
    found: list[Metric] = []
    for metric in METRICS if metrics is None else metrics:
        if isinstance(metric, str) and metric not in METRICS:
            raise InputError(f"unknown metric {metric!r}{nearest(metric, METRICS)}")
        found.append(METRICS[metric] if isinstance(metric, str) else metric)
    return found


def measure(world: Absence, scores: Mapping[str, np.ndarray], metrics: Sequence[Metric]) -> dict[str, dict[str, float]]:
    """Each metric of each method's scores [player], from one batch of coalitions. A continuation counts as the sum of its
    outputs."""
    asked = {(m, k.name): k.coalitions(s) for m, s in scores.items() for k in metrics}
    everyone = np.ones((1, len(world.players)), dtype=bool)
    rows = np.concatenate([everyone, *asked.values()])
    v = world(torch.from_numpy(rows)).sum(1).numpy()
    parts = np.split(v[1:], np.cumsum([len(rows) for rows in asked.values()])[:-1])
    answers = dict(zip(asked, parts, strict=True))
    return {m: {k.name: k.value(s, answers[m, k.name], float(v[0])) for k in metrics} for m, s in scores.items()}


def curves(world: Absence, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v [step] of deletion and of insertion, most important first, at `curve(n)`."""
    rows = [metric.coalitions(scores) for metric in (Deletion(), Insertion())]
    v = world(torch.from_numpy(np.concatenate(rows))).sum(1).numpy()
    return v[: len(rows[0])], v[len(rows[0]) :]


@technique
def faithfulness(
    model: Model,
    prompt: Any,
    scores: Scores | Mapping[str, Scores],
    target: Any = None,
    *,
    against: Any = None,
    players: Any = "token",
    replacement: Any = None,
    reference: Any = None,
    metrics: Sequence[str | Metric] | None = None,
    draws: int = 20,
    seed: int = 0,
) -> Result:
    """Measure attributions of one prompt: results of methods, or numbers [player or position], one or several by name.

    `target`, `against` and `players` are those that were attributed; `replacement` and `reference` say what absence means
    (see `absence`); `draws` is the number of softly perturbed prompts (soft variants are there where absence is an
    embedding). Gives `value` [technique, metric], `error` (its standard error, where it is drawn), the curves `deletion` and
    `insertion` [technique, step] at the shares `share` [step], `score` and `baseline_score` of the prompt with all and with
    no players, and `evaluations`. InputError where scores do not fit the prompt.

    >>> faithfulness(model, prompt, {"IG": integrated_gradients(model, prompt)})
    Faithfulness of attributions of logit, with 'pad' for absent tokens
    faithfulness: value, error, deletion, insertion, score, baseline_score, evaluations over technique 1, metric...
    """
    case = Case.of(model, prompt, target, against=against)
    parts = Players.of(case, players)
    several = scores if isinstance(scores, Mapping) else {"scores": scores}
    read = {name: read_scores(case, parts, each) for name, each in several.items()}
    chosen = named(metrics)
    world = absence(case, parts, replacement, reference=reference, seed=seed)
    found = measure(world, read, chosen)
    errors: dict[str, dict[str, float]] = {name: {} for name in read}
    if metrics is None:
        for name, (values, deviations) in soft(world, read, draws, seed).items():
            found[name] |= values
            errors[name] = deviations
    names = list(next(iter(found.values())))
    traced = [curves(world, each) for each in read.values()]
    dims = ("technique", "metric")
    data = xr.Dataset(
        {
            "value": (dims, [[found[m][k] for k in names] for m in read]),
            "error": (dims, [[errors[m].get(k, 0.0) for k in names] for m in read]),
            "deletion": (("technique", "step"), [d for d, _ in traced]),
            "insertion": (("technique", "step"), [i for _, i in traced]),
            "score": float(world.all.sum()),
            "baseline_score": float(world.none.sum()),
            "evaluations": world.evaluations,
        },
        coords={
            "technique": list(read),
            "metric": names,
            "better": ("metric", [_better(k, chosen) for k in names]),
            "share": ("step", curve(len(parts)) / len(parts)),
        },
        attrs={"replacement": world.name, "attributed": case.question.name},
    )
    title = f"Faithfulness of attributions of {case.question.name}, with {world.name!r} for absent tokens"
    return Result(data, kind="faithfulness", title=title)


def _better(name: str, metrics: Sequence[Metric]) -> Better:
    return SOFT[name] if name in SOFT else next(metric.better for metric in metrics if metric.name == name)
