"""Which matrices does a head or a neuron read the stream with?

Which modules read it is on the map (`anatomy.readers`). Queries, keys and values are found by asking the model: what
the projections read is replaced by the unit vectors, and what comes out is their matrix, whether they are three modules
or one fused, grouped or not, in whatever orientation. It is read at the first position, where rotary embeddings do not
turn yet: `W_Q`, `W_K` are the matrices before the rotation, and `QK` compares a query with a key at distance 0. What is
not linear in what the attention reads is refused with the reason.

    q = x W_Q + b_Q     k = x W_K + b_K     QK = W_Q W_K^T     OV = W_V W_O    (x: what is read, normed)

`folded()` puts the gain (and mean and bias) of the norm before into the matrices, so that x is the residual
over its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pellucid.anatomy.checks import COARSEST
from pellucid.anatomy.frozen import FrozenNorm, freeze
from pellucid.anatomy.proofs import TOLERANCE
from pellucid.anatomy.structure import Attention, Block, Linear, Reads, Tap
from pellucid.anatomy.trace import results
from pellucid.anatomy.weights import grain, linear_map
from pellucid.anatomy.wiretap import Handler
from pellucid.engine.alone import Alone, within
from pellucid.errors import Refused

ROWS = 64  # unit vectors put in at a time


@dataclass(frozen=True, eq=False)
class Affine:
    """x W + b: weight [d_in, ...], bias [...]."""

    weight: Tensor
    bias: Tensor

    def folded(self, norm: FrozenNorm | None) -> Affine:
        """The same map from what the norm reads, over its scale: (x - mean) / scale."""
        if norm is None:
            return self
        w = self.weight.double()
        across = [-1] + [1] * (w.ndim - 1)
        bias = self.bias.double() + (norm.offset.view(across) * w).sum(0)
        w = norm.gain.view(across) * w
        w = w - w.mean(0, keepdim=True) if norm.centred else w
        return Affine(w.to(self.weight), bias.to(self.bias))


class Probe:
    """One block called alone on dummy tokens, with what its projections read replaced."""

    def __init__(self, alone: Alone, block: Block) -> None:
        self.alone, self.block = alone, block
        self.call = alone.dummy(ROWS, 2)[block.index]
        self.resid = block.taps["resid_pre"].layout.read(self.call.hidden, ROWS)

    def reads(self, part: str, what: str) -> tuple[Reads, ...]:
        """What the anatomy found to read the stream for a part. Refused with the reason where it found nothing."""
        if part not in self.block.taps:
            why = self.block.refused.get(part, f"{part} is not mapped")
        elif part in self.block.reads:
            return self.block.reads[part]
        else:
            why = self.block.unread.get(part, f"nothing was found that reads the stream for {part}")
        raise Refused(f"{what} is refused on this model: {why}")

    def norm(self, reads: Reads) -> FrozenNorm | None:
        """The norm that the stream passes before it is read, with the factor behind it."""
        norms = (s.norm_out.module for s in self.block.states if s.norm_out is not None and s.norm_out == reads.stream)
        name = reads.norm or next(norms, "")  # in a post-norm block the stream itself is what a norm made
        if not name:
            return None
        module = self.alone.anatomy.module.get_submodule(name)
        found = freeze(lambda x: next(made for _, made in results(module(x))), self.resid)
        if found is None:
            raise Refused(f"{name!r} cannot be folded: it is not a gain times the input over its size")
        return replace(found, gain=found.gain * reads.scale, offset=found.offset * reads.scale)

    def feed(self, readers: Sequence[Reads], rows: Tensor, tap: Tap) -> Tensor:
        """What is met at `tap` at the first two positions, [row, 2, ...], when the readers read `rows` [row, d_in]."""
        made = []
        for part in rows.split(ROWS):
            kept: list[Tensor] = []
            given = torch.cat([part, part.new_zeros(ROWS - len(part), part.shape[1])])[:, None]

            def put(x: Tensor, given: Tensor = given) -> Tensor:
                return given.expand_as(x).contiguous()

            handlers: dict[Tap, Handler] = {within(self.block, r.given): put for r in readers if r.given is not None}
            with torch.no_grad():
                self.alone.call(self.block, self.resid, self.call, {**handlers, within(self.block, tap): kept.append})
            made.append(kept[0][: len(part), :2])
        return torch.cat(made)


# ---- attention


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The matrices of all heads of one attention: W_Q, W_K [head, d_in, d_head], W_V [head, d_in, d_value],
    W_O [head, d_value, d_model], and biases b_Q ... [head, ...], b_O [d_model]; keys and values are repeated
    for grouped queries.
    """

    alone: Alone
    block: Block
    attention: Attention
    fold: bool = False

    def folded(self) -> AttentionWeights:
        """The same with the norm before put into W_Q, W_K and W_V."""
        return replace(self, fold=True)

    def head(self, index: int) -> HeadWeights:
        return HeadWeights(self, index)

    @cached_property
    def _probe(self) -> Probe:
        return Probe(self.alone, self.block)

    @cached_property
    def _found(self) -> dict[str, tuple[Affine, bool]]:
        return {}

    def read(self, port: str) -> tuple[Affine, bool]:
        """The map [d_in, head, e] to q, k or v, and whether positions turn what it gives."""
        if port not in self._found:
            self._found[port] = self._read(port)
        return self._found[port]

    def _read(self, port: str) -> tuple[Affine, bool]:
        part = f"{self.attention.part}.{port}"
        readers = self._probe.reads(part, f"W_{port.upper()}")
        widths = {r.width for r in readers}
        if len(widths) != 1:
            raise Refused(f"W_{port.upper()} is refused on this model: {part} is made from inputs of several widths")
        (width,) = widths
        like = self._probe.resid
        noise = torch.randn(8, width, generator=torch.Generator().manual_seed(0)).to(like) / 10
        rows = torch.cat([like.new_zeros(1, width), torch.eye(width).to(like), noise])
        both = self._probe.feed(readers, rows, self.block.taps[part])
        made = both[:, 0]
        weight, bias = made[1 : width + 1] - made[0], made[0]
        expected = torch.einsum("rd,dhe->rhe", noise, weight) + bias
        error = float((expected - made[width + 1 :]).abs().max()) / max(1e-6, float(expected.abs().max()))
        modules = [self._probe.alone.anatomy.module.get_submodule(name) for r in readers for name in r.modules[:1]]
        rounding = min(COARSEST, max((grain(m, width) for m in modules), default=0.0))
        if error > 3 * max(TOLERANCE.get(like.dtype, 4e-2), rounding):
            raise Refused(
                f"W_{port.upper()} is refused on this model: {part} is no linear map of what the attention "
                "reads (a norm or "
                "another nonlinear step lies in between)"
            )
        turned = not torch.allclose(both[:, 0], both[:, -1], rtol=1e-4, atol=1e-5)
        affine = Affine(weight, bias)
        return (affine.folded(self._probe.norm(readers[0])) if self.fold else affine), turned

    @property
    def position_dependent(self) -> bool:
        """Whether q and k are turned by their position (rotary): W_Q and W_K are those before."""
        return self.read("q")[1]

    def _heads(self, x: Tensor) -> Tensor:
        """[..., kv head or head, e] -> [head, ..., e]"""
        return x.repeat_interleave(self.attention.heads // x.shape[-2], -2).movedim(-2, 0)

    @property
    def W_Q(self) -> Tensor:
        return self._heads(self.read("q")[0].weight)

    @property
    def W_K(self) -> Tensor:
        return self._heads(self.read("k")[0].weight)

    @property
    def W_V(self) -> Tensor:
        return self._heads(self.read("v")[0].weight)

    @property
    def b_Q(self) -> Tensor:
        return self._heads(self.read("q")[0].bias)

    @property
    def b_K(self) -> Tensor:
        return self._heads(self.read("k")[0].bias)

    @property
    def b_V(self) -> Tensor:
        return self._heads(self.read("v")[0].bias)

    @property
    def _output(self) -> tuple[Tensor, Tensor]:
        a = self.attention
        if a.linear is None or a.linear.width != a.heads * a.d_value or f"{a.part}.z_out" not in self.block.taps:
            why = self.block.refused.get(f"{a.part}.z_out", "no output projection reads z alone")
            raise Refused(f"W_O is refused on this model: {why}")
        weight, bias = linear_map(self.alone.anatomy.module.get_submodule(a.linear.module), a.linear.shape)
        return weight.detach(), weight.new_zeros(weight.shape[1]) if bias is None else bias.detach()

    @property
    def W_O(self) -> Tensor:
        return self._output[0].unflatten(0, (self.attention.heads, self.attention.d_value))

    @property
    def b_O(self) -> Tensor:
        return self._output[1]

    @property
    def QK(self) -> Tensor:
        """[head, d_in, d_in], before the scaling by 1 / sqrt(d_head)."""
        return self.W_Q @ self.W_K.mT

    @property
    def OV(self) -> Tensor:
        """[head, d_in, d_model]"""
        if self.attention.gated:
            raise Refused("OV is refused on this model: a gate or norm lies between z and the output projection")
        return self.W_V @ self.W_O.to(self.W_V.dtype)


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """One head's W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, QK and OV: those of `AttentionWeights` without the head
    dimension.
    """

    attention: AttentionWeights
    index: int

    def folded(self) -> HeadWeights:
        return replace(self, attention=self.attention.folded())

    def __getattr__(self, name: str) -> Tensor:
        if name not in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "QK", "OV"):
            raise AttributeError(f"a head has no weights {name!r}: W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, QK, OV")
        found: Tensor = getattr(self.attention, name)[self.index]
        return found


# ---- neurons


@dataclass(frozen=True, eq=False)
class MlpWeights:
    """The matrices W_in that read the stream, by module name, [d_in, feature] (with b_in), and W_out [neuron,
    d_model].
    """

    alone: Alone
    block: Block
    part: str
    down: Linear
    fold: bool = False

    def folded(self) -> MlpWeights:
        """The same with the norm before put into W_in."""
        return replace(self, fold=True)

    def neuron(self, index: int) -> NeuronWeights:
        return NeuronWeights(self, index)

    @cached_property
    def readers(self) -> tuple[Reads, ...]:
        """What the neurons are made from, the gate first."""
        probe = Probe(self.alone, self.block)
        return probe.reads(f"{self.part}.neurons", "W_in")

    @cached_property
    def _read(self) -> dict[str, Affine]:
        found: dict[str, Affine] = {}
        for reads in self.readers:
            if len(reads.modules) > 1:
                raise Refused(f"W_in is refused on this model: {' and '.join(reads.modules)} read the stream in a row")
            weight, bias = linear_map(self.alone.anatomy.module.get_submodule(reads.modules[0]), reads.width)
            bias = weight.new_zeros(weight.shape[1]) if bias is None else bias
            affine = Affine(weight.detach(), bias.detach())
            norm = Probe(self.alone, self.block).norm(reads) if self.fold else None
            found[_name(reads)] = affine.folded(norm)
        return found

    @property
    def W_in(self) -> dict[str, Tensor]:
        return {name: affine.weight for name, affine in self._read.items()}

    @property
    def b_in(self) -> dict[str, Tensor]:
        return {name: affine.bias for name, affine in self._read.items()}

    @property
    def W_out(self) -> Tensor:
        return linear_map(self.alone.anatomy.module.get_submodule(self.down.module), self.down.shape)[0].detach()


def _name(reads: Reads) -> str:
    return reads.modules[-1].rpartition(".")[2]


@dataclass(frozen=True, eq=False)
class NeuronWeights:
    """What one neuron reads, `w_in` and `b_in` by module name (two of them where a gate multiplies it;
    `name.7` where one module makes both), each [d_in]; and what it writes, `w_out` [d_model].
    """

    mlp: MlpWeights
    index: int

    def folded(self) -> NeuronWeights:
        return replace(self, mlp=self.mlp.folded())

    @property
    def w_out(self) -> Tensor:
        return self.mlp.W_out[self.index]

    @cached_property
    def _columns(self) -> dict[str, tuple[str, int]]:
        readers = [(_name(r), int(r.columns[self.index, 0])) for r in self.mlp.readers if r.columns is not None]
        if not readers:
            raise Refused(
                "the neurons of this model are not each made from one or two features of what reads the stream"
            )
        alone = len({name for name, _ in readers}) == len(readers)
        return {name if alone else f"{name}.{column}": (name, column) for name, column in readers}

    @property
    def w_in(self) -> dict[str, Tensor]:
        return {label: self.mlp.W_in[name][:, column] for label, (name, column) in self._columns.items()}

    @property
    def b_in(self) -> dict[str, Tensor]:
        return {label: self.mlp.b_in[name][column] for label, (name, column) in self._columns.items()}
