"""A property of texts at a layer, learnt along with the task or unlearnt.

    h      the mean over a text's tokens at a site, normalised (mean 0, variance 1 over its entries); c whether the property holds

ProbeTask    a linear reader w.h + b is trained along: its cross-entropy is added, both kinds counting alike, so that the property
             gets easier to read there. The reader is in `tuned.beside`
Unlearn      "reversal": the reader is trained to read it and the model, through the same loss with its gradient's sign turned, not to be read
             (Ganin and Lempitsky 2015); "means": |mean h(c) - mean h(not c)|^2 / d of each batch
             What a mean no longer shows may stand in single tokens or be read by another reader: ask `evasion` before saying "removed"

The control of both: the property shuffled over the texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pellucid.anatomy.sites import Site
from pellucid.errors import InputError, one_of
from pellucid.model import Model
from pellucid.tuning.data import Encoded
from pellucid.tuning.internals import mean
from pellucid.tuning.objective import Objective, Pass

How = Literal["reversal", "means"]


class _Reversed(torch.autograd.Function):
    """x, with the gradient's sign turned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


@dataclass(frozen=True)
class ByProperty(Objective):
    """Base of objectives `about` a property, a name in `Rationales(properties=)`, at one site; texts with None are left out."""

    about: str = ""
    site: str = ""
    shuffled: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.about})"

    @property
    def properties(self) -> tuple[str, ...]:
        return (self.about,)

    def control(self) -> Objective | None:
        return replace(self, shuffled=True)

    def sites(self, model: Model) -> list[Site]:
        return model.sites(self.site)

    def check(self, model: Model, data: Encoded) -> None:
        super().check(model, data)
        if len(self.sites(model)) != 1:
            raise InputError(
                f"{self.name}: site={self.site!r} is {len(self.sites(model))} sites: expected one, such as 'layers.1.resid_post'"
            )
        values = [v for v in data.data.properties[self.about] if v is not None]
        if any(v not in (0, 1) for v in values) or len(set(map(bool, values))) < 2:
            raise InputError(f"{self.name}: expected True, False or None for each text, and both kinds")

    def holds(self, data: Encoded) -> list[Any]:
        """For every text whether it holds; shuffled in the control."""
        values = list(data.data.properties[self.about])
        if self.shuffled:
            order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0)).tolist()
            values = [values[k] for k in order]
        return values

    def states(self, seen: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """States [row, d] of rows of which it is known, whether it holds [row], and what each row counts [row]: both kinds alike, in all
        1 over the data."""
        (site,) = self.sites(seen.model)
        x = mean(seen.run.tensor(site), seen.run.stream(site).mask)
        x = x if x.dtype == torch.float64 else x.float()
        values = self.holds(seen.data)
        known = [b for b, i in enumerate(seen.batch.rows) if values[i] is not None]
        c = torch.tensor([bool(values[seen.batch.rows[b]]) for b in known], dtype=torch.bool, device=x.device)
        told = sum(v is not None for v in values)
        share = sum(map(bool, values)) / told
        counts = (
            torch.where(c, 0.5 / share, 0.5 / (1 - share)).to(x) if 0 < share < 1 else torch.ones_like(c, dtype=x.dtype)
        )
        counts = counts * len(values) / told / len(seen.batch)
        return nn.functional.layer_norm(x[known], x.shape[-1:]), c, counts


def _reader(model: Model, site: Site, seed: int) -> dict[str, Tensor]:
    met = model.run(dict(model.anatomy.inputs), keep=[site]).tensor(site)
    drawn = torch.randn(met.shape[-1], generator=torch.Generator().manual_seed(seed)) * 0.02
    return {"weight": drawn.to(met.device), "bias": torch.zeros(1, device=met.device)}


def _cross_entropy(own: Mapping[str, Tensor], x: Tensor, c: Tensor, counts: Tensor) -> Tensor:
    """Summed over the rows of which it is known, each with what it counts."""
    each = nn.functional.binary_cross_entropy_with_logits(
        x @ own["weight"].to(x) + own["bias"].to(x), c.to(x), reduction="none"
    )
    return (each * counts).sum()


@dataclass(frozen=True)
class ProbeTask(ByProperty):
    """A property is learnt along at a site (see the module).

    >>> ProbeTask("viewing", "layers.1.resid_post").weight
    1.0
    """

    def beside(self, model: Model, data: Encoded, seed: int) -> dict[str, Tensor]:
        return _reader(model, self.sites(model)[0], seed)

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor:
        return _cross_entropy(seen.beside[self.name], *self.states(seen))


@dataclass(frozen=True)
class Unlearn(ByProperty):
    """A property is unlearnt at a site (see the module). Check with `evasion` before anything is called removed.

    >>> Unlearn("viewing", "layers.1.resid_post", how="means").how
    'means'
    """

    how: How = field(default="reversal", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.how, How, "how=")

    def beside(self, model: Model, data: Encoded, seed: int) -> dict[str, Tensor]:
        return _reader(model, self.sites(model)[0], seed) if self.how == "reversal" else {}

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor:
        x, c, counts = self.states(seen)
        if self.how == "reversal":
            turned: Any = _Reversed.apply(x)
            return _cross_entropy(seen.beside[self.name], turned, c, counts)
        if bool(c.all()) or not bool(c.any()):
            return x.sum() * 0  # one kind alone: this batch says nothing
        return (x[c].mean(0) - x[~c].mean(0)).square().mean()
