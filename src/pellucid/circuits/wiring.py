"""Where on an unmodified module does each reader take the residual stream in, and how does each source write
to it?

A reader's input can be changed without touching what others read:

    query, key, value of a head   its own columns of the projection's output are computed anew from the
                                  changed stream, through the block's own norm and weights; what follows
                                  (rotary, norms) runs natively
    MLP, mixer                    the input of its norm (or its own input, computed anew, where that shares
                                  the attention's norm)
    logits                        the last residual

The stream itself goes through stages. Where blocks add to it and nothing else happens, there is one:

    stream = sum of the messages of all sources

In post-norm models every state passes a norm, stream = norm(stream before + messages), and a message of an
early source reaches a late reader through all norms between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.fingerprint import state
from pellucid.anatomy.frozen import freeze
from pellucid.anatomy.layout import TOKENS, Layout
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.weights import linear_map
from pellucid.anatomy.writers import Writer
from pellucid.circuits.graph import Graph
from pellucid.engine.inputs import Inputs
from pellucid.model import Model

PLAIN = Layout(TOKENS, TOKENS)


@dataclass(eq=False)
class Norm:
    """What stands between the residual stream and a projection: a norm, whose Jacobian is known in closed
    form.

    norm(x) = gain * c * s + offset,  c = x or x - mean(x),  s = 1 / sqrt(mean(c^2) + eps)
    J^T g   = P(s * gain * g - s^3 * c * mean(c * gain * g)),  P subtracts the mean where c does
    """

    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out

    def pull(self, x: Tensor, g: Tensor) -> Tensor:
        """J^T g at x [batch, position, d] for gradients g [n, batch, position, d]."""
        frozen = freeze(self.module, x)
        if frozen is None:
            return _vjp(self.module, x, g)
        scale = frozen.scale.to(x.dtype)
        c = (x - x.mean(-1, keepdim=True) if frozen.centred else x) * scale
        g = g * frozen.gain.to(x.dtype)
        g -= c * (torch.einsum("nbtd,btd->nbt", g, c) / x.shape[-1])[..., None]
        if frozen.centred:
            g -= g.mean(-1, keepdim=True)
        return g.mul_(scale)


def _vjp(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    with torch.enable_grad():
        wide = x.expand(g.shape).detach().requires_grad_()
        (out,) = torch.autograd.grad(module(wide), wide, g)
    return out


@dataclass(eq=False)
class Reading:
    """A tensor some readers are computed into: the output of a projection, the input of an MLP, or the last
    residual.

    `columns` [reader, e] says which columns of it each reader owns; None: it belongs to one reader alone.
    `stream` is where the residual they read was met, None: it is the tensor at hand. `chain`: the modules that
    lead to it where they are not one projection (a norm across heads follows, or a bottleneck comes before).
    Indices of readers and sources are those of the graph without positions.
    """

    tap: Tap
    depth: int
    readers: list[int]
    first: int
    feeds: int
    stack: str
    stream: Tap | None
    prefix: Norm | None = None
    projection: nn.Module | None = None
    columns: Tensor | None = None
    width: int = 0  # d_model
    chain: tuple[nn.Module, ...] = ()
    _cached: tuple[Any, Tensor, Tensor | None] | None = field(default=None, init=False)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """The readers' own columns of the projection: W [reader, d, e] and b [reader, e]; renewed when
        weights change."""
        assert self.projection is not None
        assert self.columns is not None
        stamp = state(self.projection)
        if self._cached is None or self._cached[0] != stamp:
            weight, bias = linear_map(self.projection, self.width)
            own = weight.detach()[:, self.columns].transpose(0, 1).contiguous()
            self._cached = (stamp, own, None if bias is None else bias.detach()[self.columns])
        return self._cached[1:]

    def value(self, x: Tensor, native: Tensor) -> Tensor:
        """`native` as it is when the readers read x [reader, batch, position, d]."""
        if self.prefix is not None:
            x = self.prefix(x)
        if self.columns is None:
            return x[0]
        if self.chain:
            made = self._chained(x)
        else:
            weight, bias = self.weights()
            made = torch.einsum("nbtd,nde->btne", x, weight.to(x.dtype))
            made = made if bias is None else made + bias
        out = native.clone()
        out[..., self.columns] = made.to(out.dtype)
        return out

    def _chained(self, x: Tensor) -> Tensor:
        """[batch, position, reader, e] the readers' own columns of what the chain makes of x."""
        assert self.columns is not None
        for module in self.chain:
            x = module(x)
        return torch.stack([each[..., own] for each, own in zip(x, self.columns, strict=True)], 2)

    def only(self, wanted: Sequence[int]) -> Reading:
        """The same for some of its readers (positions in `readers`)."""
        if self.columns is None or len(wanted) == len(self.readers):
            return self
        index = list(wanted)
        made = replace(self, readers=[self.readers[i] for i in index], columns=self.columns[index])
        if self.chain:
            return made
        weight, bias = self.weights()
        stamp = self._cached[0] if self._cached else None
        made._cached = (stamp, weight[index], None if bias is None else bias[index])
        return made

    def pull(self, g: Tensor, resid: Tensor) -> Tensor:
        """The gradient [reader, batch, position, d] at what each reader reads, from that of `native`."""
        if self.columns is None:
            g = g[None]
        elif self.chain:
            given = resid if self.prefix is None else self.prefix(resid)
            with torch.enable_grad():
                wide = given.expand(len(self.readers), *given.shape).detach().requires_grad_()
                (g,) = torch.autograd.grad(self._chained(wide), wide, g[..., self.columns])
        else:
            g = torch.einsum("btne,nde->nbtd", g[..., self.columns], self.weights()[0].to(g.dtype))
        return g if self.prefix is None else self.prefix.pull(resid, g)


@dataclass(eq=False)
class Writing:
    """How the sources of one attention, MLP or mixer are read off (at `tap`; `first` is the index of the first
    of them), and where what they add together enters the stream (`adds`, times `coefficient`)."""

    tap: Tap
    adds: Tap
    first: int
    depth: int
    stack: str
    coefficient: float | Tensor
    writer: Writer | None = None  # of the heads, or of an MLP that is split into neurons
    neurons: tuple[int, ...] = ()
    acts: Tap | None = None  # where the neurons are met

    @property
    def heads(self) -> int:
        """How many heads write here; 0: an MLP or mixer."""
        return 0 if self.writer is None or self.neurons else self.writer.units

    @property
    def count(self) -> int:
        return self.heads or 1 + len(self.neurons)

    def messages(self, x: Tensor, acts: Tensor | None = None) -> Tensor:
        """[source, batch, position, d] from what is met at the tap (and `acts` [batch, position, neuron])."""
        if self.writer is None:
            parts = x[None]
        elif not self.neurons:
            parts = self.writer.written(x)
        else:
            assert acts is not None
            own = self.writer.written(acts, list(self.neurons))
            parts = torch.cat([(x - own.sum(0))[None], own])
        return parts if isinstance(self.coefficient, float) and self.coefficient == 1.0 else parts * self.coefficient


@dataclass(frozen=True, eq=False)
class Stage:
    """Messages of the sources from `first` up to `last` are added to the stream, which then passes a norm, met
    at `before`; without norms, all messages of a stack are one stage."""

    first: int
    last: int
    stack: str
    norm: Norm | None = None
    before: Tap | None = None
    depth: int = -1


@dataclass(eq=False)
class Wiring:
    """Every place a pass has to be met at: readings and writings in the order of the pass. `base` is the graph
    without positions, `graph` the one that users see."""

    model: Model
    base: Graph
    embeds: list[tuple[str, Tap]]  # one per embedding source: its stack and where it is met
    readings: list[Reading]
    writings: list[Writing]
    stages: dict[str, list[Stage]]
    graph: Graph = field(init=False)
    final: Reading = field(init=False)

    def __post_init__(self) -> None:
        self.graph, self.final = self.base.parted(), self.readings[-1]

    @property
    def embedding(self) -> list[int]:
        """The indices of the embedding sources."""
        return [i for i, s in enumerate(self.base.sources) if s.kind == "embed"]

    def spans(self) -> dict[str, slice]:
        """Each stack's sources."""
        return {name: slice(stages[0].first, stages[-1].last) for name, stages in self.stages.items()}

    def length(self, inputs: Inputs, stack: str) -> int:
        """How many positions a stack sees."""
        return inputs.stream(stack).ids.shape[1]

    def width(self, inputs: Inputs) -> int:
        """Positions of the longest stack: how wide messages are kept."""
        return max(self.length(inputs, stack) for stack in self.stages)
