"""Internals in the objective: what a reader sees inside costs, or is rewarded; and was it removed, or only moved out of sight?

    penalty = mean over rows of s(h)^2         s a reader's score (0 where it sees nothing), h the mean over a text's tokens at its site
    or log(1 + e^s), which lowers it, or log(1 + e^-s), which raises it ("considered it inside")

A reader is anything with a `site` and a call from values [..., d] to scores. Gradients that go through a reader buy what that reader cannot see:
the property moves to where it does not look (obfuscated activations, Bailey et al. 2024). So `evasion` fits new readers, linear, of
another kind and over another pooling, at the layer and at all later ones, on half of the texts, and tests them on the other half:

    hidden or moved    the old reader fell, a new one still reads it
    removed            every new reader, everywhere, is within two standard errors of those fitted to shuffled labels

A reader of shuffled labels is tested on shuffled labels: where the two kinds of text differ in what varies most, one fitted to any labels whatever
tells the true ones apart, or takes each for the other.

The control of the penalty is a random direction of the same norm, standardised on the same texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import softplus

from pellucid.anatomy.sites import Site
from pellucid.controls import shuffled_labels
from pellucid.engine.edits import Edit
from pellucid.errors import InputError, one_of
from pellucid.model import Model
from pellucid.probing.direction import Direction
from pellucid.results import Result
from pellucid.technique import technique
from pellucid.tuning.data import Encoded
from pellucid.tuning.objective import Objective, Pass

Form = Literal["square", "lower", "raise"]
KINDS = ("linear", "mlp", "max over tokens")
SHUFFLED = 8  # readers of shuffled labels at each layer


def direction(model: Model, data: Any, holds: Sequence[bool], site: str) -> Direction:
    """A linear reader of a property: logistic regression (C .1, balanced) on the mean over each text's tokens at `site`.

    >>> direction(model, data, holds, "layers.1.resid_post")
    Direction(site='layers.1.resid_post', offset=...)
    """
    x = pooled(model, Encoded(model, data), [Site.parse(site)])[0][0]
    y = _labels(holds, len(x))
    fitted = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000).fit(x, y)
    weight, states = (torch.tensor(v, dtype=torch.float32) for v in (fitted.coef_[0], x))
    return Direction.standardised(site, weight, states)


@dataclass(frozen=True, eq=False)
class ProbePenalty(Objective):
    """What a reader sees costs, or is rewarded (see the module). Check with `evasion` before anything is called removed.

    `form`: "square" (the score goes to 0), "lower" or "raise". `where` is the span over whose tokens is read; by default all.

    >>> ProbePenalty(reader, weight=1.0)
    ProbePenalty(weight=1.0, reader=Direction(site='layers.1.resid_post', offset=...), form='square', where=None)
    """

    reader: Any = None
    form: Form = field(default="square", kw_only=True)
    where: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.form, Form, "form=")

    @property
    def spans(self) -> tuple[str, ...]:
        return () if self.where is None else (self.where,)

    def sites(self, model: Model) -> list[Site]:
        return model.sites(str(getattr(self.reader, "site", "")))

    def check(self, model: Model, data: Encoded) -> None:
        super().check(model, data)
        if not callable(self.reader) or not hasattr(self.reader, "site") or len(self.sites(model)) != 1:
            raise InputError(
                f"{self.reader!r} is no reader: expected something with one site and a call, such as tuning.direction(...)"
            )

    def control(self) -> Objective | None:
        return replace(self, reader=self.reader.random()) if hasattr(self.reader, "random") else None

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor:
        (site,) = self.sites(seen.model)
        mask = seen.run.stream(site).mask if self.where is None else seen.batch.masks[self.where]
        score: Tensor = self.reader(mean(seen.run.tensor(site), mask.to(seen.run.tensor(site).device))).float()
        costs = scored(score, self.form)
        return costs.mean() if self.where is None else seen.mean_where(costs, self.spans)


def scored(score: Tensor, form: Form) -> Tensor:
    """What scores cost."""
    return score.square() if form == "square" else softplus(score if form == "lower" else -score)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """[row, d] over the tokens under a mask [row, position]; 0 where there is none."""
    mask = mask.to(x)[..., None]
    return (x * mask).sum(1) / mask.sum(1).clamp_min(1)


def _labels(holds: Sequence[bool], n: int) -> np.ndarray:
    y = np.asarray(holds).astype(int)
    if len(y) != n or not 0 < y.sum() < n:
        raise InputError(
            f"{len(y)} labels, {y.sum()} of them true, for {n} texts: expected one for each text, and both kinds"
        )
    return y


def pooled(
    model: Model, data: Encoded, sites: Sequence[Site], edits: Sequence[Edit] = ()
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each site [text, d] the mean and the maximum over the tokens of each text."""
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in sites]
    with torch.no_grad():
        for start in range(0, len(data), 32):
            batch = data.batch(range(start, min(start + 32, len(data))))
            run = model.run(batch.inputs, keep=list(sites), edits=edits)
            for (means, tops), site in zip(found, sites, strict=True):
                x, mask = run.tensor(site).float(), run.stream(site).mask
                means.append(mean(x, mask).cpu())
                tops.append(x.masked_fill(~mask.bool()[..., None].to(x.device), -torch.inf).amax(1).cpu())
    return [torch.cat(m).numpy() for m, _ in found], [torch.cat(t).numpy() for _, t in found]


@technique
def evasion(
    model: Model, tuned: Model, data: Any, holds: Sequence[bool], reader: Any, *, edits: Sequence[Edit] = (), seed: int = 0
) -> Result:  # fmt: skip
    """Whether a property that a reader no longer sees in `tuned` is still there: read anew, and elsewhere.

    `holds` says for each text of `data` (not trained on, if that can be) whether the property holds. Gives `auc` [when, layer, kind] over
    "before" and "after", the layers from the reader's on, and linear, mlp and max-pooled readers fitted on one half of the texts and
    tested on the other; `same` [when], the old reader's own AUC, and `shuffled` [when, layer], the mean of linear readers of labels shuffled
    (within each half) eight times. The title is the verdict.

    >>> evasion(model, tuned.model, data, holds, reader).auc
    <xarray.DataArray 'auc' (when: 2, layer: 1, kind: 3)>...
    """
    encoded = {"before": Encoded(model, data), "after": Encoded(tuned, data)}
    (site,) = model.sites(str(reader.site))
    y = _labels(holds, len(encoded["before"]))
    if not isinstance(site.layer, int):
        raise InputError(
            f"{reader.site!r} has no layer, so there is no later one to look at: read at layers.N.resid_post"
        )
    n = next(len(s.blocks) for s in model.anatomy.stacks if s.name == site.stack)
    sites = [replace(site, layer=i) for i in range(site.layer, n)]
    order = np.random.default_rng(seed).permutation(len(y))
    fit, test = order[: len(y) // 2], order[len(y) // 2 :]
    if len(set(y[fit])) < 2 or len(set(y[test])) < 2:
        raise InputError("one half of the texts is all of one kind: give more texts, or another seed")
    half = np.isin(np.arange(len(y)), fit)
    wrong = [shuffled_labels(y, np.random.default_rng([seed, i]), within=half.tolist()) for i in range(SHUFFLED)]
    auc, same, chance = np.zeros((2, len(sites), len(KINDS))), np.zeros(2), np.zeros((2, len(sites)))
    for w, (when, own) in enumerate(encoded.items()):
        means, tops = pooled(model if when == "before" else tuned, own, sites, edits if when == "after" else ())
        same[w] = roc_auc_score(y[test], np.asarray(reader(torch.tensor(means[0])).detach())[test])
        for i, (mean, top) in enumerate(zip(means, tops, strict=True)):
            for k, (kind, x) in enumerate(zip(KINDS, (mean, mean, top), strict=True)):
                auc[w, i, k] = _auc(x, y, fit, test, kind == "mlp", seed)
            chance[w, i] = np.mean([_auc(mean, labels, fit, test, False, seed) for labels in wrong])
    said = _verdict(same, auc, chance, int(y[test].sum()), int((1 - y[test]).sum()))
    frame = xr.Dataset(
        {"auc": (("when", "layer", "kind"), auc), "same": ("when", same), "shuffled": (("when", "layer"), chance)},
        {"when": list(encoded), "layer": [s.layer for s in sites], "kind": list(KINDS)},
    )
    return Result(frame, kind="evasion", title=said)


def _auc(x: np.ndarray, y: np.ndarray, fit: np.ndarray, test: np.ndarray, mlp: bool, seed: int) -> float:
    rule: Any = (
        MLPClassifier((64,), max_iter=300, alpha=1e-2, random_state=seed)
        if mlp
        else LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
    )
    made = make_pipeline(StandardScaler(), rule).fit(x[fit], y[fit])
    return float(roc_auc_score(y[test], made.predict_proba(x[test])[:, 1]))


def _verdict(same: np.ndarray, auc: np.ndarray, chance: np.ndarray, yes: int, no: int) -> str:
    """Hanley and McNeil's standard error of an AUC of one half: sqrt((yes + no + 1) / (12 yes no))."""
    error = math.sqrt((yes + no + 1) / (12 * yes * no))
    least = [max(float(c.mean()), 0.5) + 2 * error for c in chance]
    was, best = float(auc[0].max()), float(auc[1].max())
    said = f"the old reader went from {same[0]:.2f} to {same[1]:.2f}; fitted anew it is read at {best:.2f}"
    if was <= least[0]:
        return f"Nothing to remove: no reader saw it before ({was:.2f}, shuffled labels at {float(chance[0].mean()):.2f}); {said}"
    if best <= least[1]:
        return f"Removed, as far as these readers tell: {said}, shuffled labels at {float(chance[1].mean()):.2f}"
    if abs(same[1] - 0.5) >= abs(same[0] - 0.5) - 0.02:
        return f"Still there: {said}"
    return f"Moved or hidden, not removed: {said}"
