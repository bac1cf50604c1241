"""Attention taught by people's rationales, and attention and neurons made fewer by a penalty.

Attend            a is where some heads look (mean over queries, or the first or last query), q the rationale as a distribution:
                  1/n on its n tokens, for several annotators the mean of theirs.
                      kl    sum q log(q / a)          mse    sum (q - a)^2          mean over heads and rows
AttentionEntropy  - sum a log a, nats, mean over layers, heads and queries; never makes a zero
NeuronL1          mean |neuron| over tokens and neurons; makes small numbers, hardly a zero

The loss takes the logarithm of the attention, which is a distribution already; published code (HateXplain's) puts it through
another softmax, where the optimum cannot be reached. What is taught is plausibility, and it comes; whether accuracy or faithfulness comes with
it is what the control says: the same loss on as many other tokens, drawn once for every text. With a pooled state that only
attention writes (a first token read at the end), teaching every head of every layer random tokens starves the task: teach some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.tuning.data import Batch, Encoded
from pellucid.tuning.objective import Objective, Pass, generator
from pellucid.tuning.reasons import random_mask

Rows = Literal["mean", "first", "last"]
LEAST = 1e-9


@dataclass(frozen=True)
class Attend(Objective):
    """Some heads look where people say the reasons are (see the module). Mean over heads and over rows that have a rationale.

    `to` is one span's name, or those of several annotators. `heads` are sites such as "layers.1.attn.heads.0" (one, several or a
    pattern), by default all of the last layer that reads the text. `queries`: "mean", "first" or "last"; by default the mean, of causal models the last.

    >>> Attend("rationale", heads="layers.1.attn.heads.0").loss_by
    'kl'
    """

    to: str | Sequence[str] = "rationale"
    heads: str | Sequence[str] | None = field(default=None, kw_only=True)
    queries: Rows | None = field(default=None, kw_only=True)
    loss_by: Literal["kl", "mse"] = field(default="kl", kw_only=True)
    random: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_by not in ("kl", "mse") or self.queries not in (None, *get_args(Rows)):
            raise InputError(
                f"loss_by={self.loss_by!r}, queries={self.queries!r}: expected 'kl' or 'mse', and one of {', '.join(get_args(Rows))}"
            )
        if not isinstance(self.to, str):
            object.__setattr__(self, "to", tuple(self.to))
        if self.heads is not None and not isinstance(self.heads, str):
            object.__setattr__(self, "heads", tuple(self.heads))

    @property
    def name(self) -> str:
        return f"Attend({', '.join(self.spans)})"

    @property
    def spans(self) -> tuple[str, ...]:
        return (self.to,) if isinstance(self.to, str) else tuple(self.to)

    @property
    def reasons(self) -> tuple[str, ...]:
        return self.spans

    def control(self) -> Objective:
        return replace(self, random=True)

    def check(self, model: Model, data: Encoded) -> None:
        super().check(model, data)
        chosen = self._chosen(model)
        if any(site.stack != model.anatomy.stacks[0].name for site in chosen):
            raise InputError(
                f"{self.name}: heads must be of the stack that reads the text ({model.anatomy.stacks[0].name or 'the only one'})"
            )
        with torch.no_grad():
            seen = Pass(model, data.batch([0]), data, keep=list(chosen))
        for site in chosen:
            rows = seen.run.tensor(site).float().sum(-1)
            if float((rows - 1).abs().max()) > 0.02:
                raise InputError(
                    f"{self.name}: {str(site)!r} has rows that do not add up to 1 (an attention sink beside the keys): no distribution to teach"
                )

    def _chosen(self, model: Model) -> dict[Site, list[int] | None]:
        return chosen_heads(model, self.heads)

    def sites(self, model: Model) -> list[Site]:
        return list(self._chosen(model))

    def looks(self, seen: Pass) -> Tensor:
        """[row, head, position] where the chosen heads look."""
        mask = _real(seen.batch)
        queries = self.queries or ("last" if seen.model.anatomy.stacks[0].causal else "mean")
        found = []
        for site, heads in self._chosen(seen.model).items():
            a = seen.run.tensor(site)
            a = a.float() if a.dtype != torch.float64 else a
            a = a if heads is None else a[:, heads]
            real = mask.to(a)
            if queries == "mean":
                a = (a * real[:, None, :, None]).sum(2) / real.sum(1)[:, None, None]
            else:
                at = torch.zeros(len(a), dtype=torch.long) if queries == "first" else mask.long().sum(1) - 1
                a = a[torch.arange(len(a)), :, at.to(a.device)]
            found.append(a)
        return torch.cat(found, 1)

    def target(self, batch: Batch) -> Tensor:
        """[row, position] the rationale as a distribution; 0 in rows that have none."""
        made = torch.zeros(batch.content.shape)
        count = torch.zeros(len(batch), 1)
        people = torch.stack([batch.masks[name] for name in self.spans]).any(0)
        for name in self.spans:
            mask = batch.masks[name]
            if self.random:  # one draw for each text, the same in every step
                free = batch.content & ~(people & ~mask)
                drawn = [
                    random_mask(m[None], c[None], generator(0, name, i))
                    for m, c, i in zip(mask, free, batch.rows, strict=True)
                ]
                mask = torch.cat(drawn)
            n = mask.sum(1, keepdim=True)
            made += mask / n.clamp_min(1)
            count += n > 0
        return made / count.clamp_min(1)

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor:
        a = self.looks(seen)
        q = self.target(seen.batch).to(a)[:, None]
        if self.loss_by == "mse":
            each = (q - a).square().sum(-1)
        else:
            each = torch.where(q > 0, q * (q.clamp_min(LEAST).log() - a.clamp_min(LEAST).log()), 0.0).sum(-1)
        return seen.mean_where(each.mean(1), self.spans)

    def attributed(self, seen: Pass) -> Tensor:
        return self.looks(seen).mean(1)


def chosen_heads(model: Model, heads: str | Sequence[str] | None) -> dict[Site, list[int] | None]:
    """The patterns that are read, and which heads of each (None: all); by default those of the last layer that reads the text."""
    stack = model.anatomy.stacks[0]
    start = f"{stack.name}." if stack.name else ""
    last = max((b.index for b in stack.blocks if "attn" in b.attentions), default=0)
    asked = heads if heads is not None else f"{start}layers.{last}.attn.pattern"
    found: dict[Site, list[int] | None] = {}
    for each in [asked] if isinstance(asked, str) else asked:
        for site in model.sites(each):
            if not site.part.startswith("attn."):
                raise InputError(f"heads={each!r}: expected heads, such as 'layers.1.attn.heads.0'")
            (whole,) = model.sites(Site("attn.pattern", site.layer, site.stack))
            if isinstance(site.unit, int):
                known = found.setdefault(whole, [])
                if known is not None and site.unit not in known:
                    known.append(site.unit)
            else:
                found[whole] = None
    return found


def _real(batch: Batch) -> Tensor:
    """[row, position] the real tokens of the stream that the spans lie in."""
    return batch.inputs.streams.get("encoder", batch.inputs.stream("")).mask.bool()


@dataclass(frozen=True)
class ByLayer(Objective):
    """Base of penalties on every layer (or those of `layers`) of the stack that reads the text."""

    layers: Sequence[int] | None = None
    part = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    def sites(self, model: Model) -> list[Site]:
        return layered(model, self.part, self.layers)

    def check(self, model: Model, data: Encoded) -> None:
        super().check(model, data)
        self.sites(model)


def layered(model: Model, part: str, layers: Sequence[int] | None) -> list[Site]:
    """A part's sites in some layers (None: all that have it) of the stack that reads the text."""
    stack = model.anatomy.stacks[0].name
    asked = ["*"] if layers is None else list(layers)
    return [site for i in asked for site in model.sites(Site(part, i, stack))]


@dataclass(frozen=True)
class AttentionEntropy(ByLayer):
    """Attention that is spread out costs (see the module). With `heads` (sites, as in Attend) only theirs: a large weight makes these
    nearly one-hot, which `sparsity` counts.

    >>> AttentionEntropy([1], weight=0.1).layers
    (1,)
    """

    heads: str | Sequence[str] | None = field(default=None, kw_only=True)
    part = "attn.pattern"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None and not isinstance(self.heads, str):
            object.__setattr__(self, "heads", tuple(self.heads))

    def _chosen(self, model: Model) -> dict[Site, list[int] | None]:
        if self.heads is not None:
            return chosen_heads(model, self.heads)
        return dict.fromkeys(layered(model, self.part, self.layers))

    def sites(self, model: Model) -> list[Site]:
        return list(self._chosen(model))

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor:
        found = []
        for site, heads in self._chosen(seen.model).items():
            a = seen.run.tensor(site)
            a = (a if heads is None else a[:, heads]).float()
            entropy = -(a * a.clamp_min(LEAST).log()).sum(-1).mean(1)  # [row, query]
            found.append(_mean(entropy, _real(seen.batch)))
        return torch.stack(found).mean()


@dataclass(frozen=True)
class NeuronL1(ByLayer):
    """Active neurons cost (see the module).

    >>> NeuronL1(weight=3.0).layers
    """

    part = "mlp.neurons"

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor:
        found = [
            _mean(seen.run.tensor(site).float().abs().mean(-1), _real(seen.batch)) for site in self.sites(seen.model)
        ]
        return torch.stack(found).mean()


def _mean(values: Tensor, real: Tensor) -> Tensor:
    """Of values [row, position]: over a row's tokens, then over rows."""
    real = real.to(values)
    return ((values * real).sum(1) / real.sum(1)).mean()
