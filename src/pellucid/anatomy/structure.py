"""What discovery found: stacks of blocks, the taps where their tensors can be met, and the proofs that they
are right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from pellucid.anatomy.experts import Experts
from pellucid.anatomy.layout import Layout
from pellucid.anatomy.trace import SELF

ATTENTION_PORTS = ("q", "k", "v", "scores", "pattern", "z")


@dataclass(frozen=True)
class Tap:
    """Where a tensor is met during a forward pass: a module's call, and a port of it.

    `port` is "in" or "out" (with `key` saying which argument or result), one of the ports of attention or of
    experts (of expert `unit`), or "op". For attention outside the interface, `ops` are the ordinals of QK^T,
    softmax and PV among the module's contractions; for "op" the tensor is the result of the n-th operation
    named `key` in the module's own code, `ops` = (n,).
    """

    module: str
    port: str
    layout: Layout
    key: int | str = SELF
    nth: int = 0
    ops: tuple[int, ...] | None = None
    unit: int | None = None


@dataclass(frozen=True)
class Term:
    """One summand of a residual state: a coefficient (number, or vector over d_model) times a source.

    With `carried`, the source's streams are first scaled or mixed, token by token, by weights of the pass;
    what comes out is met at that tap.
    """

    source: str  # "in", "state 0", or a contribution: "attn.out", "mlp.out", "mlp#2.out" for a further one
    coefficient: float | Tensor = 1.0
    carried: Tap | None = None


@dataclass(frozen=True)
class State:
    """A residual state: the sum of terms plus a constant, through a norm where the family is post-norm."""

    terms: tuple[Term, ...]
    constant: Tensor | None = None
    norm_in: Tap | None = None
    norm_out: Tap | None = None


@dataclass(frozen=True)
class Path:
    """What stands between a projection's output and the contribution it makes (norm, factor, gate, ...), in
    order. `onward` are the steps that work on any [..., d_model]; None where one of them is a gate, which the pass makes.
    """

    names: tuple[str, ...] = ()
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()  # native tensor in, native tensor out; gates as on the probe
    onward: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] | None = ()

    def run(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


@dataclass(frozen=True)
class Linear:
    """A linear module on the map: what it reads and what it makes."""

    module: str
    shape: tuple[int, ...]  # of one token's input as the module takes it: (width,), or (groups, width of a group)
    given: Tap
    made: Tap

    @property
    def width(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Reads:
    """How something of a block takes the residual stream in: which state of it, and through what.

    Heads and neurons (`columns` [unit, e]) own columns of what the last of `modules` makes, met at `tap`; the first
    takes what it reads, [batch, position, `width`], at `given`. A whole part (no columns) takes it at `tap`, where
    `alone` says that nothing else does.
    """

    tap: Tap
    stream: Tap  # where the state is met
    norm: str = ""  # the module it passes first, "" if none
    scale: float | Tensor = 1.0  # what it is multiplied by after that
    given: Tap | None = None
    modules: tuple[str, ...] = ()  # in order; more than one where there is a bottleneck, or a norm across heads
    width: int = 0
    columns: Tensor | None = None
    alone: bool = False


@dataclass(frozen=True)
class Unembedding:
    """From the last residual to the logits: a chain of steps, each a module call or an operation."""

    steps: tuple[Callable[[Tensor], Tensor], ...]
    names: tuple[str, ...]
    norm: Tap | None  # the output of the final norm
    unembed: str  # module whose weight has one row (or column) per token; "" if that step is an operation
    after: int  # index of the first step after the unembedding
    chosen: Callable[[Tensor], Tensor] | None = None  # from all positions' logits to those the model returns


@dataclass(frozen=True)
class Attention:
    """One attention (self or cross) of a block."""

    part: str  # "attn" or "cross" ("attn#2" for a second one in the same block)
    module: str
    nth: int
    route: str  # "interface", "operators", or "pieces" (windows, several streams): only z_out can be met
    heads: int
    kv_heads: int
    d_head: int
    d_value: int
    o_proj: str | None = None
    gated: bool = False  # something sits between z and the output projection: head edits act on z_out
    linear: Linear | None = None  # the output projection; it may read more than the heads (convolutions beside them)
    path: Path | None = None  # from the output projection to the contribution; None: it is worked on before it is added


@dataclass(frozen=True)
class Mlp:
    """One position-wise contribution: a down projection that reads neurons, or a mixture of experts."""

    part: str  # "mlp" ("mlp#2" for a second one in the same block)
    down_proj: str | None = None
    linear: Linear | None = None
    path: Path | None = None
    experts: Experts | None = None


@dataclass(frozen=True)
class Block:
    """One layer: where its residual enters and leaves, what it adds, and the taps of its sites."""

    index: int
    module: str
    nth: int
    form: str  # "pre-norm", "post-norm", "parallel", ... as found
    taps: dict[str, Tap]
    states: tuple[State, ...]  # the last one is resid_post
    attentions: dict[str, Attention] = field(default_factory=dict)
    mlps: dict[str, Mlp] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # part -> why
    sizes: dict[str, int] = field(default_factory=dict)  # how many units: "neuron", "expert", "d_model"
    unmapped: tuple[str, ...] = ()  # attention that ran in the block but could not be put on the map: why
    reads: dict[str, tuple[Reads, ...]] = field(
        default_factory=dict, compare=False
    )  # "attn.q", "mlp.neurons", "mlp" ...
    unread: dict[str, str] = field(default_factory=dict)  # why some of these were not found
    whole: bool = True  # False: the block is code of its parent, from one module's call to the next, not a module

    @property
    def linears(self) -> list[Linear]:
        """The output and down projections on the map."""
        found = (*(a.linear for a in self.attentions.values()), *(m.linear for m in self.mlps.values()))
        return [linear for linear in found if linear is not None]

    @property
    def down_proj(self) -> str | None:
        return self.mlps["mlp"].down_proj if "mlp" in self.mlps else None

    @property
    def experts(self) -> Experts | None:
        return self.mlps["mlp"].experts if "mlp" in self.mlps else None


@dataclass(frozen=True)
class Stack:
    """A sequence of blocks that hand one residual stream along; `name` is "", "encoder", "decoder" or
    "stack0"...
    """

    name: str
    blocks: tuple[Block, ...]
    d_model: int
    embeds: dict[str, Tap] = field(
        default_factory=dict
    )  # "tokens", "positions": where embeddings hand out their vectors
    causal: bool | None = None  # earlier residuals stay the same when the last token changes; None: not probed

    @property
    def prefix(self) -> str:
        return f"{self.name}." if self.name else ""


@dataclass(frozen=True)
class Proof:
    """One claim about the map, checked on the loaded model. `holds` is None where it does not apply."""

    name: str
    holds: bool | None
    error: float | None = None
    detail: str = ""
