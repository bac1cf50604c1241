"""What does a probe say at every token of a text, layer by layer, and from which value on should one believe it?

On each layer a probe is fitted to labelled places in texts and then read along a whole prompt:

    score[layer, position] = log p(label | h) / (1 - p(label | h)),   h the residual of that layer at that token

A probe that is read where it was never trained (at every token, when it learnt from last tokens) says what it says:
the trace shows where its verdict comes from, not that it is right there. Part of the texts is held out: on them the ROC
curve, its area with interval, and the threshold are measured. The threshold is where at most a share `alarms` of the
held-out examples of other labels lies above. The control is the area of the same probe trained on shuffled labels,
`draws` times: what a direction drawn at random tells apart, which can be much on few or clustered examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr

from pellucid.anatomy.sites import Site
from pellucid.changed import check_weights
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.probing.examples import Examples
from pellucid.probing.features import Features, Pool, features_of
from pellucid.probing.linear import LogisticProbe
from pellucid.probing.probe import Protocol, result
from pellucid.probing.roc import area, area_interval, roc
from pellucid.probing.splits import groups_of, held_out
from pellucid.results import Result
from pellucid.technique import technique

POINTS = 101  # of a kept ROC curve


@dataclass(eq=False)
class ProbeTraces:
    """A probe for every layer: `fit` to labelled places, then `trace` a prompt token by token.

    `label` is the class whose log odds are told, by default the last in order; `alarms` the share of false alarms the
    thresholds allow. After `fit`: `probes_` by site, `result_`: over `layer` `area` with its interval, `shuffled` (the
    mean over shuffles) and their range `shuffled_low` to `shuffled_high`, `threshold`; and `true_positive` [layer,
    false_positive].

    >>> found = ProbeTraces("false").fit(model, statements(texts, truth, topics)).trace(model, "Paris is in Peru.")
    """

    label: str = ""
    sites: str | Sequence[str] | None = None
    pool: Pool = "last"
    alarms: float = 0.05
    draws: int = 5
    protocol: Protocol = field(default_factory=lambda: Protocol(test=0.3))
    probes_: dict[str, LogisticProbe] = field(init=False, repr=False)
    result_: Result = field(init=False, repr=False)
    label_: str = field(init=False, repr=False)
    digest_: str | None = field(init=False, repr=False)

    @technique
    def fit(self, source: Model | Features, examples: Examples) -> ProbeTraces:
        """Fit on part of the texts (or types, as `protocol.by` says), judge on the rest.

        `source` is a model or what `read` gave. InputError for a label that is none, pairs, or a part without the label.
        """
        if examples.second is not None:
            raise InputError("these examples are pairs of places: a trace reads one token at a time")
        label = self.label or examples.classes[-1]
        if label not in examples.classes:
            raise InputError(f"no example is labelled {label!r}: the labels are {', '.join(examples.classes)}")
        features, groups = features_of(source, examples, self.sites, self.pool), groups_of(examples, self.protocol.by)
        held = held_out(groups, self.protocol.test, self.protocol.seed)
        truth = examples.labels == label
        if len(set(truth[held])) < 2 or len(set(truth[~held])) < 2:
            raise InputError(f"{label!r} and the rest are not in both parts: give more texts, or another seed")
        rng = np.random.default_rng(self.protocol.seed)
        deals = [rng.permutation(examples.labels[~held]) for _ in range(self.draws)]
        self.probes_, rows = {}, []
        for layer, site in enumerate(features.sites):
            x = features.of(examples, layer)
            p = self.protocol
            probe = LogisticProbe(p.l2, p.folds, p.seed).fit(x[~held], examples.labels[~held], groups[~held])
            self.probes_[site] = probe
            placebos = [LogisticProbe(probe.l2_).fit(x[~held], deal) for deal in deals]
            null = np.array([area(log_odds(each, label, x[held]), truth[held]) for each in placebos])
            rows.append(self._judged(log_odds(probe, label, x[held]), truth[held], groups[held]) | _range(null))
        columns: dict[str, Any] = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "curve"}
        columns["true_positive"] = (("layer", "false_positive"), np.stack([row["curve"] for row in rows]))
        columns["false_positive"] = ("false_positive", np.linspace(0, 1, POINTS))
        self.result_ = result("ProbeTraces", f"How well probes tell {label!r} apart", features, **columns)
        self.label_, self.digest_ = label, features.digest
        return self

    def _judged(self, scores: np.ndarray, truth: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
        low, high = area_interval(scores, truth, groups, self.protocol.seed)
        curve = roc(scores, truth)
        others = np.sort(scores[~truth])
        return {
            "area": area(scores, truth), "low": low, "high": high,
            "threshold": others[-1 - int(self.alarms * len(others))],
            "curve": np.interp(np.linspace(0, 1, POINTS), curve["false_positive"].values, curve["true_positive"].values),
        }  # fmt: skip

    @technique
    @torch.no_grad()
    def trace(self, model: Model, prompt: Any) -> Result:
        """`score` [layer, position], log odds in nats, of one prompt; with what `result_` says of each layer.

        InputError before `fit`, for another model than was fitted, and for several prompts.
        """
        if not hasattr(self, "probes_"):
            raise InputError("these probes are not fitted: call fit(model, examples)")
        check_weights(model, self.digest_, "this set of probes")
        inputs = model.inputs(prompt)
        if len(inputs) != 1:
            raise InputError(f"a trace reads one prompt at a time, got {len(inputs)}: call it once for each")
        run = model.run(inputs, keep=list(self.probes_))
        label = self.label_
        rows = []
        for site, probe in self.probes_.items():
            values, real = run.everywhere(Site.parse(site))
            rows.append(log_odds(probe, label, values[0][real[0]].flatten(1).cpu()))
        tokens = list(run.stream(Site.parse(next(iter(self.probes_)))).labels[0])
        judged = self.result_.data
        data = xr.Dataset({"score": (("layer", "position"), np.stack(rows))}, attrs={"unit": f"log odds of {label!r}"})
        data = data.assign_coords(position=range(len(tokens)), token=("position", tokens)).merge(judged)
        return Result(data, kind="probe traces", title=f"Log odds of {label!r} at every token")


def _range(drawn: np.ndarray) -> dict[str, float]:
    if not len(drawn):
        return {}
    return {"shuffled": drawn.mean(), "shuffled_low": drawn.min(), "shuffled_high": drawn.max()}


def log_odds(probe: LogisticProbe, label: str, x: torch.Tensor) -> np.ndarray:
    """[n] log p / (1 - p) of one class."""
    at = list(probe.classes_).index(label)
    logs = probe.decision_function(x).double()
    rest = torch.cat([logs[:, :at], logs[:, at + 1 :]], 1)
    return (logs[:, at] - rest.logsumexp(1)).cpu().numpy()
