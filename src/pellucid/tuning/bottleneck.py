"""Concepts as a bottleneck: they are predicted at a layer, and only they go on.

h is the mean of a text's values at the layer (of a causal stack that of the tokens so far), layer-normalised to length 1; every token's values become

    l = W h + a        z = sigma(l), or hard 1[l > 0] with the gradient of sigma          the concepts
    x' = mean + spread (base + sum_k (z_k - 1/2) v_k + U D h)                              all that later layers see; D h, of `residual` numbers,
                                                                                          is the channel that is no concept
    loss = cross-entropy + weight * mean over concepts of the binary cross-entropy of l

kind    independent    what comes after is trained on the true concepts (cannot leak by construction of its training; default)
        sequential     on predicted ones, whose gradient stops there
        joint          on predicted ones (Koh et al. 2020), a share `mix` of them true (RandInt of Espinosa Zarlenga et al. 2022)

`weight` multiplies the mean over concepts; in papers it is often their sum. That nothing goes round the bottleneck is tried before the first
step: with the concepts held, other words change no bit of the answer. What a fit measures, on texts not trained on:

    concept_auc, concept_accuracy      of predicted concepts (rare ones flatter the accuracy)
    with_true, with_another_texts      accuracy with every concept set to the truth, to that of another text (must fall to chance)
    ceiling                            the label from true concepts by logistic regression: what beats it leaks
    within                             AUC of the label from z_k among texts with the same true concept, mean over k; .5 says no leak, and
                                       the control says where few texts put that
    from_values, from_bits             the label from z, from 1[z > 1/2], by logistic regression
    concepts_at_mean, residual_at_mean accuracy with the concepts, or the residual, at their mean: what the other one does alone

The control is the same bottleneck on concepts shuffled between texts. Where it does as well the concepts are not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, layer_norm

from pellucid.anatomy.sites import Site
from pellucid.controls import shuffled_labels
from pellucid.engine.edits import Edit, Place
from pellucid.engine.marks import ordinary_ids
from pellucid.errors import InputError, Refused, nearest
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique
from pellucid.tuning.data import Batch, Encoded, Rationales
from pellucid.tuning.fit import Tuned
from pellucid.tuning.learnt import Learnt
from pellucid.tuning.measuring import plain, shown
from pellucid.tuning.objective import NONE, Objective, Pass

Kind = Literal["independent", "sequential", "joint"]


@dataclass(frozen=True, eq=False, repr=False)
class Narrow(Edit):
    """Values that leave through a bottleneck. `known` [row, concept] are concepts put in by hand (NaN: the model's own), `rest` what the
    residual channel holds instead of its own values."""

    of: Bottleneck
    known: Tensor | None = None
    rest: Tensor | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)

    def new(self, x: Tensor, place: Place) -> Tensor:
        p = {name: v.to(x.device) for name, v in self.of.state_["tensors"].items()}
        real = (place.positions < place.stream.lengths[:, None]).to(x.device)[..., None]
        wide = x.float() * real
        if self.seen.get("causal") is not None:
            h = wide.cumsum(1) / real.float().cumsum(1).clamp_min(1)
        else:
            h = (wide.sum(1) / real.float().sum(1))[:, None]
        h = layer_norm(h, h.shape[-1:]) / h.shape[-1] ** 0.5
        logits = h @ p["head.concepts"].T + p["head.bias"]
        z = self.of.said_as(logits)
        self.seen.update(logits=logits, narrow=h)
        if self.known is not None:
            known = self.known.to(x.device)[:, None]
            z = torch.where(known.isnan(), z, known.nan_to_num())
        new = (
            p["head.base"] + (z - 0.5) @ p["head.out"]
        )  # in units of how far texts are apart there, so that one rate fits
        if self.of.residual:
            rest = h @ p["head.down"].T
            self.seen["rest"] = rest
            new = new + (rest if self.rest is None else self.rest.to(rest).expand_as(rest)) @ p["head.up"]
        return (p["fixed.mean"] + p["fixed.spread"] * new).expand(x.shape).to(x.dtype)


@dataclass(frozen=True)
class Bottleneck(Learnt):
    """The answer passes through `concepts` (names of properties of the texts; None: all of them) at `layer` (see the module).

    `hard` concepts are 0 or 1; `residual` is the width of the channel beside them. An objective of `tuning.fit`; what was learnt is
    `tuned.objectives["objective"][0]`, which `save` writes, and the tuned model runs under `tuned.edits`. `stack` names one of an
    encoder-decoder's (its encoder by default). Refused where something goes round the layer.

    >>> Bottleneck(["praise", "blame"], residual=8)
    Bottleneck(weight=10.0, concepts=['praise', 'blame'], layer=-1, kind='independent', hard=True, residual=8, mix=0.0, stack='', shuffled=False)
    """

    weight: float = field(default=10.0, kw_only=True)
    concepts: Sequence[str] | None = None
    layer: int = -1
    kind: Kind = field(default="independent", kw_only=True)
    hard: bool = field(default=True, kw_only=True)
    residual: int = field(default=0, kw_only=True)
    mix: float = field(default=0.0, kw_only=True)
    stack: str = field(default="", kw_only=True)
    shuffled: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in get_args(Kind):
            raise InputError(f"kind={self.kind!r}: expected one of {', '.join(get_args(Kind))}")
        if self.residual < 0 or not 0 <= self.mix <= 1 or (self.mix and self.kind != "joint"):
            raise InputError(
                f"residual={self.residual}, mix={self.mix}: expected a width of at least 0, and a share (of kind='joint' only)"
            )

    # ---- what it is on one model

    @property
    def names(self) -> list[str]:
        """The concepts in order, once begun."""
        return list(self.state_.get("names", self.concepts or ()))

    def site(self, model: Model) -> Site:
        stack = self.stack or model.anatomy.stacks[0].name
        (site,) = model.sites(f"{stack + '.' if stack else ''}layers.{self.layer}.resid_post")
        return site

    def said_as(self, logits: Tensor) -> Tensor:
        soft = logits.sigmoid()
        soft = soft.detach() if self.kind == "sequential" and torch.is_grad_enabled() else soft
        return (logits > 0).to(soft) + (soft - soft.detach()) if self.hard else soft

    def check(self, model: Model, data: Encoded | None = None) -> None:
        """Of a fitted one (data None): InputError where it belongs to other weights. Else what stands in its way."""
        if data is None:
            return self.belongs(model)
        truth_of(data.data, self.concepts)
        row = next((i for i in range(len(data)) if data.content[i]), 0)
        batch, begun = data.batch([row]), self.begun(model, data, 0)
        words = ordinary_ids(model.tokenizer, model.vocabulary)
        ids, drawn = batch.ids.clone(), torch.Generator().manual_seed(0)
        for k in data.content[row]:
            ids[0, k] = words[int(torch.randint(len(words), (1,), generator=drawn))]
        held = torch.zeros(1, len(begun.names))
        with torch.no_grad():
            a, b = (
                each.read(model.run(each.inputs, edits=[begun.narrow(model, held, torch.zeros(1))]).logits)
                for each in (batch, batch.with_ids(ids))
            )
        if not torch.equal(a, b):
            raise Refused(
                f"{model.name} lets words reach the answer round layer {self.layer}: with every concept held, other words changed it by "
                f"{float((a - b).abs().max()):.2g}, so this would be no bottleneck"
            )
        return None

    def begun(self, model: Model, data: Encoded, seed: int) -> Bottleneck:
        """With parameters: concepts at 0, directions drawn, as large as texts differ at the layer."""
        site, (names, _) = self.site(model), truth_of(data.data, self.concepts)
        with torch.no_grad():
            rows = data.batch(range(min(len(data), 64)))
            run = model.run(rows.inputs, keep=[site], logits=False)
            x, mask = run.tensor(site).float().cpu(), run.stream(site).mask.cpu()[..., None]
        means = (x * mask).sum(1) / mask.sum(1)
        spread = means.std(0) if len(means) > 1 else means.abs()[0]
        drawn, d = torch.Generator().manual_seed(seed), x.shape[-1]
        tensors = {
            "head.concepts": torch.randn(len(names), d, generator=drawn), "head.bias": torch.zeros(len(names)),
            "head.out": torch.randn(len(names), d, generator=drawn), "head.base": torch.zeros(d),
            "fixed.mean": means.mean(0), "fixed.spread": spread,
        }  # fmt: skip
        if self.residual:
            tensors["head.down"] = torch.randn(self.residual, d, generator=drawn)
            tensors["head.up"] = torch.randn(self.residual, d, generator=drawn)
        made = replace(self)
        device = next(model.module.parameters()).device
        tensors = {k: v.to(device) for k, v in tensors.items()}
        made.state_.update(tensors=tensors, names=names, seed=seed)
        return made

    def narrow(self, model: Model, known: Tensor | None = None, rest: Tensor | None = None) -> Narrow:
        """The edit, with concepts put in by hand: `known` [row, concept], NaN where the model's own are to stay."""
        if not self.state_:
            self.belongs(model)
        site = self.site(model)
        made = Narrow(site, self, known, rest)
        if next(s.causal for s in model.anatomy.stacks if s.name == site.stack):
            made.seen["causal"] = torch.ones(())
        if digest := self.state_.get("digest"):
            object.__setattr__(made, "_digest", digest)
        return made

    def edits(self, model: Model, own: Mapping[str, Tensor] = NONE) -> list[Edit]:
        return [self.narrow(model)]

    # ---- training

    def shown(
        self, model: Model, batch: Batch, data: Encoded, generator: torch.Generator | None, own: Mapping[str, Tensor] = NONE
    ) -> Batch:  # fmt: skip
        known = None
        if generator is not None and (self.kind == "independent" or self.mix):
            known = self._truth(data)[list(batch.rows)]
            if self.mix:
                known = known.masked_fill(torch.rand(known.shape, generator=generator) >= self.mix, torch.nan)
        return replace(batch, edits=(*batch.edits, self.narrow(model, known)))

    def _truth(self, data: Encoded) -> Tensor:
        """[text, concept] as it was taught: of the control shuffled."""
        _, truth = truth_of(data.data, self.concepts)
        if self.shuffled:
            truth = truth[shuffled_labels(np.arange(len(truth)), int(self.state_.get("seed", 0)))]
        return torch.from_numpy(truth).float()

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor:
        edit = next(e for e in seen.batch.edits if isinstance(e, Narrow) and e.of is self)
        logits = _where_read(edit.seen["logits"], seen.batch, seen.data)
        truth = self._truth(seen.data)[list(seen.batch.rows)].to(logits)
        told = ~truth.isnan()
        each = binary_cross_entropy_with_logits(logits, truth.nan_to_num(), reduction="none")
        return (each * told).sum() / told.sum().clamp_min(1)

    def control(self) -> Objective:
        return replace(self, shuffled=True)

    # ---- what came of it

    def numbers(self, model: Model, train: Encoded, test: Encoded, seed: int) -> dict[str, float]:
        return measures(model, self, train, test, seed)

    def said(self, data: xr.Dataset, texts: int) -> list[str]:
        return _verdict(data, self, 2 * (0.25 / texts) ** 0.5)


def truth_of(data: Rationales, concepts: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """The names and [text, concept] 1, 0 or NaN. InputError for an unknown one, and one that holds always or never."""
    names = list(data.properties) if concepts is None else list(concepts)
    if not names:
        raise InputError("the data names no concepts: Rationales(..., properties={'praise': [True, False, ...]})")
    for name in names:
        if name not in data.properties:
            raise InputError(f"the data has no concept {name!r}{nearest(name, data.properties)}")
    try:
        found = np.array([[np.nan if v is None else float(v) for v in data.properties[name]] for name in names]).T
    except (TypeError, ValueError):
        raise InputError(
            "concepts hold (True) or do not (False), or are not known (None): found something else"
        ) from None
    for name, values in zip(names, found.T, strict=True):
        known = values[~np.isnan(values)]
        if not np.isin(known, (0, 1)).all():
            raise InputError(f"the concept {name!r} has values besides true and false: expected one of these, or None")
        if len(set(known.tolist())) < 2:
            raise InputError(f"the concept {name!r} is alike in all texts: there is nothing to learn from")
    return names, found


def _where_read(values: Tensor, batch: Batch, data: Encoded) -> Tensor:
    """[row, ...] of [row, position, ...] at the last token of each prompt, or what there is one of."""
    if values.shape[1] == 1:
        return values[:, 0]
    last = torch.tensor([data.lengths[i] - 1 for i in batch.rows], device=values.device)
    return values[torch.arange(len(values), device=values.device), last]


def _seen(model: Model, bottleneck: Bottleneck, data: Encoded) -> dict[str, np.ndarray]:
    """[text, ...] concept logits and the residual's values."""
    found: dict[str, list[Tensor]] = {}
    for batch in shown(model, data, [bottleneck]):
        (edit,) = (e for e in batch.edits if isinstance(e, Narrow))
        with torch.no_grad():
            model.run(batch.inputs, keep=[edit.site], edits=batch.edits, logits=False)
        for name in ("logits", "rest"):
            if name in edit.seen:
                found.setdefault(name, []).append(_where_read(edit.seen[name], batch, data).cpu())
    return {name: torch.cat(v).double().numpy() for name, v in found.items()}


def _right(
    model: Model, bottleneck: Bottleneck, data: Encoded, known: np.ndarray | None = None, rest: np.ndarray | None = None
) -> np.ndarray:
    """[text] whether it is answered right with concepts [text, concept], or the residual, put in."""
    kept = None if known is None else torch.tensor(known, dtype=torch.float32)
    held = None if rest is None else torch.tensor(rest, dtype=torch.float32)
    found = []
    for batch in shown(model, data):
        edit = bottleneck.narrow(model, None if kept is None else kept[list(batch.rows)], held)
        found.append(plain(model, replace(batch, edits=(edit,)))[1])
    return np.concatenate(found)


def measures(model: Model, bottleneck: Bottleneck, train: Encoded, test: Encoded, seed: int) -> dict[str, float]:
    """The numbers of the module."""
    own, taught = (_seen(model, bottleneck, each) for each in (test, train))
    z, of_train = (bottleneck.said_as(torch.from_numpy(each["logits"])).numpy() for each in (own, taught))
    found = {"accuracy": float(_right(model, bottleneck, test).mean())}
    mean = np.broadcast_to(of_train.mean(0), z.shape)
    found["concepts_at_mean"] = float(_right(model, bottleneck, test, mean).mean())
    if bottleneck.residual:
        found["residual_at_mean"] = float(_right(model, bottleneck, test, None, taught["rest"].mean(0)).mean())
    labels = [
        None if each.labels is None else np.unique(np.asarray(each.labels).astype(str), return_inverse=True)
        for each in (train, test)
    ]
    sides = [None if each is None else each[1] for each in labels]
    if all(name in test.data.properties for name in bottleneck.names):
        truth = np.array(
            [[np.nan if v is None else float(v) for v in test.data.properties[n]] for n in bottleneck.names]
        ).T
        known = [~np.isnan(t) for t in truth.T]
        aucs = [
            roc_auc_score(t[k], s[k])
            for t, s, k in zip(truth.T, own["logits"].T, known, strict=True)
            if len(set(t[k])) > 1
        ]
        found["concept_auc"] = float(np.mean(aucs)) if aucs else np.nan
        found["concept_accuracy"] = float(((own["logits"] > 0) == truth)[~np.isnan(truth)].mean())
        found["with_true"] = float(_right(model, bottleneck, test, truth).mean())
        other = truth[shuffled_labels(np.arange(len(truth)), seed)]
        found["with_another_texts"] = float(_right(model, bottleneck, test, other).mean())
        if sides[1] is not None and len(set(sides[1])) == 2:
            found["within"] = _within(own["logits"], truth, sides[1])
        if sides[0] is not None and not np.isnan(truth).any():
            given = truth_of(train.data, bottleneck.names)[1]
            found["ceiling"] = _read(np.nan_to_num(given, nan=0.5), sides[0], truth, sides[1])
    if sides[0] is not None:
        soft = [1 / (1 + np.exp(-each["logits"])) for each in (taught, own)]
        found["from_values"] = _read(soft[0], sides[0], soft[1], sides[1])
        found["from_bits"] = _read(soft[0] > 0.5, sides[0], soft[1] > 0.5, sides[1])
    return found


def _within(scores: np.ndarray, truth: np.ndarray, y: np.ndarray) -> float:
    found = []
    for s, t in zip(scores.T, truth.T, strict=True):
        for value in (0, 1):
            rows = t == value
            if 0 < y[rows].sum() < rows.sum():
                auc = roc_auc_score(y[rows], s[rows])
                found.append(max(auc, 1 - auc))
    return float(np.mean(found)) if found else float("nan")


def _read(x: Any, y: Any, test: Any, labels: Any) -> float:
    """Accuracy of logistic regression fitted on one set and read on another."""
    if labels is None or len(set(y)) < 2:
        return float("nan")
    return float(LogisticRegression(max_iter=1000).fit(x, y).score(test, labels))


def _verdict(data: xr.Dataset, bottleneck: Bottleneck, error: float) -> list[str]:
    def of(arm: str, measure: str) -> float:
        known = arm in data["arm"] and measure in data["measure"]
        return float(data["measured"].sel(arm=arm, measure=measure)) if known else float("nan")

    own, control = of("objective", "accuracy"), of("control", "accuracy")
    said = []
    alone = of("objective", "concepts_at_mean")
    if alone >= own - error and own > of("objective", "residual_at_mean"):
        beside = (
            f"shuffled concepts do as well ({control:.2f} against {own:.2f}), and " if control >= own - error else ""
        )
        said.append(
            f"the concepts are not used: {beside}with them at their mean it answers {alone:.2f}, so the residual of {bottleneck.residual} is the "
            f"model (without it {of('objective', 'residual_at_mean'):.2f})"
        )
    lost = own - of("objective", "with_true")
    if lost > error:
        said.append(f"it leaks: told the true concepts, accuracy falls from {own:.2f} to {own - lost:.2f}")
    if own > of("objective", "ceiling") + error:
        said.append(f"it leaks: {own:.2f} is more than true concepts can tell ({of('objective', 'ceiling'):.2f})")
    told = (
        f"concepts of AUC {of('objective', 'concept_auc'):.2f} (shuffled {of('control', 'concept_auc'):.2f}); accuracy {own:.2f}, with the true ones "
        f"{of('objective', 'with_true'):.2f}, with another text's {of('objective', 'with_another_texts'):.2f}, ceiling {of('objective', 'ceiling'):.2f}"
    )
    return [*said, told]


@technique
def interventions(
    model: Model, data: Rationales, bottleneck: Bottleneck | Tuned, *, order: str | Sequence[str] = "random", flipped: Sequence[str] = (),
    share: float = 0.5, draws: int = 3, seed: int = 0,
) -> Result:  # fmt: skip
    """The curve of interventions on a model tuned with a `bottleneck` (as learnt, or the `Tuned`): accuracy with 0, 1, ... all concepts set by hand to the truth, and to another text's truth (the control).

    `order`: "random" (`draws` orders), "uncertain" (each text's least sure concept first) or names, first ones first, which may be fewer
    than all. `flipped` are concepts whose own predictions are turned round in a `share` of the texts: a broken layer of concepts, which
    interventions have to mend. Gives `accuracy` [source, known] with `low` and `high` over texts. InputError for unknown names.

    >>> interventions(tuned.model, data, tuned)  # doctest: +SKIP
    """
    if isinstance(bottleneck, Tuned):
        learnt = [
            e for each in bottleneck.objectives.values() for e in each if isinstance(e, Bottleneck) and not e.shuffled
        ]
        if not learnt:
            raise InputError("this model was not tuned with a Bottleneck among the objectives")
        bottleneck = learnt[0]
    bottleneck.check(model)
    encoded = Encoded(model, data)
    names, truth = truth_of(data, bottleneck.names)
    wanted = names if isinstance(order, str) else list(order)
    if isinstance(order, str) and order not in ("random", "uncertain"):
        raise InputError(f"order={order!r}: expected 'random', 'uncertain' or names of concepts")
    for name in (*wanted, *flipped):
        if name not in names:
            raise InputError(f"the bottleneck has no concept {name!r}{nearest(name, names)}")
    logits = _seen(model, bottleneck, encoded)["logits"]
    own = bottleneck.said_as(torch.from_numpy(logits)).numpy()
    rng = np.random.default_rng(seed)
    for name in flipped:
        k, rows = names.index(name), rng.permutation(len(own))[: round(share * len(own))]
        own[rows, k] = 1 - own[rows, k]
    sources = {"true": truth, "another text's": truth[shuffled_labels(np.arange(len(truth)), seed)]}
    right = np.zeros((len(sources), len(wanted) + 1, len(own)))
    times = draws if order == "random" else 1
    for _ in range(times):
        ranks = np.tile(rng.permutation(len(names)), (len(own), 1))  # [text, concept] the place at which it is set
        if order == "uncertain":
            ranks = np.abs(logits).argsort(1).argsort(1)
        elif not isinstance(order, str):
            ranks = np.tile([wanted.index(n) if n in wanted else len(names) for n in names], (len(own), 1))
        for i, source in enumerate(sources.values()):
            for k in range(len(wanted) + 1):
                put = np.where((ranks < k) & ~np.isnan(source), source, own)
                right[i, k] += _right(model, bottleneck, encoded, put) / times
    low, high = interval(np.moveaxis(right, -1, 0), seed, groups=data.groups, within=(0, 1))
    mean = right.mean(-1)
    frame = xr.Dataset(
        {
            "accuracy": (("source", "known"), mean),
            "low": (("source", "known"), low),
            "high": (("source", "known"), high),
        },
        {"source": list(sources), "known": np.arange(len(wanted) + 1)},
    )
    gain, control = mean[:, -1] - mean[:, 0]
    title = f"The truth of {len(wanted)} concepts takes accuracy from {mean[0, 0]:.2f} to {mean[0, -1]:.2f}, another text's to {mean[1, -1]:.2f}"
    if gain <= max(control, 0):
        title = (
            f"Interventions gain nothing ({gain:+.2f}, another text's {control:+.2f}): {title[0].lower()}{title[1:]}"
        )
    return Result(frame, kind="interventions", title=title)
