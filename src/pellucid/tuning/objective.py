"""An objective as a value: what it asks of a pass, the number it adds to the loss, and what knows nothing in its place.

    loss = cross-entropy + sum over objectives of weight * loss(pass)

Objectives add up (`a + b`) and scale (`2 * a`). One pass serves all of them: what they need (patterns, values at sites,
gradients of the answer) is joined and computed once. Each draws from a generator of its own, made from the seed, its name
and the step, so no objective moves another's random numbers, nor the order of the batches; and an objective of weight 0
is left out: what remains is plain training, bit for bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from pellucid.anatomy.sites import Site
from pellucid.engine.edits import Edit, Place
from pellucid.engine.run import Run
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.tuning.data import Batch, Encoded
from pellucid.tuning.kernels import exact_kernels

NONE: Mapping[str, Any] = MappingProxyType({})
Beside = Mapping[str, Mapping[str, Tensor]]  # tensors that objectives train beside the model, by their names


@dataclass(frozen=True)
class Objective:
    """Base of the objectives. `weight` is what its loss is multiplied by."""

    weight: float = field(default=1.0, kw_only=True)

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def spans(self) -> tuple[str, ...]:
        """Names of the spans it reads."""
        return ()

    @property
    def properties(self) -> tuple[str, ...]:
        """Names of properties of texts that it reads."""
        return ()

    @property
    def forbidden(self) -> tuple[str, ...]:
        """Names of spans that must not matter."""
        return ()

    @property
    def reasons(self) -> tuple[str, ...]:
        """Names of spans that are the reasons."""
        return ()

    @property
    def second_order(self) -> bool:
        """Whether its loss is a function of gradients."""
        return False

    def sites(self, model: Model) -> list[Site]:
        """What a pass must keep for it."""
        return []

    def edits(self, model: Model, own: Mapping[str, Tensor] = NONE) -> list[Edit]:
        """What the model is run under from now on; `own` are its tensors beside the model, where it has some."""
        return []

    def beside(self, model: Model, data: Encoded, seed: int) -> dict[str, Tensor]:
        """Tensors of its own that are trained with the model (a reader, concepts), by name; drawn by `seed`. `loss` finds
        them as `seen.beside[self.name]`."""
        return {}

    def begun(self, model: Model, data: Encoded, seed: int) -> Objective:
        """The objective as one arm has it: with what it learns in it, where it is a thing that is kept (`tuning.learnt`)."""
        return self

    def ended(self, model: Model) -> Objective:
        """The objective after training of the model; one that learns notes whose weights it belongs to."""
        return self

    def batch(self, batch: Batch, data: Encoded, generator: torch.Generator) -> Batch:
        """What is trained on in place of a batch."""
        return batch

    def shown(
        self, model: Model, batch: Batch, data: Encoded, generator: torch.Generator | None, own: Mapping[str, Tensor] = NONE
    ) -> Batch:  # fmt: skip
        """What the model is given of a batch, in training (with a generator) and whenever it is used (None)."""
        return replace(batch, edits=(*batch.edits, *self.edits(model, own)))

    def numbers(self, model: Model, train: Encoded, test: Encoded, seed: int) -> dict[str, float]:
        """What it measures of a trained arm, by name."""
        return {}

    def said(self, data: xr.Dataset, texts: int) -> list[str]:
        """Sentences about a result of `fit` on so many texts, read off its own numbers; the one to be read first in front."""
        return []

    def undecayed(self, model: Model) -> frozenset[str]:
        """Names of parameters of which it wants some left alone, so that weight decay must not touch them."""
        return frozenset()

    def pace(self, step: int) -> float:
        """What the learning rate of the model's own weights is multiplied by at a step; what learns beside them keeps its own."""
        return 1.0

    def after(self, model: Model, parameters: Mapping[str, Tensor], done: float, seed: int) -> None:
        """What it does to trained parameters after an update, in place; `done` is the share of steps that are done."""

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor | None:
        """A scalar with a graph: the mean over the rows of the batch. None where it only changes batches or the model."""
        return None

    def attributed(self, seen: Pass) -> Tensor | None:
        """[row, position] what it makes of the tokens, to be compared with its `reasons`; None where it makes nothing."""
        return None

    def check(self, model: Model, data: Encoded) -> None:
        """An error before the first step where it cannot be."""
        data.check_spans(self.spans, self.name)
        data.check_properties(self.properties, self.name)

    def control(self) -> Objective | None:
        """The same with what it knows taken away; None where there is no such thing."""
        return None

    def __add__(self, other: Any) -> Together:
        return Together((*parts(self), *parts(other)))

    def __rmul__(self, factor: float) -> Objective:
        return replace(self, weight=self.weight * factor)

    def __post_init__(self) -> None:
        if not isinstance(self.weight, int | float) or not 0 <= self.weight < float("inf"):
            raise InputError(f"weight={self.weight!r}: expected a number of at least 0")


@dataclass(frozen=True)
class Together:
    """Several objectives at once; their losses add up."""

    objectives: tuple[Objective, ...]

    def __add__(self, other: Any) -> Together:
        return Together((*self.objectives, *parts(other)))

    def __rmul__(self, factor: float) -> Together:
        return Together(tuple(factor * each for each in self.objectives))


def parts(objectives: Any) -> tuple[Objective, ...]:
    """One objective, a sum or a list of them, as a flat tuple. InputError for what is none."""
    if isinstance(objectives, Objective):
        return (objectives,)
    if isinstance(objectives, Together):
        return objectives.objectives
    if isinstance(objectives, Iterable) and not isinstance(objectives, str):
        return tuple(each for one in objectives for each in parts(one))
    raise InputError(f"objectives={objectives!r}: expected objectives such as tuning.Consistency('decoy')")


def check_trained(model: Model, names: Iterable[str], who: str) -> None:
    """InputError where none of some parameters requires a gradient, so that an objective about them would do nothing."""
    named = dict(model.module.named_parameters())
    if not any(named[name].requires_grad for name in names):
        raise InputError(f"{who}: no matrix of these blocks is trained (frozen, or beside adapters)")


def generator(seed: int, name: str, step: int) -> torch.Generator:
    """Of one purpose at one step."""
    return torch.Generator().manual_seed(((seed << 20) + step) ^ (zlib.crc32(name.encode()) << 16))


# ---- a pass


@dataclass(frozen=True, eq=False, repr=False)
class Opened(Edit):
    """Embeddings left as they are, as a place where gradients can be asked for, frozen or not."""

    put: list[Tensor] = field(default_factory=list)

    def new(self, x: Tensor, place: Place) -> Tensor:
        self.put.append(x if x.requires_grad else x.detach().requires_grad_())
        return self.put[-1]


@dataclass(frozen=True, eq=False, repr=False)
class Given(Edit):
    """Embeddings of ours in the place of the model's."""

    values: Tensor

    def new(self, x: Tensor, place: Place) -> Tensor:
        return self.values


def embeddings(model: Model) -> Site:
    """The site of the token embeddings that a text enters by."""
    return Site("embed.tokens", stack=model.anatomy.stacks[0].name)


class Pass:
    """One batch, run once: logits, what was kept, and gradients where some objective asks for them."""

    def __init__(self, model: Model, batch: Batch, data: Encoded, *, keep: Sequence[Site] = (), edits: Sequence[Edit] = (),
                 gradients: bool = False, create_graph: bool = True, beside: Beside | None = None) -> None:  # fmt: skip
        self.model, self.batch, self.data, self.edits = model, batch, data, list(edits)
        self.beside: Beside = beside or {}
        self._opened = Opened(embeddings(model)) if gradients else None
        self._create = create_graph
        ours = [*self.edits, *batch.edits, *([self._opened] if self._opened else [])]
        with exact_kernels(model) if gradients and create_graph else nullcontext():
            self.run: Run = model.run(batch.inputs, keep=list(dict.fromkeys(keep)), edits=ours, grad=True)

    @cached_property
    def logits(self) -> Tensor:
        """[answer, class or token]."""
        return self.batch.read(self.run.logits)

    @cached_property
    def answers(self) -> Tensor:
        return self.batch.answers.to(self.logits.device)

    @cached_property
    def task(self) -> Tensor:
        """Cross-entropy of each answer, in nats [answer]."""
        return nn.functional.cross_entropy(self.logits, self.answers, reduction="none")

    @cached_property
    def log_odds(self) -> Tensor:
        """[row] the answer's log odds against all others, mean over a row's answers."""
        return self.batch.by_row(log_odds(self.logits, self.answers))

    @cached_property
    def embedded(self) -> Tensor:
        """[row, position, d] the token embeddings that the pass went through."""
        if self._opened is None or not self._opened.put:
            raise InputError("this pass was run without gradients of the embeddings")
        return self._opened.put[-1]

    def gradient(self, value: Tensor) -> Tensor:
        """[row, position, d] of a sum at the token embeddings; with a graph of its own."""
        (found,) = torch.autograd.grad(value.sum(), [self.embedded], create_graph=self._create, retain_graph=True)
        return found if found.dtype == torch.float64 else found.float()

    def mean_where(self, values: Tensor, names: Sequence[str]) -> Tensor:
        """Of values [row] the mean over rows that have one of some spans; their share is that of the data, so that passes add up."""
        some = torch.stack([self.batch.masks[name] for name in names]).any(0).any(1).to(values)
        return (values * some).mean() / max(self.data.share(names), 1 / len(self.data))

    @cached_property
    def slopes(self) -> Tensor:
        """The gradient of the log odds."""
        return self.gradient(self.log_odds)

    def again(
        self, batch: Batch | None = None, edits: Sequence[Edit] = (), gradients: bool = False, create_graph: bool = True
    ) -> Pass:
        """Another pass of the same rows, as tokens of another batch or under further edits."""
        return Pass(
            self.model, batch or self.batch, self.data, edits=[*self.edits, *edits], gradients=gradients, create_graph=create_graph,
            beside=self.beside,
        )  # fmt: skip


def log_odds(logits: Tensor, answers: Tensor) -> Tensor:
    """[answer] z_y - logsumexp of the others."""
    own = logits.gather(1, answers[:, None])[:, 0]
    others = logits.masked_fill(torch.nn.functional.one_hot(answers, logits.shape[1]).bool(), -torch.inf)
    return own - others.logsumexp(1)
