"""From one traced forward pass to the map: stacks, blocks, what each block adds, its attention and its neurons.

Nothing here knows a family by name. Whatever is found is only a claim; `proofs.py` checks it on the loaded model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy import attending
from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.layout import TOKENS, Layout, recognise
from pellucid.anatomy.structure import Attention, Block, Stack, State, Tap, Term
from pellucid.anatomy.trace import Call, Op, Trace, Value

# Operations that let positions talk to one another without softmax attention: convolutions, scans, Fourier transforms.
MIXING = {"conv1d", "cumsum", "fftn", "fft", "fft2", "rfft", "cumprod", "roll", "tril"}


def trace(module: nn.Module, inputs: dict[str, Any]) -> tuple[Trace, Any]:
    """Run the module once and write everything down."""
    with torch.no_grad(), Trace(module) as t:
        output = module(**inputs)
    return t, output


def find_stacks(t: Trace, batch: int) -> tuple[Stack, ...]:
    """Every stack with its blocks described."""
    groups = block_calls(t)
    names = ["encoder", "decoder"] if len(groups) == 2 else [f"stack{i}" for i in range(len(groups))]
    if len(groups) == 1:
        names = [""]
    stacks = []
    for name, calls in zip(names, groups, strict=True):
        blocks = tuple(BlockReader(t, c, i, batch).read() for i, c in enumerate(calls))
        assert calls[0].input is not None
        stacks.append(Stack(name, blocks, calls[0].input.shape[-1]))
    return tuple(stacks)


def block_calls(t: Trace) -> list[list[Call]]:
    """Sequences of block calls in the order they ran."""
    containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    listed = {child for m in t.root.modules() if isinstance(m, containers) for child in m.children()}

    def is_block(c: Call) -> bool:
        given, made = c.input, c.output
        if c.module not in listed or given is None or made is None or given is made:
            return False
        return given.shape == made.shape and given.tensor.ndim >= 3 and any(p.ndim > 1 for p in c.module.parameters())

    groups: dict[str, list[Call]] = {}

    def visit(call: Call) -> None:
        for child in call.children:
            if is_block(child):
                groups.setdefault(child.name.rpartition(".")[0], []).extend(_unwrapped(child, is_block))
            else:
                visit(child)

    for root in [c for c in t.calls if c.parent is None]:
        visit(root)
    with_attention = [g for g in groups.values() if any(attending.attention_ops(t, c) for c in g)]
    return _joined(with_attention or list(groups.values()))


def _unwrapped(block: Call, is_block: Any) -> list[Call]:
    """ALBERT's groups only wrap blocks of one class (T5's blocks hold unlike sublayers: those are parts)."""
    inner = [c for c in block.children if is_block(c)]
    alike = len({type(c.module) for c in inner}) == 1
    if alike and inner[0].input is block.input and inner[-1].output is block.output:
        return [b for c in inner for b in _unwrapped(c, is_block)]
    return [block]


def _joined(groups: list[list[Call]]) -> list[list[Call]]:
    """Lists of blocks that hand their residual on to one another are one stack."""
    stacks: list[list[Call]] = []
    for group in groups:
        assert group[0].input is not None
        entry = {id(v) for v in flow.sources(group[0].input)}
        before = next((s for s in stacks if id(s[-1].output) in entry), None)
        if before is None:
            stacks.append(list(group))
        else:
            before.extend(group)
    return stacks


class BlockReader:
    """Reads one block call: its residual states, then what made each contribution."""

    def __init__(self, t: Trace, call: Call, index: int, batch: int) -> None:
        assert call.input is not None and call.output is not None
        self.t, self.call, self.index, self.batch = t, call, index, batch
        self.resid, self.out = call.input, call.output
        self.d_model = self.resid.shape[-1]
        self.additive = flow.Additive(self.resid, call.start)
        self.attention_ops = attending.attention_ops(t, call)
        self.taps: dict[str, Tap] = {}
        self.refused: dict[str, str] = {}
        self.contributions: dict[str, Value] = {}
        self.states: list[State] = []
        self.attentions: dict[str, Attention] = {}
        self.down_proj: str | None = None
        self.experts: str | None = None
        self.sizes = {"d_model": self.d_model}

    def read(self) -> Block:
        self.put("resid_pre", self.tap(self.call, self.resid, "in"))
        self.put("resid_post", self.tap(self.call, self.out, "out"))
        if self.additive.reaches(self.out):
            self.state(self.out)
            self.middle()
        else:
            self.refused["resid"] = "the block's output is not a sum of its input and contributions"
        self.describe_attention()
        self.describe_mlp()
        return Block(
            self.index, self.call.name, self.call.nth, self.form(), self.taps, tuple(self.states), self.attentions,
            self.down_proj, self.experts, self.refused, self.sizes,
        )  # fmt: skip

    # ---- taps

    def tap(self, call: Call, value: Value, port: str, scale: float = 1.0) -> Tap | None:
        ports = call.outputs if port == "out" else call.inputs
        key = next((k for k, v in ports.items() if v is value), None)
        positions = value.tensor.numel() // (self.batch * value.shape[-1])
        layout = recognise(tuple(value.shape), TOKENS, b=self.batch, p=positions, d=value.shape[-1])
        if key is None or layout is None:
            return None
        return Tap(call.name, port, Layout(layout.native, layout.canonical, layout.sizes, scale), key, call.nth)

    def put(self, part: str, tap: Tap | None, otherwise: str = "it is laid out in an unknown order") -> None:
        if tap is None:
            self.refused[part] = otherwise
        else:
            self.taps[part] = tap

    # ---- the residual stream

    def state(self, value: Value) -> str:
        """Describe the residual state `value` (and those it rests on) and return its name."""
        norm = flow.norm_of(value)
        total = value if norm is None or norm.input is None else norm.input
        terms: list[Term] = []
        constant: Tensor | None = None
        for coefficient, leaf in self.additive.terms(total):
            if leaf is self.resid:
                terms.append(Term("in", coefficient))
            elif self.additive.reaches(leaf):
                terms.append(Term(self.state(leaf), coefficient))
            elif flow.constant(leaf):
                extra = leaf.tensor.detach() * coefficient
                constant = extra if constant is None else constant + extra
            else:
                terms += [Term(self.contribution(v, c)) for c, v in self.parts(leaf, coefficient)]
        taps = (None, None) if norm is None else (self.tap(norm, total, "in"), self.tap(norm, value, "out"))
        self.states.append(State(tuple(terms), constant, *taps))
        return f"state {len(self.states) - 1}"

    def parts(self, value: Value, coefficient: float | Tensor) -> list[tuple[float | Tensor, Value]]:
        """Parallel blocks add attention and MLP before the residual: a sum that no module returns is two summands."""
        *_, moved = flow.sources(value)
        op = moved.producer
        if op is None or op.name not in flow.ADD or len(op.inputs) < 2 or flow.made_by_module(value, self.call):
            return [(coefficient, value)]
        sign = -1.0 if "sub" in op.name else 1.0
        a, b = op.inputs[:2]
        return self.parts(a, coefficient) + self.parts(b, flow.times(coefficient, sign))

    def contribution(self, value: Value, coefficient: float | Tensor) -> str:
        """Name a summand of the residual stream and tap it at the outermost module that returns it."""
        kind, n = self.kind(value), 1
        name = f"{kind}.out"
        while name in self.contributions:
            n += 1
            name = f"{kind}.out#{n}"
        self.contributions[name] = value
        found = flow.made_by_module(value, self.call)
        if found is None:
            self.refused[name] = "the contribution is computed in the block itself, no module returns it"
            return name
        call, inner, returned = found
        scale = flow.times(coefficient, inner)
        if isinstance(scale, Tensor) and scale.numel() > 1:
            self.refused[name] = "the contribution is scaled channel by channel on its way into the residual"
            return name
        self.put(name, self.tap(call, returned, "out", float(scale)))
        return name

    def ops_of(self, value: Value) -> list[Op]:
        """Operations between the residual states a contribution reads and the contribution itself."""

        def is_state(v: Value) -> bool:
            outside = v.producer is not None and v.producer.index < self.call.start
            return outside or v is self.resid or (v is not value and self.additive.reaches(v))

        return list(flow.ancestors(value, is_state))

    def kind(self, value: Value) -> str:
        """What made a contribution: self-attention, cross-attention, another mixer of positions, or the MLP."""
        ops = self.ops_of(value)
        attention = [op for op in ops if op in self.attention_ops]
        if attention:
            return "cross" if all(self.is_cross(op) for op in attention) else "attn"
        return "mixer" if any(op.name in MIXING for op in ops) else "mlp"

    def is_cross(self, op: Op) -> bool:
        """Whether the keys do not depend on this block's residual: they come from the other stack."""
        key = attending.key_of(op)
        behind = flow.ancestors(key, lambda v: v is self.resid)
        return key is not self.resid and not any(v is self.resid for o in behind for v in o.inputs)

    def middle(self) -> None:
        """resid_mid: the state that holds everything that mixes positions and nothing yet from the MLP."""
        wanted = {id(v) for n, v in self.contributions.items() if not n.startswith("mlp")}
        if not wanted or len(wanted) == len(self.contributions):
            self.refused["resid_mid"] = "the block adds a single contribution"
            return
        ops = self.t.ops[self.call.start : self.call.end]
        values = [v for op in ops for v in op.outputs if self.additive.reaches(v)]
        mids = [v for v in values if self.leaves(v) == wanted]
        for value in reversed(mids):
            norm = flow.norm_of(value)
            tap = self.tap(norm, value, "out") if norm is not None else None
            for call in value.read_by:
                tap = tap or (self.tap(call, value, "in") if call.inside(self.call) else None)
            if tap is not None:
                self.taps["resid_mid"] = tap
                return
        why = "attention and MLP read the same residual (parallel block)" if not mids else "no module reads it"
        self.refused["resid_mid"] = why

    def leaves(self, value: Value) -> set[int]:
        """The contributions a residual state contains."""
        norm = flow.norm_of(value)
        total = value if norm is None or norm.input is None else norm.input
        found: set[int] = set()
        for _, leaf in self.additive.terms(total):
            if leaf is self.resid or flow.constant(leaf):
                continue
            found |= self.leaves(leaf) if self.additive.reaches(leaf) else {id(leaf)}
        return found

    def form(self) -> str:
        if not self.states:
            return "other"
        if any(s.norm_out is not None for s in self.states):
            return "post-norm"
        if "parallel" in self.refused.get("resid_mid", ""):
            return "parallel"
        normed = any(flow.norm_of(v) is not None for v in self.contributions.values())
        return "sandwich" if normed else "pre-norm"

    # ---- attention and MLP

    def describe_attention(self) -> None:
        if not self.attention_ops:
            self.refused["attn"] = "this block has no softmax attention"
        for op in self.attention_ops:
            part = "cross" if self.is_cross(op) else "attn"
            if part in self.attentions:
                self.refused[part] = "the block has more than one self-attention; only the first is mapped"
                continue
            found = attending.describe(self.t, op, part, self.nth(op), self.batch)
            if isinstance(found, str):
                self.refused[part] = found
                continue
            self.attentions[part], taps = found
            self.taps |= taps
            if f"{part}.z_out" not in taps:
                self.refused[f"{part}.z_out"] = "no linear output projection reads z"

    def nth(self, op: Op) -> int:
        """How many attention calls the same module made before this one (shared layers are called many times)."""
        if op.name != "attention":
            return op.call.nth if op.call is not None else 0
        return sum(o.name == "attention" and o.args[0] is op.args[0] for o in self.t.ops[: op.index])

    def describe_mlp(self) -> None:
        value = self.contributions.get("mlp.out")
        if value is None:
            self.refused["mlp"] = "no position-wise contribution was found in this block"
            return
        experts = next((op for op in self.ops_of(value) if op.name == "experts"), None)
        if experts is not None:
            self.experts = self.t.names[experts.args[0]]
            self.refused["mlp.neurons"] = "a mixture of experts: neurons belong to mlp.experts.N"
            return
        linear = flow.linear_before(value, self.call.start)
        call = linear.call if linear is not None else None
        if call is None or call.input is None or call.children or call.output is None:
            self.refused["mlp.neurons"] = "no linear down projection was found behind the MLP's contribution"
            return
        self.down_proj = call.name
        self.sizes["neuron"] = call.input.shape[-1]
        self.put("mlp.neurons", self.tap(call, call.input, "in"))
