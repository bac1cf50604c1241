"""What a search for inputs climbs: one unit's activation, less what the text costs the model to believe.

All texts have the same length, so that nothing is padded. The forward pass ends at the unit's site unless a gradient or
the cross-entropy is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.modes import uncached
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import locate
from pellucid.engine.run import Run
from pellucid.engine.watching import watch
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.neurons.harvest import Units
from pellucid.neurons.vocabulary import Vocabulary

Unit = str | Site | Units | tuple[Units, int]
ROWS_OF_TOKENS = 1024  # tokens in one batch


@dataclass(frozen=True, eq=False)
class Found:
    """Texts as ids [n, position], their `activation` [n] and their cross-entropy `nats` [n] per token (or NaN)."""

    rows: Tensor
    activation: Tensor
    nats: Tensor

    def at(self, index: Tensor) -> Found:
        return Found(self.rows[index], self.activation[index], self.nats[index])

    @classmethod
    def joined(cls, parts: list[Found]) -> Found:
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("rows", "activation", "nats")))


class Objective:
    """activation - fluency * spread * nats of texts, its exact value and its slope in the embeddings."""

    def __init__(self, model: Model, unit: Unit, vocabulary: Vocabulary, fluency: float = 0.0) -> None:
        self.model, self.vocabulary, self.fluency, self.spread = model, vocabulary, fluency, 1.0
        self.number: int | None
        units, self.number = unit if isinstance(unit, tuple) else (unit, None)
        self.units = units if isinstance(units, Units) else None
        name = units.site if isinstance(units, Units) else str(units)
        sites = model.sites(name)
        if len(sites) != 1 or sites[0].at is not None or sites[0].dims[:2] != ("batch", "position"):
            raise InputError(f"{name!r} must name one unit at every position, without '@', such as a neuron")
        if self.units is None and len(sites[0].dims) > 2:
            raise InputError(
                f"{name!r} has {sites[0].dims[2:]} at a position: name one unit of it, or give Units(site, direction)"
            )
        self.site = sites[0]
        spot = locate(model.anatomy, self.site.whole)
        if spot.stream not in ("", model.anatomy.stacks[0].name):
            raise InputError(f"{name!r} is in the {spot.stream}, but the text goes into the encoder")
        self.tap = spot.tap
        stack = next(s for s in model.anatomy.stacks if s.name == spot.stream)
        self.causal = bool(stack.causal)
        self.speaks = self.causal and len(model.anatomy.stacks) == 1 and model.anatomy.head is not None
        if fluency and not self.speaks:
            raise InputError(f"{model.name} is no causal language model and gives a text no likelihood: use fluency=0")

    @property
    def lead(self) -> int:
        """How many columns stand before the text."""
        return len(self.vocabulary.prefix)

    def value(self, found: Found) -> Tensor:
        """[n] the objective."""
        return found.activation - (self.fluency * self.spread * found.nats if self.fluency else 0.0)

    # ---- exactly

    @torch.no_grad()
    def score(self, rows: Tensor, nats: bool | None = None) -> Found:
        """Texts [n, position] with their activation and, where the objective (or the caller) wants it, their nats."""
        wanted = bool(self.fluency) if nats is None else nats and self.speaks
        size = max(1, ROWS_OF_TOKENS // rows.shape[1])
        return Found.joined([self._score(part, wanted) for part in rows.split(size)])

    def _score(self, rows: Tensor, wanted: bool) -> Found:
        if wanted:
            values, logits, _ = self._forward(rows)
            assert logits is not None
            nats = self._nats(logits, rows).cpu()
        else:
            values, nats = self._seen(rows), torch.full((len(rows),), torch.nan)
        return Found(rows, self._activation(values, rows.shape[1]).float().cpu(), nats)

    def values(self, rows: Tensor) -> Tensor:
        """[n, position] the unit at every token of the texts."""
        return self._body(self._seen(rows), rows.shape[1])

    # ---- to first order

    def estimates(self, rows: Tensor) -> Tensor:
        """[n, position, allowed token] what the objective would gain by that token there, up to a constant of the
        position. Refused where no gradient reaches the embeddings."""
        self.model.anatomy.check_gradients()
        with torch.enable_grad():
            values, logits, leaf = self._forward(rows)
            objective = self._activation(values, rows.shape[1])
            if self.fluency and logits is not None:
                objective = objective - self.fluency * self.spread * self._nats(logits, rows)
            gradient = None
            if objective.requires_grad:
                (gradient,) = torch.autograd.grad(objective.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise Refused(f"no gradient reaches the embeddings of {self.model.name} from {str(self.site)!r}")
        gain = self._body(gradient, rows.shape[1]).float() @ self._embeddings().T
        if self.fluency and logits is not None:
            said = self._predictions(logits.detach(), rows.shape[1]).log_softmax(-1)[..., self._allowed()]
            gain[:, gain.shape[1] - said.shape[1] :] += self.fluency * self.spread * said / max(1, said.shape[1])
        return gain.cpu()

    # ---- one forward pass

    def _inputs(self, rows: Tensor) -> Inputs:
        ids = self.vocabulary.around(rows)
        return self.model.inputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def _seen(self, rows: Tensor) -> Tensor:
        """The unit [n, column]; the pass ends there."""
        met: list[Tensor] = []
        watch(
            self.model.anatomy, self._inputs(rows), {self.site: lambda values: met.append(self._unit(values).clone())}
        )
        return met[0]

    def _forward(self, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The unit [n, column], the logits where there are some, and the token embeddings as a leaf."""
        module: Any = self.model.module
        inputs, kept, leaves = self._inputs(rows), dict[Tap, Tensor](), list[Tensor]()

        def embedded(x: Tensor) -> Tensor:
            leaves.append(x.detach().clone().requires_grad_())
            return leaves[0].clone()  # the model may work on it in place

        handlers: dict[Tap, Handler] = {self._entrance: embedded, self.tap: partial(kept.__setitem__, self.tap)}
        with Wiretap(module, handlers, len(rows)):
            output = module(**{**uncached(module), **inputs.tensors})
        values = Run(self.model.anatomy, inputs, None, kept, [self.site.whole]).tensor(self.site)
        return self._unit(values), main_output(output) if self.speaks else None, leaves[0]

    def _unit(self, values: Tensor) -> Tensor:
        """[n, column] from the values at the site."""
        if self.units is None:
            return values
        every = self.units.activations(values.flatten(0, 1))
        if not 0 <= (number := self.number or 0) < every.shape[1] or (self.number is None and every.shape[1] > 1):
            asked = "none was named" if self.number is None else f"{self.number} was asked for"
            raise InputError(f"{self.units.label!r} has {every.shape[1]} units and {asked}: give (Units, number)")
        return every[:, number].view(values.shape[:2])

    @property
    def _entrance(self) -> Tap:
        """Where the tokens of the first stack are looked up. Refused where they are not."""
        return locate(self.model.anatomy, Site("embed.tokens", stack=self.model.anatomy.stacks[0].name)).tap

    def _embeddings(self) -> Tensor:
        """[allowed token, d] as the model's embedding hands them out."""
        with torch.no_grad():
            made: Tensor = self._table(self._allowed())
        return made.float()

    def _allowed(self) -> Tensor:
        return self.vocabulary.allowed.to(self._table.weight.device)

    @property
    def _table(self) -> Any:
        return self.model.module.get_submodule(self._entrance.module)

    # ---- what is read

    def _body(self, x: Tensor, length: int) -> Tensor:
        if x.shape[1] < self.lead + length:
            raise Refused(f"{str(self.site)!r} has {x.shape[1]} positions, fewer than the text has tokens")
        return x[:, self.lead : self.lead + length]

    def _activation(self, values: Tensor, length: int) -> Tensor:
        body = self._body(values, length)
        return body[:, -1] if self.causal else body.amax(1)

    def _predictions(self, logits: Tensor, length: int) -> Tensor:
        """[n, told, vocabulary] what is said before each token of the text, the first left out where nothing precedes it."""
        return logits[:, max(0, self.lead - 1) : self.lead + length - 1].float()

    def _nats(self, logits: Tensor, rows: Tensor) -> Tensor:
        said = self._predictions(logits, rows.shape[1])
        told = rows[:, rows.shape[1] - said.shape[1] :].to(said.device)
        if not told.shape[1]:
            return said.new_zeros(len(rows))
        return (said.logsumexp(-1) - said.gather(2, told[..., None])[..., 0]).mean(1)
