"""From one traced forward pass to the map: stacks, blocks, what each block adds, its attention and its
neurons.

Nothing here knows a family by name. Whatever is found is only a claim; `proofs.py` checks it on the loaded
model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy import attending, experts
from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.layout import TOKENS, Layout
from pellucid.anatomy.paths import find_path
from pellucid.anatomy.readers import Port, Readers
from pellucid.anatomy.residual import Residual, chooses
from pellucid.anatomy.spans import Span, find_spans
from pellucid.anatomy.structure import ATTENTION_PORTS, Attention, Block, Linear, Mlp, Path, Stack, Tap
from pellucid.anatomy.trace import Call, Op, Trace, Value
from pellucid.anatomy.weights import packed
from pellucid.anatomy.wholes import composed
from pellucid.errors import LoadError

EXPERT_SITES = ("router", "experts", "experts.neurons", "experts.out")


def trace(module: nn.Module, inputs: dict[str, Any]) -> tuple[Trace, Any]:
    """Run the module and write everything down: once, or again with modules closed that are one linear map as a whole."""
    closed = {m for m in module.modules() if packed(m)}
    with torch.no_grad(), Trace(module, closed) as t:
        output = module(**inputs)
    whole = composed(t)
    if whole:
        with torch.no_grad(), Trace(module, closed | whole) as t:
            output = module(**inputs)
    t.lengths = {x.shape[1] for x in inputs.values() if isinstance(x, Tensor) and x.ndim == 2}
    return t, output


def find_stacks(t: Trace, batch: int) -> list[tuple[Stack, list[Span]]]:
    """Every stack with its blocks described, and the spans of the trace they were read from; main stacks come
    last.
    """
    main, beside = find_spans(t)
    if not main:
        raise LoadError(
            f"no stack of blocks was found in {type(t.root).__name__}: expected listed modules that each "
            "take and return a residual of the same shape"
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
    ends = {
        id(spans[-1].made): s.blocks[-1].taps["resid_post"] for s, spans in found if "resid_post" in s.blocks[-1].taps
    }
    for i, (stack, spans) in enumerate(found):
        others = {k: tap for k, tap in ends.items() if k != id(spans[-1].made)}
        blocks = [reader.with_readers(b, others) for reader, b in zip(readers[i], stack.blocks, strict=True)]
        found[i] = replace(stack, blocks=tuple(blocks)), spans
    return found


def embeddings(t: Trace, ids: Any) -> dict[str, Tap]:
    """Where the embeddings of tokens and positions hand out their vectors: what an embedding looks up is these ids
    [batch, position], or numbers that count the positions.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return {}
    try:
        own = t.root.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        own = None
    found: dict[str, Tap] = {}
    looked_up = [(op.inputs[0].tensor, op.call) for op in t.ops if op.name == "embedding"]
    whole = [(v.tensor, c) for c in t.calls if c.module is own for v in list(c.inputs.values())[:1]]  # adapters and all
    for asked, call in whole + looked_up:
        made = call.output if call is not None else None
        if call is None or made is None or made.tensor.ndim != 3 or asked.is_floating_point():
            continue
        key = next(k for k, v in call.outputs.items() if v is made)
        if torch.equal(asked, ids) or torch.equal(asked, ids.T):
            native = TOKENS if asked.shape == ids.shape else "p b d"
            found.setdefault("tokens", Tap(call.name, "out", Layout(native, TOKENS), key, call.nth))
        elif asked.ndim == 2 and asked.shape[1] == ids.shape[1] and bool((asked.diff(dim=1) == 1).all()):
            layout = Layout(TOKENS, TOKENS, shared=len(asked) == 1 < len(ids))
            found.setdefault("positions", Tap(call.name, "out", layout, key, call.nth))
    return found


def unmapped(t: Trace, span: Span, reached: set[int]) -> tuple[str, ...]:
    """Attention that runs in a block but is in nothing that any residual stream of the block is made of."""
    lost = [op for op in attending.attention_ops(t, span.start, span.end) if op.index not in reached]
    return tuple(f"what {attending.where(t, op)} attends to does not reach the residual stream" for op in lost)


class BlockReader:
    """Describes one block: its attention and its MLPs, by what its residual stream is made of."""

    def __init__(self, t: Trace, span: Span, index: int, batch: int) -> None:
        self.r = Residual(t, span, batch)
        self.index = index
        self.attentions: dict[str, Attention] = {}
        self.mlps: dict[str, Mlp] = {}
        self.reached: list[Op] = []  # attention that the contributions are made of
        self.ports: dict[str, Port] = {}  # what is made from what is read: queries, keys, values, neurons
        self.sizes = {"d_model": self.r.d_model}

    def read(self) -> Block:
        self.describe_attention()
        for name, value in self.r.contributions.items():
            if name.startswith("mlp"):
                self.describe_mlp(name.removesuffix(".out"), value)
        if not self.mlps:
            self.r.refused["mlp"] = "no position-wise contribution was found in this block"
        first = self.r.span.first
        return Block(
            self.index, first.name, first.nth, self.r.form(), self.r.taps, tuple(self.r.states),
            self.attentions, self.mlps, self.r.refused, self.sizes, whole=self.r.span.whole,
        )  # fmt: skip

    def with_readers(self, block: Block, ends: dict[int, Tap]) -> Block:
        """The block with what reads the stream in it."""
        reads, unread = Readers(self.r, ends).find(self.ports)
        return replace(block, reads=reads, unread=unread)

    def describe_attention(self) -> None:
        if not self.r.attention_ops:
            why = "nothing in this block attends through the interface or through a softmax"
            self.r.refused["attn"] = why
        attending_parts = [n for n in self.r.contributions if n.startswith(("attn", "cross"))]
        behind = {name: self.r.ops_of(self.r.contributions[name]) for name in attending_parts}
        self.reached = [op for op in self.r.attention_ops if any(op in ops for ops in behind.values())]
        for name, ops in behind.items():
            mine = [op for op in self.r.attention_ops if op in ops]
            part = name.removesuffix(".out")
            found = attending.describe(self.r.t, mine[0], part, self.r.batch) if len(mine) == 1 else None
            if found is None:  # computed in windows or streams: there is no one table of queries by keys
                found = attending.describe_pieces(self.r.t, mine[-1], part), {}
                why = "the attention is computed in pieces: it has no single query-by-key table"
                self.r.refused |= {f"{part}.{port}": why for port in ATTENTION_PORTS}
            self.attentions[part], taps = found
            self.r.taps |= taps
            for port, (x, transposed) in attending.compares(mine[0]).items() if len(mine) == 1 else ():
                if f"{part}.{port}" in taps:
                    self.ports[f"{part}.{port}"] = x, taps[f"{part}.{port}"], transposed
            self.describe_projection(part, mine, name)

    def describe_projection(self, part: str, ops: list[Op], contribution: str) -> None:
        """The output projection that reads z, and what stands between it and the contribution."""
        a = self.attentions[part]
        projections = [flow.projection_of(attending.output_of(op)) for op in ops]
        found = projections[-1]
        call = found[0].call if found is not None else None
        if found is None or call is None or call.input is None or call.output is None or call.children:
            self.r.refused[f"{part}.z_out"] = "no module that is a linear output projection reads z"
            return
        if any(p is not None and p[0].call is not call for p in projections):
            self.r.refused[f"{part}.z_out"] = "its pieces go through the output projection in separate calls"
            return
        if a.route == "pieces":
            a = attending.with_heads(a, call.input)
        tap, shape = attending.projection_input(call, a, self.r.batch)
        out = self.r.tap(call.output, call, "out")
        if tap is None or out is None:
            self.r.refused[f"{part}.z_out"] = f"what {self.r.local(call)} reads cannot be split into heads"
            return
        path = self.path(call, contribution)
        if path is None:
            why = "is worked on inside the block before it is added to the residual"
            self.r.refused[f"{part}.heads.out"] = f"what {self.r.local(call)} makes {why}"
        elif path.onward is None:
            why = "is multiplied by a gate, token by token, before it is added to the residual"
            self.r.refused[f"{part}.heads.out"] = f"what {self.r.local(call)} makes {why}"
        self.r.taps[f"{part}.z_out"] = tap
        linear = Linear(call.name, shape, tap, out)
        self.attentions[part] = replace(a, o_proj=call.name, linear=linear, gated=not found[1], path=path)

    def path(self, call: Call, contribution: str) -> Path | None:
        """What stands between a projection's output and the contribution it makes."""
        target = self.r.tapped.get(contribution)
        if call.output is None or target is None:
            return None
        steps = find_path(call.output, target, call.start, probe=True)
        if steps is None:
            return None
        free = find_path(call.output, target, call.start)
        onward = None if free is None or "positions" in {s.name for s in free} else tuple((s.name, s.run) for s in free)
        return Path(tuple(s.name for s in steps if s.name), tuple(s.run for s in steps), onward)

    def describe_mlp(self, part: str, value: Value) -> None:
        ops = self.r.ops_of(value)
        mixture = next((op for op in ops if op.name == "experts"), None)
        if mixture is not None:
            self.describe_experts(part, mixture)
            return
        self.mlps[part] = Mlp(part)
        if any(chooses(op) for op in ops):
            why = "a mixture of experts with code of its own, which the experts interface does not hear"
            self.r.refused |= {f"{part}.{p}": why for p in ("neurons", *EXPERT_SITES)}
            return
        linear = flow.linear_before(value, self.r.span.start)
        call = linear.call if linear is not None else None
        if call is None or call.input is None or call.children or call.output is None:
            self.r.refused[f"{part}.neurons"] = "no linear down projection was found behind the MLP's contribution"
            return
        path = self.path(call, f"{part}.out")
        tap, out = self.r.tap(call.input, call, "in"), self.r.tap(call.output, call, "out")
        if path is None or tap is None or out is None:
            self.r.refused[f"{part}.neurons"] = f"{part}.out is more than the output of {self.r.local(call)}"
            return
        width = call.input.shape[1 if tap.layout.native == "b d p" else -1]
        self.r.taps[f"{part}.neurons"], self.sizes["neuron"] = tap, width
        self.ports[f"{part}.neurons"] = call.input, tap, False
        self.mlps[part] = Mlp(part, call.name, Linear(call.name, (width,), tap, out), path)

    def describe_experts(self, part: str, op: Op) -> None:
        """A mixture dispatched through the interface; each expert is one unit of its taps."""
        module, hidden, index = op.args[0], op.args[1], op.args[2]
        name = self.r.t.names[module]
        nth = sum(o.name == "experts" and o.args[0] is module for o in self.r.t.ops[: op.index])
        found = experts.describe(module, name, nth, index)
        self.mlps[part] = Mlp(part, experts=found)
        self.sizes |= {"expert": found.count}
        self.r.refused[f"{part}.neurons"] = f"a mixture of experts: neurons belong to {part}.experts.N.neurons"
        rows = Layout("(b p) d", TOKENS)
        if hidden.numel() // hidden.shape[-1] != self.r.resid.tensor.numel() // self.r.d_model:
            self.r.refused |= {f"{part}.{p}": "its experts do not see every token once" for p in EXPERT_SITES}
            return
        self.r.taps[f"{part}.router"] = Tap(name, "router", rows, nth=nth)
        self.r.taps[f"{part}.experts.neurons"] = Tap(name, "expert_neurons", rows, nth=nth)
        self.r.taps[f"{part}.experts.out"] = Tap(name, "expert_out", rows, nth=nth)
