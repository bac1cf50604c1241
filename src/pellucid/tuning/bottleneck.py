"""Concepts as a bottleneck: they are predicted at a layer, and only they go on.

From the mean h of a text's values at the layer come logits l = W h + a of the concepts, z = sigma(l) or 1[l > 0], and all that later layers see
is made of z and of D h, a residual channel of `residual` numbers that is no concept (`tuning.concepts`).

    loss = cross-entropy + weight * mean over concepts of the binary cross-entropy of l

kind    independent    what comes after is trained on the true concepts (cannot leak by construction of its training; default)
        sequential     on predicted ones, whose gradient stops there
        joint          on predicted ones (Koh et al. 2020), a share `mix` of them true (RandInt of Espinosa Zarlenga et al. 2022)

`weight` multiplies the mean over concepts; in papers it is often their sum. That nothing goes round the bottleneck is tried before the first
step: with the concepts held, other words change no bit of the answer. What a fit measures stands in `tuning.leaks`.

The control is the same bottleneck on concepts shuffled between texts. Where it does as well the concepts are not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pellucid.anatomy.sites import Site
from pellucid.controls import shuffled_labels
from pellucid.engine.edits import Edit
from pellucid.engine.marks import ordinary_ids
from pellucid.errors import InputError, Refused, one_of
from pellucid.model import Model
from pellucid.tuning.concepts import Narrow, truth_of, where_read
from pellucid.tuning.data import Batch, Encoded
from pellucid.tuning.leaks import measures, verdict
from pellucid.tuning.learnt import Learnt
from pellucid.tuning.objective import NONE, Objective, Pass

Kind = Literal["independent", "sequential", "joint"]


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
        one_of(self.kind, Kind, "kind=")
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
        logits = where_read(edit.seen["logits"], seen.batch, seen.data)
        every = self._truth(seen.data)
        truth = every[list(seen.batch.rows)].to(logits)
        each = binary_cross_entropy_with_logits(logits, truth.nan_to_num(), reduction="none")
        return (each * ~truth.isnan()).mean() / float((~every.isnan()).float().mean())

    def control(self) -> Objective:
        return replace(self, shuffled=True)

    # ---- what came of it

    def numbers(self, model: Model, train: Encoded, test: Encoded, seed: int) -> dict[str, float]:
        return measures(model, self, train, test, seed)

    def said(self, data: xr.Dataset, texts: int) -> list[str]:
        return verdict(data, self.residual, 2 * (0.25 / texts) ** 0.5)
