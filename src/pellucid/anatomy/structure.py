"""What discovery found: stacks of blocks, the taps where their tensors can be met, and the proofs that they are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pellucid.anatomy.layout import Layout
from pellucid.anatomy.trace import SELF

ATTENTION_PORTS = ("q", "k", "v", "scores", "pattern", "z")


@dataclass(frozen=True)
class Tap:
    """Where a tensor is met during a forward pass: a module's call, and a port of it.

    `port` is "in" or "out" (with `key` saying which argument or result) or one of the ports of attention. For
    attention outside the interface, `ops` are the ordinals of QK^T, softmax and PV among the module's operations.
    """

    module: str
    port: str
    layout: Layout
    key: int | str = SELF
    nth: int = 0
    ops: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Term:
    """One summand of a residual state: a coefficient (number, vector or None for 1) times a source."""

    source: str  # "in", "attn.out", "cross.out", "mixer.out", "mlp.out" with "#2".. for further ones, or "state 0"
    coefficient: float | Tensor = 1.0


@dataclass(frozen=True)
class State:
    """A residual state: the sum of terms plus a constant, through a norm where the family is post-norm."""

    terms: tuple[Term, ...]
    constant: Tensor | None = None
    norm_in: Tap | None = None
    norm_out: Tap | None = None


@dataclass(frozen=True)
class Head:
    """From the last residual to the logits: a chain of steps, each a module call or an elementwise operation."""

    steps: tuple[Callable[[Tensor], Tensor], ...]
    names: tuple[str, ...]
    norm: Tap | None  # the output of the final norm
    unembed: str  # module whose weight has one row (or column) per token
    after: int  # index of the first step after the unembedding


@dataclass(frozen=True)
class Attention:
    """One attention (self or cross) of a block."""

    part: str  # "attn" or "cross"
    module: str
    nth: int
    route: str  # "interface" or "operators"
    heads: int
    kv_heads: int
    d_head: int
    d_value: int
    o_proj: str | None
    gated: bool  # something sits between z and the output projection: head edits act on z_out


@dataclass(frozen=True)
class Block:
    """One layer: where its residual enters and leaves, what it adds, and the taps of its sites."""

    index: int
    module: str
    nth: int
    form: str  # "pre-norm", "post-norm", "parallel", ... as found
    taps: dict[str, Tap]
    states: tuple[State, ...]  # the last one is resid_post
    attentions: dict[str, Attention]
    down_proj: str | None = None
    experts: str | None = None
    refused: dict[str, str] = field(default_factory=dict)  # part -> why
    sizes: dict[str, int] = field(default_factory=dict)  # how many units: "neuron", "expert", "d_model"


@dataclass(frozen=True)
class Stack:
    """A sequence of blocks that hand one residual stream along; `name` is "", "encoder" or "decoder"."""

    name: str
    blocks: tuple[Block, ...]
    d_model: int

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


@dataclass
class Anatomy:
    """The map of a model and its proofs. Print it to see the tree."""

    module: nn.Module
    stacks: tuple[Stack, ...]
    head: Head | None
    proofs: list[Proof]
    refusals: dict[str, str]  # site pattern -> reason
    inputs: dict[str, Any]  # the probe the map was found and proven with
    route: str

    @property
    def complete(self) -> bool:
        return all(p.holds is not False for p in self.proofs)
