"""Components as small models: a span of layers, one attention, one MLP, one head, one neuron.

    model.layers[3]    model.layers[2:6]    model.layers[5].attn.heads[9]    model.layers[5].mlp.neurons[123]

Each has a `site`, runs alone on residuals you give it (`run`, or a plain call), and shows its `weights`.
Residuals are [batch, position, d_model]; what a component reads besides them (masks, position embeddings) is
recorded from dummy tokens, or from the `prompt` you name: needed with padding, and for blocks that read the
tokens or an encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.sites import choose
from pellucid.anatomy.structure import Attention, Block, Stack, Tap
from pellucid.anatomy.writers import Writer
from pellucid.engine.alone import Alone, within
from pellucid.engine.projections import AttentionWeights, HeadWeights, MlpWeights, NeuronWeights
from pellucid.errors import Refused, SiteError

T = TypeVar("T")


class Layers:
    """The blocks of one stack; index or slice it. `read` makes the model's inputs of a prompt."""

    def __init__(self, anatomy: Anatomy, stack: Stack, read: Callable[[Any], Any]) -> None:
        self.stack, self.alone = stack, Alone(anatomy, stack, read)

    def __len__(self) -> int:
        return len(self.stack.blocks)

    def __iter__(self) -> Iterator[Layer]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, which: int | slice) -> Any:
        if isinstance(which, slice):
            return Span(self.alone, self.stack.blocks[which])
        (index,) = choose(which, len(self), "layer", f"{self.stack.prefix}layers")
        return Layer(self.alone, self.stack.blocks[index : index + 1])

    def __repr__(self) -> str:
        return f"<{self.stack.prefix}layers: {len(self)} blocks>"


@dataclass(frozen=True, repr=False)
class Component:
    """Something of a stack that can be run alone."""

    alone: Alone

    @property
    def site(self) -> str:
        raise NotImplementedError

    def __call__(self, resid: Tensor, prompt: Any = None) -> Any:
        return self.run(resid, prompt)

    def run(self, resid: Tensor, prompt: Any = None) -> Any:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.site}>"


@dataclass(frozen=True, repr=False)
class Span(Component):
    """Consecutive layers as one model from residual to residual."""

    blocks: tuple[Block, ...]

    @property
    def site(self) -> str:
        if not self.blocks:
            return f"{self.alone.stack.prefix}layers (none)"
        return f"{self.alone.stack.prefix}layers.{self.blocks[0].index}:{self.blocks[-1].index + 1}.resid_post"

    def run(self, resid: Tensor, prompt: Any = None) -> Tensor:
        """The residual [batch, position, d_model] after these layers, from the one before them."""
        calls = self.alone.calls(len(resid), resid.shape[1], prompt)
        for block in self.blocks:
            resid = self.alone.call(block, resid, calls[block.index])
        return resid


@dataclass(frozen=True, repr=False)
class Layer(Span):
    """One block; its parts are `attn`, `cross` and `mlp`."""

    @property
    def block(self) -> Block:
        return self.blocks[0]

    @property
    def site(self) -> str:
        return f"{self.alone.stack.prefix}layers.{self.block.index}.resid_post"

    @property
    def attn(self) -> AttentionPart:
        return AttentionPart(self.alone, self.block, "attn")

    @property
    def cross(self) -> AttentionPart:
        return AttentionPart(self.alone, self.block, "cross")

    @property
    def mlp(self) -> MlpPart:
        return MlpPart(self.alone, self.block, "mlp")

    @property
    def weights(self) -> dict[str, Tensor]:
        """The block's parameters by name."""
        return dict(self.alone.module(self.block).named_parameters())


@dataclass(frozen=True, repr=False)
class Part(Component):
    """What a block adds: its attention or its MLP. It reads the state of the stream that it reads in the
    model: the MLP of a sequential block reads `resid_mid`.
    """

    block: Block
    area: str

    def __post_init__(self) -> None:
        if f"{self.area}.out" not in self.block.taps:
            refused = self.block.refused.get(f"{self.area}.out") or self.block.refused.get(self.area)
            error = Refused if refused else SiteError
            raise error(f"layer {self.block.index} of this model has no {self.area}{': ' + refused if refused else ''}")

    @property
    def site(self) -> str:
        return f"{self.alone.stack.prefix}layers.{self.block.index}.{self.area}.out"

    @property
    def writer(self) -> Writer:
        """How its heads or neurons reach the stream."""
        return Writer.of(self.alone.anatomy.module, self.block, self.area)

    def run(self, resid: Tensor, prompt: Any = None) -> Tensor:
        """The contribution [batch, position, d_model] it adds, reading `resid`."""
        return self.met(f"{self.area}.out", resid, prompt)

    def met(self, part: str, resid: Tensor, prompt: Any) -> Tensor:
        """What is met at a site of this part when it reads `resid`: nothing before it adds anything."""
        kept: list[Tensor] = []
        middle: list[Tensor] = []
        handlers: dict[Tap, Any] = {**self._reading(resid, middle), self.block.taps[part]: kept.append}
        call = self.alone.calls(len(resid), resid.shape[1], prompt)[self.block.index]
        self.alone.call(self.block, resid, call, {within(self.block, t): h for t, h in handlers.items()})
        if middle and not torch.equal(middle[-1], resid):
            raise Refused(
                f"{self.site!r} cannot be run alone: the block scales or shifts its residual on the way to it"
            )
        return kept[-1]

    def _reading(self, resid: Tensor, middle: list[Tensor]) -> dict[Tap, Any]:
        """Handlers that make this part read `resid`, which enters the block; `middle` gets resid_mid."""
        block, own = self.block, f"{self.area}.out"
        state = next((s for s in block.states if any(t.source == own for t in s.terms)), None)
        if state is None:
            raise Refused(f"{self.site!r} cannot be run alone: {block.refused.get('resid', 'its state is not known')}")
        before = [
            s for t in state.terms if t.source.startswith("state") for s in [block.states[int(t.source.split()[1])]]
        ]
        normed = [s.norm_out for s in before if s.norm_out is not None and any(t.source in block.taps for t in s.terms)]
        if normed:  # post-norm: what it reads is what the norm before it hands on
            return {normed[-1]: lambda x: resid}
        earlier = {"attn": (), "cross": ("attn",)}.get(self.area, ("attn", "cross", "mixer"))
        silent: dict[Tap, Any] = {
            block.taps[t.source]: torch.zeros_like
            for s in block.states
            for t in s.terms
            if t.source in block.taps and t.source.partition(".")[0].partition("#")[0] in earlier
        }
        if self.area == "mlp" and "resid_mid" in block.taps:
            silent[block.taps["resid_mid"]] = middle.append
        return silent


@dataclass(frozen=True, repr=False)
class AttentionPart(Part):
    """A block's self- or cross-attention; `heads[9]` is one head."""

    @property
    def attention(self) -> Attention:
        found = self.block.attentions.get(self.area)
        if found is None or not found.heads:
            why = self.block.refused.get(self.area) or self.block.refused.get(
                f"{self.area}.heads", "they were not found"
            )
            raise Refused(f"the heads of {self.site!r} are refused on this model: {why}")
        return found

    @property
    def heads(self) -> Units[Head]:
        return Units(self.attention.heads, "head", self.site, lambda i: Head(self.alone, self, i))

    @property
    def weights(self) -> AttentionWeights:
        """W_Q, W_K, W_V, W_O and their biases for all heads, found by probing."""
        return AttentionWeights(self.alone, self.block, self.attention)


@dataclass(frozen=True, repr=False)
class Head(Component):
    """One attention head."""

    part: AttentionPart
    index: int

    @property
    def site(self) -> str:
        return self.part.site.replace(".out", f".heads.{self.index}")

    def run(self, resid: Tensor, prompt: Any = None) -> Tensor:
        """What it writes to the stream, [batch, position, d_model]: z of this head times its rows of the output
        projection, with the factor or norm behind it (a norm's scale is that of all heads of this run).
        """
        z_out = self.part.met(f"{self.part.area}.z_out", resid, prompt)
        return self.part.writer.written(z_out, [self.index])[0]

    @property
    def weights(self) -> HeadWeights:
        return self.part.weights.head(self.index)


@dataclass(frozen=True, repr=False)
class MlpPart(Part):
    """A block's MLP; `neurons[123]` is one neuron."""

    @property
    def neurons(self) -> Units[Neuron]:
        tap = self.block.taps.get(f"{self.area}.neurons")
        if tap is None:
            why = self.block.refused.get(f"{self.area}.neurons", "they were not found")
            raise Refused(f"the neurons of {self.site!r} are refused on this model: {why}")
        return Units(self.block.sizes["neuron"], "neuron", self.site, lambda i: Neuron(self.alone, self, i))

    @property
    def weights(self) -> MlpWeights:
        """The matrices that read the stream, by name, and the down projection."""
        mlp = self.block.mlps.get(self.area)
        if mlp is None or mlp.linear is None or f"{self.area}.neurons" not in self.block.taps:
            why = self.block.refused.get(f"{self.area}.neurons", "no down projection was found")
            raise Refused(f"the weights of {self.site!r} are refused on this model: {why}")
        return MlpWeights(self.alone, self.block, self.area, mlp.linear)


@dataclass(frozen=True, repr=False)
class Neuron(Component):
    """One neuron: a number at every position, and the vector it writes with it."""

    part: MlpPart
    index: int

    @property
    def site(self) -> str:
        return self.part.site.replace(".out", f".neurons.{self.index}")

    def run(self, resid: Tensor, prompt: Any = None) -> tuple[Tensor, Tensor]:
        """Its activation [batch, position], and what it writes to the stream, [batch, position, d_model]: the activation
        times `w_out`, with the factor or norm behind the projection (a norm's scale is that of all neurons of this run).
        """
        neurons = self.part.met(f"{self.part.area}.neurons", resid, prompt)
        return neurons[..., self.index], self.part.writer.written(neurons, [self.index])[0]

    @property
    def weights(self) -> NeuronWeights:
        return self.part.weights.neuron(self.index)


@dataclass(frozen=True, repr=False)
class Units(Generic[T]):
    """The heads or neurons of a part, by number."""

    size: int
    kind: str
    site: str
    make: Callable[[int], T]

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[T]:
        return (self.make(i) for i in range(self.size))

    def __getitem__(self, index: int) -> T:
        (index,) = choose(index, self.size, self.kind, self.site)
        return self.make(index)

    def __repr__(self) -> str:
        return f"<{self.size} {self.kind}s of {self.site}>"
