"""What is bought at what price? Accuracy against one measure of interpretability, over the weight of an objective.

Every weight is a point, over seeds; the plain model, the control at the largest weight, and the same knowledge as augmentation are points
beside them. Weight 0 is the plain point. Points whose loss never left the constant prediction are `untrained`, and the sentence leaves
them out. The points share batches, so differences between them are paired by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique
from pellucid.tuning.data import Encoded, Rationales
from pellucid.tuning.fit import UNTRAINED, Settings, arms_of, run_arms, step_cost
from pellucid.tuning.measuring import NUMBERS
from pellucid.tuning.objective import Objective

LOWER = ("swap_effect", "gradient_share", "sufficiency")  # where less is better


@technique
def frontier(
    model: Model, data: Rationales, objective: Objective, *, weights: Sequence[float] = (1.0, 10.0, 100.0), measure: str | None = None,
    test: Rationales | None = None, shifts: Mapping[str, Rationales] | None = None, layers: Any = None, seeds: Sequence[int] = (0, 1, 2),
    steps: int = 60, batch: int = 16, learning_rate: float = 3e-4, head_learning_rate: float | None = None, weight_decay: float = 0.01,
    warmup: int = 5, clip: float | None = 1.0, truncate: int | None = None,
) -> Result:  # fmt: skip
    """Accuracy and a `measure` at several weights of one objective; options as in `fit`.

    `measure` is one that `fit` reports (by default attention_plausibility, plausibility or swap_effect, by what the objective is
    about). Gives over `point` ("plain", "weight 10", "control", "augmented") `accuracy` on the test texts with `low` and `high`, `shifted` (the
    least accuracy of any shift), the measure by its name, `cost`, `weight` and `untrained`; the title is the sentence.

    >>> frontier(model, data, Consistency("decoy"), weights=[1, 10], shifts={"reversed": other}, seeds=[0], steps=2).accuracy
    <xarray.DataArray 'accuracy' (point: 5)>...
    """
    if not isinstance(objective, Objective) or not weights or min(weights) < 0:
        raise InputError(
            f"objective={objective!r}, weights={list(weights)}: expected one objective, and weights of at least 0"
        )
    wanted = measure or (
        "attention_plausibility"
        if hasattr(objective, "looks")
        else "plausibility"
        if objective.reasons
        else "swap_effect"
    )
    if wanted not in NUMBERS:
        raise InputError(f"measure={measure!r}: expected one of {', '.join(NUMBERS)}")
    encoded = Encoded(model, data, truncate)
    objective.check(model, encoded)
    splits = {"test": Encoded(model, test if test is not None else data, truncate)}
    splits |= {name: Encoded(model, each, truncate) for name, each in (shifts or {}).items()}
    settings = Settings(
        model, encoded, layers, steps, batch, 1, learning_rate, head_learning_rate, weight_decay, warmup, clip
    )
    known = arms_of((replace(objective, weight=max(weights)),), True)
    arms: dict[str, tuple[Objective, ...]] = {"plain": ()}
    arms |= {f"weight {w:g}": (replace(objective, weight=float(w)),) for w in weights if w > 0}
    arms |= {name: own for name, own in known.items() if name in ("control", "augmented")}
    found, *_ = run_arms(settings, arms, splits, (objective,), seeds)
    cost = step_cost(settings, arms, seeds[0])
    accuracy = np.array([[[found[a, s].right[n].mean() for n in splits] for s in seeds] for a in arms])
    ends = [
        interval(accuracy[i, :, 0] if len(seeds) > 1 else found[a, seeds[0]].right["test"], 0, within=(0, 1))
        for i, a in enumerate(arms)
    ]
    numbers = np.array([np.mean([getattr(found[a, s], wanted) for s in seeds]) for a in arms])
    if np.isnan(numbers).all():
        raise InputError(f"measure={wanted!r} cannot be taken here: the texts lack the spans it is about")
    largest = float(max(weights))
    columns: dict[str, Any] = {
        "accuracy": accuracy[:, :, 0].mean(1), "low": [float(e[0]) for e in ends], "high": [float(e[1]) for e in ends], wanted: numbers,
        "cost": [cost[a] for a in arms],
        "weight": [float(a.split()[1]) if a.startswith("weight") else largest if a == "control" else 0.0 for a in arms],
        "untrained": [all(found[a, s].loss >= UNTRAINED * encoded.constant for s in seeds) for a in arms],
    }  # fmt: skip
    if shifts:
        columns["shifted"] = accuracy[:, :, 1:].mean(1).min(1)
    frame = xr.Dataset({name: ("point", np.asarray(values)) for name, values in columns.items()}, {"point": list(arms)})
    frame.attrs["by_seed"] = "accuracy and measures are means over seeds " + ", ".join(map(str, seeds))
    return Result(frame, kind="frontier", title=_sentence(frame, wanted))


def _sentence(frame: xr.Dataset, wanted: str) -> str:
    points = [p for p in frame["point"].values.tolist() if not bool(frame["untrained"].sel(point=p))]
    tried = [p for p in points if p.startswith("weight")]
    if not tried or "plain" not in points:
        return "No point was trained: longer training, or a lower weight"
    sign = -1 if wanted in LOWER else 1
    gains = {p: sign * float(frame[wanted].sel(point=p) - frame[wanted].sel(point="plain")) for p in points}
    main = "shifted" if "shifted" in frame else "accuracy"
    best = max(tried, key=lambda p: (float(frame[main].sel(point=p)), gains[p]) if main == "shifted" else (gains[p],))
    told = {p: {c: float(frame[c].sel(point=p)) for c in (wanted, "accuracy", main, "cost")} for p in points}
    was, now = told["plain"], told[best]
    shifted = f", accuracy under shift {was[main]:.2f} -> {now[main]:.2f}" if main == "shifted" else ""
    said = f"{best} bought {wanted.replace('_', ' ')} {was[wanted]:.2g} -> {now[wanted]:.2g}{shifted}"
    said += f" for {was['accuracy'] - now['accuracy']:+.2f} of accuracy and {now['cost']:.1f} x the cost"
    for other in ("augmented", "control"):
        if (
            other in points
            and gains[best] > 0
            and gains[other] >= 0.9 * gains[best]
            and told[other][main] >= now[main] - 0.03
        ):
            why = (
                "swapping the words buys as much without a penalty"
                if other == "augmented"
                else "the control buys as much"
            )
            return f"{why[0].upper()}{why[1:]} ({told[other]['cost']:.1f} x the cost). {said}"
    return said if gains[best] > 0 else f"No weight bought any {wanted.replace('_', ' ')}"
