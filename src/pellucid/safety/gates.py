"""Who is looked at closely? A cheap first stage decides, token by token, which conversations the dear second one reads.

    the second stage reads a row from the token on at which the first one's statistic is above its threshold
    the cascade fires where the second's statistic is above the cascade's threshold

Both are monitors: of activations, or of words (`Words(function)`, a classifier or a judge of your own). The first is set to
miss little (a high rate of alarms), the second's threshold is set on the whole cascade, so its promise is the cascade's: see
`calibrate`. A cascade can find no more than its second stage would alone at the same threshold; what it saves is the reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.safety.calibrating import judged, several, traces
from pellucid.safety.guarding import Seen
from pellucid.safety.monitors import Monitor, Monitored, kept_action, made_action, made_threshold
from pellucid.safety.thresholds import Threshold
from pellucid.technique import technique


@dataclass(frozen=True, eq=False)
class Cascade(Monitored):
    """A monitor of two stages; `first` has a threshold, `second` is read only where that is passed.

    `threshold` is the second's, from `calibrate(model, cascade, benign)`; what is done is `then`.
    """

    first: Monitor
    second: Monitor
    threshold: float | Threshold | None = None
    then: Any = None
    name: str = "cascade"
    digest: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.first, Monitor) or not isinstance(self.second, Monitor):
            raise InputError("a cascade is of two monitors: Cascade(first, second)")
        if self.first.threshold is None:
            raise InputError(
                f"{self.first.name!r} has no threshold, so nobody would meet the second stage: calibrate it first"
            )
        if self.threshold is None and self.second.threshold is not None:
            object.__setattr__(self, "threshold", self.second.threshold)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(dict.fromkeys((*self.first.sites, *self.second.sites)))

    def check(self, model: Model) -> None:
        super().check(model)
        self.first.check(model)
        self.second.check(model)

    def follow(self, state: dict[str, Any], seen: Seen) -> tuple[np.ndarray, np.ndarray]:
        _, early = self.first.follow(state.setdefault("first", {}), seen)
        passed = np.where(np.isnan(early), -np.inf, early) > self.first.level
        met = np.logical_or.accumulate(passed, 1) | state.get("met", np.zeros(len(passed), dtype=bool))[:, None]
        state["met"] = met[:, -1]
        scores, late = self.second.follow(state.setdefault("second", {}), seen, met)
        state["asked"] = state.get("asked", np.zeros(len(met))) + (~np.isnan(scores)).sum(1)
        return scores, late

    def tie(self, model: Model) -> Cascade:
        return replace(self, first=self.first.tie(model), second=self.second.tie(model), digest=model.digest)

    def kept(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        tau = self.threshold
        return {
            "name": self.name, "first": self.first.kept(tensors), "second": self.second.kept(tensors),
            "threshold": vars(tau) if isinstance(tau, Threshold) else tau, "then": kept_action(self.name, self.then, tensors),
        }  # fmt: skip

    @classmethod
    def made(cls, about: dict[str, Any], tensors: dict[str, Tensor], readers: list[Any]) -> Cascade:
        first, second = (
            Monitor.made({**about[k], "digest": about["digest"]}, tensors, readers) for k in ("first", "second")
        )
        return cls(first, second, made_threshold(about["threshold"]), made_action(about["then"], tensors), about["name"], about["digest"])  # fmt: skip


@technique
def compare_stages(
    model: Model,
    cascade: Cascade,
    prompts: Sequence[Any],
    labels: Sequence[Any],
    *,
    replies: Sequence[str] | None = None,
    max_new_tokens: int = 40,
    batch: int = 8,
    seed: int = 0,
) -> Result:
    """The cascade beside each of its stages alone, each at its own threshold; `labels`: which conversations should set it off.

    Over `stage` (first, second, cascade): `alarms` and `recall` with exact 95 % intervals, `area`; and what it costs, `read`:
    the share of the tokens that a dear stage reads (0 for the first, 1 for the second), `met_benign` and `met_harmful` the
    shares of conversations that meet it at all.

    >>> compare_stages(model, Cascade(cheap, dear), prompts, labels).area
    <xarray.DataArray 'area' (stage: 3)>...
    """
    truth, prompts = np.asarray(labels).astype(bool), several("prompts", prompts)
    if len(truth) != len(prompts):
        raise InputError(f"{len(prompts)} prompts and {len(truth)} labels: give one for each")
    second = replace(
        cascade.second,
        threshold=cascade.second.threshold if cascade.second.threshold is not None else cascade.threshold,
    )
    rows, read = [], {}
    if second.threshold is None:
        raise InputError(f"{cascade.name!r} has no threshold: safety.calibrate sets one from benign conversations")
    if not np.isfinite(second.level):
        raise InputError(
            "whoever meets the second stage sets this cascade off, so it has no threshold to be compared alone: calibrate it by itself"
        )
    for name, each in (("first", cascade.first), ("second", second), ("cascade", cascade)):
        states: list[dict[str, Any]] = []
        found = list(traces(model, each, prompts, replies, max_new_tokens, batch, states))
        scores = np.array([float(t.max(initial=-np.inf)) for t in found])
        read[name] = (
            np.concatenate([state["asked"] for state in states])
            if name == "cascade"
            else np.array([len(t) for t in found], dtype=float)
        )
        rows.append(judged(each, scores, truth, ["all"] * len(truth), seed, name).data.isel(source=0))
    names = ("alarms", "alarms_low", "alarms_high", "recall", "recall_low", "recall_high", "area")
    columns: dict[str, Any] = {n: ("stage", [float(r[n]) for r in rows]) for n in names if all(n in r for r in rows)}
    met = read["cascade"] > 0
    share = float(read["cascade"].sum() / max(read["second"].sum(), 1))
    columns |= {"read": ("stage", [0.0, 1.0, share])}
    for kind, wanted in (("met_benign", False), ("met_harmful", True)):
        part = float(met[truth == wanted].mean()) if (truth == wanted).any() else float("nan")
        columns[kind] = ("stage", [0.0, 1.0, part])
    data = xr.Dataset(columns, coords={"stage": ["first", "second", "cascade"]})
    lost = float(data["recall"][1] - data["recall"][2])
    title = f"{cascade.name}: the second stage reads {share:.1%} of the tokens, and {lost:+.1%} of recall is lost"
    return Result(data, kind="cascade", title=title)
