"""Which attribution method can be trusted on this model?

Every method explains every prompt, and random scores stand among them as the control. All are measured alike: by what
happens to the answer when the tokens they name are taken away or kept (`faithfulness` = area under insertion minus area
under deletion, and the metrics of `pellucid.attribution.evaluation.faithfulness`), against known reasons where the data has
them (`plausibility`), by how far they agree, and by their cost. Means come with 95 % bootstrap intervals over prompts;
which method to prefer is decided by paired differences (`preference`) and said in one sentence.

What a comparison has done so far: one line of JSON per example and method, so that it goes on where it stopped, and with more
examples or methods.

The first line says what was asked; a file of another question is refused rather than mixed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pellucid.attribution.absence import Absence, absence
from pellucid.attribution.case import Case
from pellucid.attribution.evaluation.agreement import agreement, mean_over_prompts, prefer
from pellucid.attribution.evaluation.data import PLAUSIBILITY, Example, plausibility
from pellucid.attribution.evaluation.faithfulness import METRICS, SOFT, Metric, curve, curves, measure, named
from pellucid.attribution.evaluation.scores import (
    RANDOM,
    Method,
    Scores,
    cost,
    explain,
    methods_named,
    random_attribution,
    read_scores,
)
from pellucid.attribution.evaluation.sensitivity import max_sensitivity
from pellucid.attribution.evaluation.shift import FEWEST, distribution_shift
from pellucid.attribution.evaluation.soft import soft
from pellucid.attribution.methods import METHODS
from pellucid.attribution.players import Players
from pellucid.corpus import read_each
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, PellucidError, nearest
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique
from pellucid.workers import Here
from pellucid.workers.errand import Errand, Tensors, Work, done, heard, plain, told

GRID = np.linspace(0, 1, 11)
SENSITIVITY = "max-sensitivity"
BETTER = {
    "faithfulness": "more",
    **{name: metric.better for name, metric in METRICS.items()},
    **SOFT,
    SENSITIVITY: "less",
    **dict.fromkeys(PLAUSIBILITY, "more"),
}


@technique
def compare(
    model: Model,
    examples: Sequence[Any],
    *,
    methods: Mapping[str, Method] | Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    players: Any = "token",
    replacement: Any = None,
    reference: Any = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
) -> Result:
    """Compare methods (names of `pellucid.attribution.METHODS`, by default all; or functions by name) on examples: texts,
    or mappings with a text and what else is known of it (see `pellucid.attribution.evaluation.data`).

    `metrics` are those of faithfulness, by default all but the two soft ones and "max-sensitivity", which cost more;
    `replacement` and `reference` say what an absent token is (see `absence`). `checkpoint` is a file of lines of JSON, one
    per example and method, that the comparison goes on from if it is interrupted, or given more examples or methods.

    Gives over the methods (dimension `technique`) `value` [technique, metric] with `low` and `high`; `each` [example,
    technique, metric]; `cost` [technique], forward passes per prompt (a backward pass counts as two); the curves `deletion`
    and `insertion` [technique, step] over `share`; `agreement` [measure, technique, other] and `concordance`, Kendall's W
    without random scores, with intervals; `difference` [technique] of the best by faithfulness to each, with its paired
    interval; and for ten examples or more `outside` [absent], the share of altered texts unlike all clean ones (see
    `distribution_shift`, which warns where it is large). attrs: `sentence`, `preferred`, and `refused`, the methods that were
    refused on an example and so are left out, with the reason. InputError where nothing can be compared.
    """
    read = [Example.of(each, f"example {i + 1}") for i, each in enumerate(examples)]
    if not read:
        raise InputError("there are no examples to compare methods on")
    read_each(model, [example.text for example in read], what="text")
    chosen = methods_named(methods)
    wanted = [m for m in (METRICS if metrics is None else metrics) if m != "faithfulness"]
    if unknown := [m for m in wanted if m not in BETTER or m in PLAUSIBILITY]:
        raise InputError(
            f"unknown metric {unknown[0]!r}{nearest(unknown[0], [m for m in BETTER if m not in PLAUSIBILITY])}"
        )
    asked = {
        "model": model.digest, "metrics": wanted, "players": players if isinstance(players, str) else repr(players),
        "replacement": str(replacement), "reference": getattr(reference, "name", _digest(reference)), "seed": seed,
    }  # fmt: skip
    rows = Rows(checkpoint, asked)
    names = [RANDOM, *chosen]
    job = _Job.of(model, chosen, wanted, players, replacement, reference, seed)
    with progress[None](what="explanations", total=len(read) * len(names)) as bar:

        def keep(row: Row) -> None:
            if (row["example"], row["method"]) not in rows.found:
                rows.add(row)
                bar.step()

        job.keep = keep
        waiting = {_digest(e): (e, [n for n in names if (_digest(e), n) not in rows.found]) for e in read}
        bar.step(len(read) * len(names) - sum(len(todo) for _, todo in waiting.values()))
        settings = {"methods": list(chosen), "metrics": wanted, "players": players, "replacement": replacement,
                    "reference": reference, "seed": seed}  # fmt: skip
        pieces = [[e.text, e.target, e.against, e.rationale, todo] for e, todo in waiting.values() if todo]
        travels = plain(settings, [[*piece[:3], piece[4]] for piece in pieces]) and all(
            METHODS.get(name) is method for name, method in chosen.items()
        )  # what is no value stays here, and its sweeps travel
        errand = Errand(model, "attribution.evaluation.compare:_Job", lambda: (settings, {}), job)
        for _, made in done(errand, pieces, None if travels else Here()):
            for row in heard(made["rows"]):
                keep(row)
    found = _summary(model, names, rows, seed, read)
    if len(read) < FEWEST:
        return found
    strange = distribution_shift(
        model, [e.text for e in read], players=players, replacement=replacement, reference=reference, seed=seed
    )
    return Result(found.data.assign(outside=strange.outside), kind=found.kind, title=found.title)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


class _Job(Work):
    """Runs methods on an example and measures them; a piece is an example and the names of methods."""

    errand = "comparison"

    def __init__(self, model: Model, about: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        given = {**about, "methods": methods_named(about["methods"])}
        self._begin(model, **given)

    @classmethod
    def of(cls, model: Model, *given: Any) -> _Job:
        made = cls.__new__(cls)
        made._begin(model, *given)
        return made

    def _begin(
        self, model: Model, methods: dict[str, Method], metrics: list[str], players: Any, replacement: Any, reference: Any, seed: int
    ) -> None:  # fmt: skip
        self.model, self.methods, self.metrics, self.players = model, methods, metrics, players
        self.replacement, self.reference, self.seed = replacement, reference, seed
        self.keep: Callable[[Row], None] = lambda row: None  # told at once of every row

    def __call__(self, piece: Sequence[Any]) -> Tensors:
        text, target, against, rationale, todo = piece
        example = Example(text, target, against, rationale and tuple(map(tuple, rationale)))
        key = _digest(example)
        case = Case.of(self.model, example.text, example.target, against=example.against)
        parts = Players.of(case, self.players)
        if len(parts) < 2:
            raise InputError(f"{str(example.text)!r} has {len(parts)} players: expected two or more to rank")
        world = absence(case, parts, self.replacement, reference=self.reference, seed=self.seed)
        if example.target is None:  # what is asked stays, whatever else is run
            example = replace(example, target=case.question.metric)
        rows = []
        for name in todo:
            seed = self.seed + int(key[:6], 16)  # of random scores: others for every example
            rows.append({"example": key, "method": name, **self._row(name, example, case, parts, world, seed)})
            self.keep(rows[-1])
        return {"rows": told(rows)}

    def _row(self, name: str, example: Example, case: Case, parts: Players, world: Absence, seed: int) -> Row:
        method, asked = self.methods.get(name), {"against": example.against, "players": self.players}
        try:
            result: Scores = (
                random_attribution(self.model, example.text, example.target, seed=seed, **asked)
                if method is None
                else explain(method, self.model, example.text, example.target, **asked)
            )
            scores = read_scores(case, parts, result)
        except PellucidError as error:
            return {"refused": str(error)}
        values = self._measured(world, scores)
        if SENSITIVITY in self.metrics and method is not None:
            values[SENSITIVITY] = max_sensitivity(
                self.model, example.text, method, example.target, seed=self.seed, **asked
            )
        rationale = example.players(case, parts)
        if rationale is not None:
            values |= plausibility(scores, rationale)
        ks = curve(len(parts)) / len(parts)
        deletion, insertion = (np.interp(GRID, ks, v).tolist() for v in curves(world, scores))
        return {
            "cost": cost(result), "values": values, "scores": scores.tolist(), "deletion": deletion,
            "insertion": insertion, "replacement": world.name,
        }  # fmt: skip

    def _measured(self, world: Absence, scores: np.ndarray) -> dict[str, float]:
        plain: list[Metric] = named([m for m in self.metrics if m in METRICS])
        areas = [METRICS[m] for m in ("deletion", "insertion") if m not in self.metrics]
        values = measure(world, {"it": scores}, [*plain, *areas])["it"]
        values["faithfulness"] = values["insertion"] - values["deletion"]
        if any(m in SOFT for m in self.metrics):
            values |= soft(world, {"it": scores}, seed=self.seed).get("it", ({}, {}))[0]
        return {k: v for k, v in values.items() if k == "faithfulness" or k in self.metrics}


def _summary(model: Model, names: list[str], kept: Rows, seed: int, examples: list[Example]) -> Result:
    names = [*names[1:], RANDOM]
    table = {name: [kept.found[_digest(example), name] for example in examples] for name in names}
    refused = {
        name: next(r["refused"] for r in rows if "refused" in r)
        for name, rows in table.items()
        if any("refused" in r for r in rows)
    }
    left = [name for name in names if name not in refused]
    if left in ([], [RANDOM]):
        raise InputError(f"every method was refused; {next(iter(refused))}: {next(iter(refused.values()))}")
    metrics = [m for m in BETTER if any(m in row["values"] for name in left for row in table[name])]
    each = np.array(
        [[[table[m][i]["values"].get(k, np.nan) for k in metrics] for m in left] for i in range(len(examples))]
    )
    low, high = interval(each, seed)
    spent = [float(np.mean([row["cost"] for row in table[m]])) for m in left]
    preference = prefer(left, each[..., metrics.index("faithfulness")], spent, seed=seed)
    agreed = agreement({m: [np.array(row["scores"]) for row in table[m]] for m in left}, seed=seed)
    ranked = (
        agreement({m: [np.array(row["scores"]) for row in table[m]] for m in left if m != RANDOM}, seed=seed)
        if len(left) > 2
        else agreed
    )
    data = xr.Dataset(
        {
            "value": (("technique", "metric"), mean_over_prompts(each)),
            "low": (("technique", "metric"), low),
            "high": (("technique", "metric"), high),
            "each": (("example", "technique", "metric"), each),
            "cost": ("technique", spent),
            "deletion": (("technique", "step"), [np.mean([row["deletion"] for row in table[m]], 0) for m in left]),
            "insertion": (("technique", "step"), [np.mean([row["insertion"] for row in table[m]], 0) for m in left]),
            "agreement": (agreed.main.dims, agreed.values),
            "agreement_low": (agreed.main.dims, agreed.low.values),
            "agreement_high": (agreed.main.dims, agreed.high.values),
            "concordance": float(ranked.concordance),
            "concordance_low": float(ranked.concordance_low),
            "concordance_high": float(ranked.concordance_high),
            "difference": ("technique", preference.difference),
            "difference_low": ("technique", preference.low),
            "difference_high": ("technique", preference.high),
        },
        coords={
            "technique": left, "metric": metrics, "better": ("metric", [BETTER[m] for m in metrics]), "other": left,
            "measure": agreed.measure.values,
            "share": ("step", GRID), "example": range(len(examples)),
        },
        attrs={
            "sentence": preference.sentence, "preferred": preference.method, "best": preference.best,
            "refused": json.dumps(refused), "replacement": table[left[-1]][0]["replacement"],
        },
    )  # fmt: skip
    title = f"{len(left) - 1} attribution methods and random scores on {len(examples)} prompts of {model.name}"
    return Result(data, kind="attribution comparison", title=title)


Row = dict[str, Any]


class Rows:
    """Rows by (example, method), in memory and, with a path, in a file that is written as they come."""

    def __init__(self, path: str | Path | None, asked: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.found: dict[tuple[str, str], Row] = {}
        asked = json.loads(json.dumps({"format": "pellucid-benchmark", "version": 1, **asked}))
        if self.path is None:
            return
        if not self.path.exists():
            self._write(asked)
            return
        with self.path.open(encoding="utf-8") as lines:
            kept = [row for line in lines if (row := _read(line)) is not None]
        if not kept or kept[0] != asked:
            parts = [k for k in asked if not kept or kept[0].get(k) != asked[k]]
            raise InputError(
                f"{str(self.path)!r} has rows of another question (other {', '.join(parts)}): name another file or remove it"
            )
        self.found = {(row["example"], row["method"]): row for row in kept[1:]}
        text = "".join(json.dumps(_plain(row)) + "\n" for row in [asked, *self.found.values()])
        self.path.write_text(text, encoding="utf-8")  # without a last line that an interruption cut short

    def add(self, row: Row) -> None:
        self.found[row["example"], row["method"]] = row
        if self.path is not None:
            self._write(row)

    def _write(self, row: Row) -> None:
        assert self.path is not None
        try:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(_plain(row)) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {str(self.path)!r}: {error.strerror or error}") from None


def _read(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return {k: _numbers(v) for k, v in row.items()} if isinstance(row, dict) else None


def _plain(value: Any) -> Any:
    """NaN has no JSON: null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """What stood for NaN, inside of measured values."""
    return {k: float("nan") if v is None else v for k, v in value.items()} if isinstance(value, dict) else value
