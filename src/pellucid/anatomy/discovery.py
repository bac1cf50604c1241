"""From one traced forward pass to the map: stacks, blocks, what each block adds, its attention and its neurons.

Nothing here knows a family by name. Whatever is found is only a claim; `proofs.py` checks it on the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy import attending, experts
from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.layout import STREAMS, TOKENS, Layout, recognise
from pellucid.anatomy.paths import find_path
from pellucid.anatomy.spans import Span, find_spans
from pellucid.anatomy.structure import (
    ATTENTION_PORTS, Attention, Block, Linear, Mlp, Path, Stack, State, Tap, Term,
)  # fmt: skip
from pellucid.anatomy.trace import Call, Op, Trace, Value
from pellucid.errors import LoadError

# Operations that let positions talk to one another without softmax attention: convolutions, scans, Fourier transforms.
MIXING = {"conv1d", "conv2d", "cumsum", "cumprod", "roll", "tril", "unfold", "pad"}
# Operations that choose experts for tokens.
ROUTING = {"topk", "one_hot", "argmax"}


def trace(module: nn.Module, inputs: dict[str, Any]) -> tuple[Trace, Any]:
    """Run the module once and write everything down."""
    with torch.no_grad(), Trace(module) as t:
        output = module(**inputs)
    t.lengths = {x.shape[1] for x in inputs.values() if isinstance(x, Tensor) and x.ndim == 2}
    return t, output


def find_stacks(t: Trace, batch: int) -> list[tuple[Stack, list[Span]]]:
    """Every stack with its blocks described, and the spans of the trace they were read from; main stacks come last."""
    main, beside = find_spans(t)
    if not main:
        raise LoadError(
            f"no stack of blocks was found in {type(t.root).__name__}: expected listed modules that each take and return "
            "a residual of the same shape"
        )
    names = {1: [""], 2: ["encoder", "decoder"]}.get(len(main), [f"stack{i}" for i in range(len(main))])
    further = [f"stack{len(main) + i}" for i in range(len(beside))]
    readers = [[BlockReader(t, span, i, batch) for i, span in enumerate(spans)] for spans in [*beside, *main]]
    stacks = [[reader.read() for reader in stack] for stack in readers]
    reached = {op.index for stack in readers for reader in stack for op in reader.reached}
    found = []
    for name, blocks, spans in zip([*further, *names], stacks, [*beside, *main], strict=True):
        blocks = [replace(b, unmapped=unmapped(t, span, reached)) for b, span in zip(blocks, spans, strict=True)]
        found.append((Stack(name, tuple(blocks), blocks[0].sizes["d_model"]), spans))
    return found


def unmapped(t: Trace, span: Span, reached: set[int]) -> tuple[str, ...]:
    """Attention that runs in a block but is in nothing that any residual stream of the block is made of."""
    lost = [op for op in attending.attention_ops(t, span.start, span.end) if op.index not in reached]
    return tuple(f"what {attending.where(t, op)} attends to does not reach the residual stream" for op in lost)


class BlockReader:
    """Reads one block: its residual states, then what made each contribution."""

    def __init__(self, t: Trace, span: Span, index: int, batch: int) -> None:
        self.t, self.span, self.index, self.batch = t, span, index, batch
        self.resid, self.out = span.given, span.made
        self.additive = flow.Additive(self.resid, span.start)
        self.attention_ops = attending.attention_ops(t, span.start, span.end)
        self.taps: dict[str, Tap] = {}
        self.refused: dict[str, str] = {}
        self.stream: set[int] = set()  # values on the residual's way through the block
        self.names: dict[int, str] = {}  # contributions, in the order they were made
        self.contributions: dict[str, Value] = {}
        self.tapped: dict[str, Value] = {}  # contribution -> the value its tap meets
        self.states: list[State] = []
        self.named: dict[int, str] = {}  # residual values already described
        self.attentions: dict[str, Attention] = {}
        self.mlps: dict[str, Mlp] = {}
        self.reached: list[Op] = []  # attention that the contributions are made of
        self.sizes: dict[str, int] = {}

    def read(self) -> Block:
        layout = self.layout(self.resid)
        streams = dict(layout.sizes).get("s", 1) if layout else 1
        self.sizes["d_model"] = streams * (self.resid.shape[1 if layout and layout.native == "b d p" else -1])
        self.put("resid_pre", self.tap(self.resid, self.span.first, "in"))
        self.put("resid_post", self.after(self.out))
        if self.additive.reaches(self.out):
            self.stream = self.additive.stream(self.out)
            self.name_contributions()
            self.state(self.out)
            self.middle()
        else:
            self.refused["resid"] = "the block's output is not a sum of its input and contributions"
        self.describe_attention()
        for name, value in self.contributions.items():
            if name.startswith("mlp"):
                self.describe_mlp(name.removesuffix(".out"), value)
        if not self.mlps:
            self.refused["mlp"] = "no position-wise contribution was found in this block"
        return Block(
            self.index, self.span.first.name, self.span.first.nth, self.form(), self.taps, tuple(self.states),
            self.attentions, self.mlps, self.refused, self.sizes, whole=self.span.whole,
        )  # fmt: skip

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
        if id(value) in self.named:
            return self.named[id(value)]
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
                    terms.append(self.term(c, v, total))
        taps = (None, None) if norm is None else (self.tap(total, norm, "in"), self.tap(value, norm, "out"))
        self.states.append(State(tuple(terms), constant, *taps))
        self.named[id(value)] = f"state {len(self.states) - 1}"
        return self.named[id(value)]

    def term(self, coefficient: flow.Coefficient, value: Value, total: Value) -> Term:
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
        """A constant of the residual stream in canonical order: a vector if it is the same at every position."""
        layout = self.layout(self.resid)
        if layout is None or x.ndim == 0:
            return x
        x = layout.read(x.expand(self.resid.shape), self.batch)[:1]
        return x[0, 0] if torch.equal(x, x[:, :1].expand_as(x)) else x

    def summands(self, value: Value, coefficient: flow.Coefficient) -> Iterator[tuple[flow.Coefficient, Value]]:
        """Parallel blocks add attention and MLP before the residual: such a sum is opened, unless a module returns it."""
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
        return self.span.start <= call.start and call.end <= self.span.end and not (self.span.whole and call is self.span.first)

    def name_contributions(self) -> None:
        found = sorted(self.leaves(self.out).values(), key=lambda v: v.producer.index if v.producer else -1)
        for value in found:
            kind, n = self.kind(value), 1
            while (name := f"{kind}.out" if n == 1 else f"{kind}#{n}.out") in self.contributions:
                n += 1
            self.names[id(value)], self.contributions[name] = name, value

    def contribution(self, value: Value, coefficient: flow.Coefficient) -> str:
        """Tap a summand of the residual stream where it has the size it is added with; its name."""
        name = self.names[id(value)]
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
        self.taps[name], self.tapped[name] = replace(own[0], layout=replace(own[0].layout, scale=coefficient)), own[1]
        return name

    def ops_of(self, value: Value) -> list[Op]:
        """Operations between the residual states a contribution reads and the contribution itself."""

        def is_state(v: Value) -> bool:
            outside = v.producer is not None and v.producer.index < self.span.start
            return outside or v is self.resid or (v is not value and id(v) in self.stream)

        return list(flow.ancestors(value, is_state))

    def kind(self, value: Value) -> str:
        """What made a contribution: self-attention, cross-attention, another mixer of positions, or the MLP."""
        if value.producer is None or value.producer.index < self.span.start:
            return "outside"
        attention = [op for op in self.ops_of(value) if op in self.attention_ops]
        if attention:
            return "cross" if all(self.is_cross(op) for op in attention) else "attn"
        last = flow.linear_before(value, self.span.start)
        mixes = map(_mixes, self.ops_of(value if last is None else last.outputs[0]))
        return "mixer" if any(mixes) else "mlp"

    def is_cross(self, op: Op) -> bool:
        """Whether nothing of this block's residual is compared with itself: the keys come from elsewhere."""
        return not any(self.depends(a) and self.depends(b) for a, b in attending.compared(op))

    def depends(self, value: Value) -> bool:
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
        self.refused["resid_mid"] = "attention and MLP read the same residual" if self.parallel() else why

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
        if not self.states:
            return "other"
        if any(t.carried is not None for s in self.states for t in s.terms):
            return "streams" if "s" in dict(self.layout(self.resid).sizes) else "masked"  # type: ignore[union-attr]
        if any(s.norm_out is not None for s in self.states):
            return "post-norm"
        if self.parallel():
            return "parallel"
        normed = any(flow.norm_of(v) is not None for v in self.contributions.values())
        return "sandwich" if normed else "pre-norm"

    # ---- attention and MLP

    def describe_attention(self) -> None:
        if not self.attention_ops:
            self.refused["attn"] = "nothing in this block attends through the interface or through a softmax"
        behind = {name: self.ops_of(v) for name, v in self.contributions.items() if name[:4] in ("attn", "cros")}
        self.reached = [op for op in self.attention_ops if any(op in ops for ops in behind.values())]
        for name, ops in behind.items():
            mine = [op for op in self.attention_ops if op in ops]
            part = name.removesuffix(".out")
            found = attending.describe(self.t, mine[0], part, self.batch) if len(mine) == 1 else None
            if found is None:  # computed in windows or streams: there is no one table of queries by keys
                found = attending.describe_pieces(self.t, mine[-1], part), {}
                why = "the attention is computed in pieces: it has no single query-by-key table"
                self.refused |= {f"{part}.{port}": why for port in ATTENTION_PORTS}
            self.attentions[part], taps = found
            self.taps |= taps
            self.describe_projection(part, mine[-1], name)

    def describe_projection(self, part: str, op: Op, contribution: str) -> None:
        """The output projection that reads z, and what stands between it and the contribution."""
        a = self.attentions[part]
        found = flow.projection_of(attending.output_of(op))
        call = found[0].call if found is not None else None
        if found is None or call is None or call.input is None or call.output is None or call.children:
            self.refused[f"{part}.z_out"] = "no module that is a linear output projection reads z"
            return
        if a.route == "pieces":
            a = attending.with_heads(a, call.input)
        tap, shape = attending.projection_input(call, a, self.batch)
        out = self.tap(call.output, call, "out")
        if tap is None or out is None:
            self.refused[f"{part}.z_out"] = f"what {self.local(call)} reads cannot be split into heads"
            return
        path = self.path(call, contribution)
        if path is None:
            why = f"what {self.local(call)} makes is worked on inside the block before it is added to the residual"
            self.refused[f"{part}.heads.out"] = why
        self.taps[f"{part}.z_out"] = tap
        linear = Linear(call.name, shape, tap, out)
        self.attentions[part] = replace(a, o_proj=call.name, linear=linear, gated=not found[1], path=path)

    def path(self, call: Call, contribution: str) -> Path | None:
        """What stands between a projection's output and the contribution it makes."""
        target = self.tapped.get(contribution)
        if call.output is None or target is None:
            return None
        steps = find_path(call.output, target, call.start, probe=True)
        return None if steps is None else Path(tuple(s.name for s in steps if s.name), tuple(s.run for s in steps))

    def describe_mlp(self, part: str, value: Value) -> None:
        ops = self.ops_of(value)
        mixture = next((op for op in ops if op.name == "experts"), None)
        if mixture is not None:
            self.describe_experts(part, mixture)
            return
        self.mlps[part] = Mlp(part)
        if any(_chooses(op) for op in ops):
            why = "a mixture that chooses by code of its own what runs for a token: the experts interface does not hear it"
            self.refused |= {f"{part}.{p}": why for p in ("neurons", "router", "experts")}
            return
        linear = flow.linear_before(value, self.span.start)
        call = linear.call if linear is not None else None
        if call is None or call.input is None or call.children or call.output is None:
            self.refused[f"{part}.neurons"] = "no linear down projection was found behind the MLP's contribution"
            return
        path = self.path(call, f"{part}.out")
        tap, out = self.tap(call.input, call, "in"), self.tap(call.output, call, "out")
        if path is None or tap is None or out is None:
            self.refused[f"{part}.neurons"] = f"{part}.out is more than the output of {self.local(call)}"
            return
        width = call.input.shape[1 if tap.layout.native == "b d p" else -1]
        self.taps[f"{part}.neurons"], self.sizes["neuron"] = tap, width
        self.mlps[part] = Mlp(part, call.name, Linear(call.name, (width,), tap, out), path, reads=self.reads(call.input))

    def reads(self, value: Value) -> tuple[Tap, ...]:
        """Where what leads to `value` takes the residual: the outermost module that reads it (maybe in another dtype)."""
        ops = self.ops_of(value)
        mine = {op.index for op in ops}
        found: dict[int, Tap] = {}
        for op, v in ((op, v) for op in ops for v in op.inputs if id(v) in self.stream and v.producer not in ops):
            moved = [v, *op.outputs] if flow.passes(op) else [v]
            calls = [(u, c) for u in moved for c in u.read_by if self.inside(c) and mine & set(range(c.start, c.end))]
            taps = [tap for u, c in calls if (tap := self.tap(u, c, "in")) is not None]
            norm = flow.norm_of(v)
            own = self.tap(v, norm, "out") if norm is not None else self.taps.get("resid_pre") if v is self.resid else None
            if taps or own is not None:
                found[id(v)] = taps[0] if taps else own  # type: ignore[assignment]
        return tuple(found.values())

    def describe_experts(self, part: str, op: Op) -> None:
        """A mixture dispatched through the interface; each expert is one unit of its taps."""
        module, hidden, index = op.args[0], op.args[1], op.args[2]
        name = self.t.names[module]
        nth = sum(o.name == "experts" and o.args[0] is module for o in self.t.ops[: op.index])
        found = experts.describe(module, name, nth, index)
        self.mlps[part] = Mlp(part, experts=found, reads=self.reads(op.inputs[0]))
        self.sizes |= {"expert": found.count}
        self.refused[f"{part}.neurons"] = f"a mixture of experts: neurons belong to {part}.experts.N.neurons"
        rows = Layout("(b p) d", TOKENS)
        if hidden.numel() // hidden.shape[-1] != self.resid.tensor.numel() // self.sizes["d_model"]:
            self.refused[f"{part}.experts"] = "its experts do not see every token once"
            return
        self.taps[f"{part}.router"] = Tap(name, "router", rows, nth=nth)
        self.taps[f"{part}.experts.neurons"] = Tap(name, "expert_neurons", rows, nth=nth)
        self.taps[f"{part}.experts.out"] = Tap(name, "expert_out", rows, nth=nth)


def _mixes(op: Op) -> bool:
    """Whether the operation may let positions talk: a known one, or a contraction of two values of the pass."""
    if op.name == "conv1d" and op.inputs[1].shape[-1] == 1:  # a linear map of single tokens
        return False
    return op.name in MIXING or op.name.startswith("fft_") or attending.two_sided(op)


def _chooses(op: Op) -> bool:
    """Whether the operation chooses experts for tokens, or works on chosen rows only."""
    return op.name in ROUTING or (op.name == "__setitem__" and not flow.plain_index(op.args[1]))
