"""What is the residual stream of one block: its states, what is added to it, and by what?

A block's output is followed back through additions to its input. What comes in on the way is a contribution,
named by what made it: attention, cross-attention, another mixer of positions, or the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pellucid.anatomy import attending
from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.layout import STREAMS, TOKENS, Layout, recognise
from pellucid.anatomy.spans import Span
from pellucid.anatomy.structure import State, Tap, Term
from pellucid.anatomy.trace import Call, Op, Trace, Value

# Operations that let positions talk to one another without softmax attention: convolutions, scans, shifts.
MIXING = {"conv1d", "conv2d", "cumsum", "cumprod", "roll", "tril", "unfold", "pad"}
# Operations that choose experts for tokens.
ROUTING = {"topk", "one_hot", "argmax"}


class Residual:
    """Reads the residual stream of one block. `taps` and `refused` fill up with what is found and what is
    not.
    """

    def __init__(self, t: Trace, span: Span, batch: int) -> None:
        self.t, self.span, self.batch = t, span, batch
        self.resid, self.out = span.given, span.made
        self.additive = flow.Additive(self.resid, span.start)
        self.attention_ops = attending.attention_ops(t, span.start, span.end)
        self.taps: dict[str, Tap] = {}
        self.refused: dict[str, str] = {}
        self.stream: set[int] = set()  # values on the residual's way through the block
        self.contributions: dict[str, Value] = {}  # by name, in the order they were made
        self.tapped: dict[str, Value] = {}  # contribution -> the value its tap meets
        self.states: list[State] = []
        self._named: dict[int, str] = {}  # contributions and states that have a name
        self.put("resid_pre", self.tap(self.resid, span.first, "in"))
        self.put("resid_post", self.after(self.out))
        if self.additive.reaches(self.out):
            self.stream = self.additive.stream(self.out)
            self.name_contributions()
            self.state(self.out)
            self.middle()
        else:
            self.refused["resid"] = "the block's output is not a sum of its input and contributions"

    @property
    def d_model(self) -> int:
        layout = self.layout(self.resid)
        width = self.resid.shape[1 if layout is not None and layout.native == "b d p" else -1]
        return width * (dict(layout.sizes).get("s", 1) if layout is not None else 1)

    # ---- taps

    def layout(self, value: Value) -> Layout | None:
        """How a residual-like value is laid out: tokens by width, or tokens by streams by width."""
        shape, b = tuple(value.shape), self.batch
        if len(shape) == 4 and b in shape[:2]:
            p = shape[1] if shape[0] == b else shape[2]
            return recognise(shape, STREAMS, b=b, p=p, s=shape[2 if shape[0] == b else 0], d=shape[3])
        if len(shape) == 3 and shape[0] == b and shape[2] in self.t.lengths and shape[1] not in self.t.lengths:
            return Layout("b d p", TOKENS)
        return recognise(shape, TOKENS, b=b, p=value.tensor.numel() // (b * shape[-1]), d=shape[-1])

    def tap(self, value: Value, call: Call, port: str, scale: float = 1.0) -> Tap | None:
        """Where a module's call takes or returns the value."""
        ports = call.outputs if port == "out" else call.inputs
        key = next((k for k, v in ports.items() if v is value), None)
        layout = self.layout(value)
        if key is None or layout is None:
            return None
        return Tap(call.name, port, replace(layout, scale=scale), key, call.nth)

    def op_tap(self, value: Value) -> tuple[Tap, Value] | None:
        """Where an operation of a module's own code returns the value (before mere moves)."""
        for v in flow.sources(value):
            op, layout = v.producer, self.layout(v) if v.tensor.ndim > 1 else None
            if op is not None and op.call is not None and op.nth and len(op.outputs) == 1 and layout is not None:
                return Tap(op.call.name, "op", layout, op.name, op.call.nth, (op.nth,)), v
        return None

    def after(self, value: Value) -> Tap | None:
        """The tap of the block's output: where its module returns it, or where the next module takes it."""
        if self.span.whole:
            return self.tap(value, self.span.first, "out")
        readers = [tap for call in value.read_by if (tap := self.tap(value, call, "in")) is not None]
        found = self.op_tap(value)
        return readers[0] if readers else found[0] if found is not None else None

    def put(self, part: str, tap: Tap | None, otherwise: str = "it is laid out in an unknown order") -> None:
        if tap is None:
            self.refused[part] = otherwise
        else:
            self.taps[part] = tap

    def local(self, call: Call) -> str:
        """A module's name inside the block."""
        return call.name.removeprefix(f"{self.span.first.name}.")

    # ---- the residual stream

    def state(self, value: Value) -> str:
        """Describe the residual state `value` (and those it rests on) and return its name."""
        for value in flow.sources(value):  # noqa: B020
            if value is self.resid:
                return "in"
            if flow.norm_of(value) is not None:
                break
        if id(value) in self._named:
            return self._named[id(value)]
        norm = flow.norm_of(value)
        total = value if norm is None or norm.input is None else norm.input
        terms: list[Term] = []
        constant: Tensor | None = None
        for coefficient, leaf in self.additive.terms(total):
            for c, v in self.summands(leaf, coefficient):
                if flow.constant(v):
                    extra = self.canonical(v.tensor.detach() * c)
                    constant = extra if constant is None else constant + extra
                else:
                    terms.append(self.term(c, v))
        taps = (None, None) if norm is None else (self.tap(total, norm, "in"), self.tap(value, norm, "out"))
        self.states.append(State(tuple(terms), constant, *taps))
        self._named[id(value)] = f"state {len(self.states) - 1}"
        return self._named[id(value)]

    def term(self, coefficient: flow.Coefficient, value: Value) -> Term:
        """One summand: the input, an earlier state (carried or not), or a contribution."""
        if isinstance(coefficient, Tensor):
            coefficient = self.canonical(coefficient)
        if not self.additive.reaches(value):
            return Term(self.contribution(value, coefficient))
        source = self.additive.carried(value)
        if source is None:
            return Term(self.state(value), coefficient)
        found = self.op_tap(value)
        return Term(self.state(source), coefficient, found[0] if found is not None else None)

    def canonical(self, x: Tensor) -> Tensor:
        """A constant of the stream in canonical order: a vector if it is the same at every position."""
        layout = self.layout(self.resid)
        if layout is None or x.ndim == 0:
            return x
        x = layout.read(x.expand(self.resid.shape), self.batch)[:1]
        return x[0, 0] if torch.equal(x, x[:, :1].expand_as(x)) else x

    def summands(self, value: Value, coefficient: flow.Coefficient) -> Iterator[tuple[flow.Coefficient, Value]]:
        """Parallel blocks add attention and MLP before the residual: such a sum is opened, unless a module
        returns it.
        """
        *_, moved = flow.sources(value)
        op = moved.producer
        if self.additive.reaches(value) or op is None or flow.made_by_module(value, self.inside):
            yield coefficient, value
            return
        scaled = flow.factor(op)
        if scaled is not None and not isinstance(scaled[1], Tensor):
            inner = list(self.summands(scaled[0], coefficient * scaled[1]))
        elif op.name in flow.ADD and len(op.inputs) == 2:
            inner = [pair for sign, v in flow.signed(op) for pair in self.summands(v, coefficient * sign)]
        else:
            inner = []
        kinds = {self.kind(v) for _, v in inner if not flow.constant(v)}
        yield from inner if len(kinds) > 1 else [(coefficient, value)]

    def inside(self, call: Call) -> bool:
        """Whether a call is part of the block, not the block itself."""
        return (
            self.span.start <= call.start
            and call.end <= self.span.end
            and not (self.span.whole and call is self.span.first)
        )

    def name_contributions(self) -> None:
        """`attn.out`, `mlp.out`, and `mlp#2.out` for a further one, in the order they were made."""
        found = sorted(self.leaves(self.out).values(), key=lambda v: v.producer.index if v.producer else -1)
        for value in found:
            kind, n = self.kind(value), 1
            while (name := f"{kind}.out" if n == 1 else f"{kind}#{n}.out") in self.contributions:
                n += 1
            self._named[id(value)], self.contributions[name] = name, value

    def contribution(self, value: Value, coefficient: flow.Coefficient) -> str:
        """Tap a summand of the residual stream where it has the size it is added with; its name."""
        name = self._named[id(value)]
        found = flow.made_by_module(value, self.inside)
        scale = found[1] * coefficient if found is not None else coefficient
        if found is not None and not isinstance(scale, Tensor):
            self.put(name, self.tap(found[2], found[0], "out", scale))
            self.tapped[name] = found[2]
            return name
        own = self.op_tap(value) if not name.startswith("outside") else None
        if own is None or isinstance(coefficient, Tensor):
            self.refused[name] = "what is added is not computed in this block, or in a form that cannot be met"
            return name
        self.taps[name], self.tapped[name] = (
            replace(own[0], layout=replace(own[0].layout, scale=coefficient)),
            own[1],
        )
        return name

    def ops_of(self, value: Value) -> list[Op]:
        """Operations between the residual states a contribution reads and the contribution itself."""

        def is_state(v: Value) -> bool:
            outside = v.producer is not None and v.producer.index < self.span.start
            return outside or v is self.resid or (v is not value and id(v) in self.stream)

        return list(flow.ancestors(value, is_state))

    def kind(self, value: Value) -> str:
        """What made a contribution: attention, cross-attention, another mixer of positions, or the MLP."""
        if value.producer is None or value.producer.index < self.span.start:
            return "outside"
        attention = [op for op in self.ops_of(value) if op in self.attention_ops]
        if attention:
            return "cross" if all(self.is_cross(op) for op in attention) else "attn"
        last = flow.linear_before(value, self.span.start)
        ops = self.ops_of(value if last is None else last.outputs[0])
        if any(map(attending.two_sided, ops)):
            return "mixer"
        return "mixer" if any(map(mixes, ops)) and not any(map(chooses, ops)) else "mlp"

    def is_cross(self, op: Op) -> bool:
        """Whether nothing of this block's residual is compared with itself: the keys come from elsewhere."""
        return not any(self.depends(a) and self.depends(b) for a, b in attending.compared(op))

    def depends(self, value: Value) -> bool:
        """Whether a value is computed from the block's input."""
        ops = flow.ancestors(value, lambda v: v is self.resid)
        return value is self.resid or any(v is self.resid for op in ops for v in op.inputs)

    def middle(self) -> None:
        """resid_mid: the state that holds everything that mixes positions and nothing yet from the MLP."""
        wanted = {id(v) for n, v in self.contributions.items() if not n.startswith("mlp")}
        if not wanted or len(wanted) == len(self.contributions):
            self.refused["resid_mid"] = "the block adds a single contribution"
            return
        ops = self.t.ops[self.span.start : self.span.end]
        mids = [v for op in ops for v in op.outputs if id(v) in self.stream and set(self.leaves(v)) == wanted]
        for value in reversed(mids):
            norm = flow.norm_of(value)
            tap = self.tap(value, norm, "out") if norm is not None else None
            for call in value.read_by:
                tap = tap or (self.tap(value, call, "in") if self.inside(call) else None)
            if tap is not None:
                self.taps["resid_mid"] = tap
                return
        why = "no module reads it" if mids else "the block does not have one attention followed by one MLP"
        if self.parallel():
            why = "attention and MLP read the same residual (parallel block)"
        self.refused["resid_mid"] = why

    def parallel(self) -> bool:
        """Whether the MLP reads a residual that holds nothing of the attention (or other mixer) yet."""
        mixed = {id(v) for n, v in self.contributions.items() if not n.startswith("mlp")}
        mlps = [v for n, v in self.contributions.items() if n.startswith("mlp")]
        behind = [op for v in mlps for op in flow.ancestors(v, lambda u: u is self.resid)]
        return bool(mixed and mlps) and not any(id(v) in mixed for op in behind for v in op.inputs)

    def leaves(self, value: Value) -> dict[int, Value]:
        """The contributions a residual state contains."""
        norm = flow.norm_of(value)
        total = value if norm is None or norm.input is None else norm.input
        found: dict[int, Value] = {}
        for coefficient, leaf in self.additive.terms(total):
            if leaf is self.resid or flow.constant(leaf):
                continue
            inner = self.additive.carried(leaf) or (leaf if self.additive.reaches(leaf) else None)
            if inner is None:
                found |= {id(v): v for _, v in self.summands(leaf, coefficient) if not flow.constant(v)}
            elif inner is not self.resid:
                found |= self.leaves(inner)
        return found

    def form(self) -> str:
        """The block's form in the usual words."""
        if not self.states:
            return "other"
        if any(t.carried is not None for s in self.states for t in s.terms):
            layout = self.layout(self.resid)
            return "streams" if layout is not None and "s" in dict(layout.sizes) else "masked"
        if any(s.norm_out is not None for s in self.states):
            return "post-norm"
        if self.parallel():
            return "parallel"
        normed = any(flow.norm_of(v) is not None for v in self.contributions.values())
        return "sandwich" if normed else "pre-norm"


def mixes(op: Op) -> bool:
    """Whether the operation may let positions talk (counting tokens to choose experts for them aside)."""
    if op.name == "conv1d" and op.inputs[1].shape[-1] == 1:  # a linear map of single tokens
        return False
    return op.name in MIXING or op.name.startswith("fft_")


def chooses(op: Op) -> bool:
    """Whether the operation chooses experts for tokens, or works on chosen rows only."""
    return op.name in ROUTING or (op.name == "__setitem__" and not flow.plain_index(op.args[1]))
