"""Which modules of a block read the residual stream, from which state, and which of their columns belong to whom?

Followed back through the trace from each query, key, value and neuron to the linear modules that make it, and from
there to a state of the stream (through its norm, and through a bottleneck where there is one). Whose a column is, is
found by running what lies between once more on random numbers: for f from the projection's output y to the units x,

    g_k = grad_y sum_u c_k(u) (r . x_u),    g_k(j) / g_0(j) = c_k(u)   where column j feeds unit u and no other

with c_0 = 1, the digits of u as c_1, c_2 ..., and random r. A ratio that is no digit tells a column that units share.
Nothing here is taken from names, and all of it is a claim until `trials.reads` has proven it by damage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.residual import Residual, mixes
from pellucid.anatomy.structure import Reads, Tap
from pellucid.anatomy.trace import Call, Op, Value, in_place, tensors

FURTHER = 4  # modules in a row that may lie between the stream and what reads it
Port = tuple[Value, Tap, bool]  # a value of the trace, how it is laid out, and whether it is met transposed


class Unread(Exception):
    """Why nothing was found."""


class Readers:
    """What reads the stream in one block; `ends` are the last residuals of other stacks, with their taps."""

    def __init__(self, r: Residual, ends: dict[int, Tap]) -> None:
        self.r, self.ends = r, ends
        self.reads: dict[str, tuple[Reads, ...]] = {}
        self.unread: dict[str, str] = {}

    def find(self, ports: dict[str, Port]) -> tuple[dict[str, tuple[Reads, ...]], dict[str, str]]:
        """Readers by part, "attn.q" or "mlp.neurons" (from `ports`) with their columns, "mlp" or "mixer" as a whole;
        and why there are none.
        """
        for part, port in ports.items():
            found: list[Reads] = []
            try:
                found.extend(self.made(part, *port))
            except Unread as why:
                self.unread[part] = str(why)
            if found:
                self.reads[part] = tuple(found)
        for name in self.r.contributions:
            if entries := tuple(self.entries(name)):
                self.reads[name.removesuffix(".out")] = entries
        return self.reads, self.unread

    # ---- the stream

    def state(self, value: Value) -> tuple[Value, Call | None, flow.Coefficient] | None:
        """The state of the stream that a value is, the norm it has passed since, and a factor after that."""
        for v in flow.sources(value):
            if self.is_state(v):
                return v, None, 1.0
            norm = flow.norm_of(v)
            if norm is not None and norm.input is not None:
                found = next((u for u in flow.sources(norm.input) if self.is_state(u)), None)
                return None if found is None else (found, norm, 1.0)
        scaled = flow.factor(v.producer) if v.producer is not None else None
        behind = self.state(scaled[0]) if scaled is not None else None
        return None if behind is None or scaled is None else (*behind[:2], behind[2] * scaled[1])

    def outside(self, value: Value) -> bool:
        """Whether a value was made before the block (of another stack's residual, whatever happened to it)."""
        return value.producer is None or value.producer.index < self.r.span.start

    def is_state(self, value: Value) -> bool:
        return value is self.r.resid or id(value) in self.r.stream or id(value) in self.ends

    def stream_tap(self, state: Value) -> Tap | None:
        """Where a state is met."""
        if state is self.r.resid:
            return self.r.taps.get("resid_pre")
        if id(state) in self.ends:
            return self.ends[id(state)]
        norm = flow.norm_of(state)
        if norm is not None and (tap := self.r.tap(state, norm, "out")) is not None:
            return tap
        read = (self.r.tap(state, call, "in") for call in state.read_by if self.r.inside(call))
        found = self.r.op_tap(state)
        return next((tap for tap in read if tap is not None), found[0] if found is not None else None)

    def depends(self, value: Value) -> bool:
        """Whether a value is computed from the stream."""
        ops = flow.ancestors(value, self.is_state)
        return any(self.is_state(v) for op in ops for v in op.inputs)

    # ---- heads and neurons

    def made(self, part: str, x: Value, tap: Tap, transposed: bool) -> Iterator[Reads]:
        """The readers that make x, each with its columns of every unit; those of a neuron's gate come first."""
        chains = [self.chain(call) for call in self.projections(x)]
        if not chains:
            raise Unread("no projection of this block makes them")
        try:
            found = _Replay(self, chains, x, tap, transposed).columns()
        except Unread:
            longer = [[*chains[0], call] for call in self.onward(chains[0][-1])] if len(chains) == 1 else []
            try:
                if not longer or part.endswith("neurons"):
                    raise
                found = _Replay(self, longer[:1], x, tap, transposed).columns()
                chains = longer[:1]
            except Unread:  # who reads is known, though not which column is whose
                yield from (self.reader(chain, None) for chain in chains)
                raise
        single = part.endswith("neurons")
        pieces = [(c, piece) for c, own in zip(chains, found.owned, strict=True)
                  for piece in (own.split(1, 1) if single else [own])]  # fmt: skip
        if single:
            if len(pieces) > 2:
                raise Unread("a neuron is made from more than two features of what reads the stream")
            if len(pieces) == 2 and found.linear(chains.index(pieces[0][0]), pieces[0][1]):
                pieces.reverse()
        for chain, columns in pieces:
            yield self.reader(chain, columns)

    def projections(self, x: Value) -> list[Call]:
        """The linear modules of the block that x is made by."""
        queue, seen, found = [x], set[int](), dict[int, Call]()
        while queue:
            op = queue.pop().producer
            if op is None or op.index in seen or op.index < self.r.span.start:
                continue
            seen.add(op.index)
            if mixes(op) and op.name not in ("pad", "tril") and self.depends(op.outputs[0]):
                raise Unread("positions are mixed on the way from the projection")
            if not flow.is_linear(op) or not self.depends(op.outputs[0]):
                queue.extend(op.inputs)
            elif op.call is None or op.call.children or op.call.input is None or op.call.output is None:
                raise Unread("this model projects in its own code, not by modules")
            else:
                found[op.call.start] = op.call
        return [found[start] for start in sorted(found)]

    def chain(self, call: Call) -> list[Call]:
        """The modules from the stream (or its norm) to this one, in order."""
        calls = [call]
        while (given := calls[0].input) is not None and not self.outside(given) and self.state(given) is None:
            before = next((c for c in given.made_by if _weighs(c) and c is not calls[0]), None)
            if before is None or len(calls) == FURTHER:
                raise Unread("what is projected is no state of the residual stream: another projection or step before")
            calls.insert(0, before)
        return calls

    def onward(self, call: Call) -> Iterator[Call]:
        """Modules with weights that work on all a projection made (a norm across heads)."""
        made = call.output
        assert made is not None
        for c in made.read_by:
            if self.r.inside(c) and c.input is made and c.output not in (None, made) and _weighs(c):
                yield c

    def reader(self, chain: list[Call], columns: Tensor | None) -> Reads:
        given, made = chain[0].input, chain[-1].output
        assert given is not None
        assert made is not None
        found = self.state(given) or (given, None, 1.0)
        stream, taps = (
            self.stream_tap(found[0]),
            (self.r.tap(given, chain[0], "in"), self.r.tap(made, chain[-1], "out")),
        )
        if stream is None or None in taps:
            raise Unread("what reads the stream, or the stream there, is laid out in an unknown order")
        norm = "" if found[1] is None else found[1].name
        names = tuple(c.name for c in chain)
        return Reads(taps[1], stream, norm, found[2], taps[0], names, given.shape[-1], columns)  # type: ignore[arg-type]

    # ---- whole parts

    def entries(self, name: str) -> Iterator[Reads]:
        """Where a contribution takes the stream in: a module's input that nothing else reads where there is one."""
        r = self.r
        foreign = {op.index for n, v in r.contributions.items() if n != name for op in r.ops_of(v)}
        own = [op for op in r.ops_of(r.contributions[name]) if op.index not in foreign]
        made, seen = {id(v) for op in own for v in op.outputs}, set[int]()
        for value in (v for op in sorted(own, key=lambda op: op.index) for v in op.inputs):
            if id(value) in seen or (id(value) in made and not self.is_state(value)):
                continue
            seen.add(id(value))
            found = self.state(value)
            stream = self.stream_tap(found[0]) if found is not None else None
            if found is None or stream is None:
                continue
            norm = "" if found[1] is None else found[1].name
            moved = [value, *(v for op in own if flow.passes(op) and op.inputs[0] is value for v in op.outputs)]
            users = {
                op.index for op in own if not set(moved).isdisjoint(op.inputs) and set(moved).isdisjoint(op.outputs)
            }
            taps = list(self.taking(moved, users, foreign))
            for tap in taps:
                yield Reads(tap, stream, norm, alone=len(taps) == 1)
            by = flow.norm_of(value)
            if not taps:
                yield Reads((self.r.tap(value, by, "out") if by is not None else None) or stream, stream, norm)

    def taking(self, moved: list[Value], users: set[int], foreign: set[int]) -> Iterator[Tap]:
        """The outermost modules that take a value for the operations `users` and for no other part."""
        for value, call in [(v, c) for v in moved for c in v.read_by if self.r.inside(c)]:
            inner = set(range(call.start, call.end))
            adds = any(id(made) in self.r.stream for made in call.outputs.values())
            tap = None if adds or foreign & inner or not users & inner else self.r.tap(value, call, "in")
            if tap is not None:
                users = users - inner
                yield tap


class _Replay:
    """What lies between projections and the units they make, run again on random numbers."""

    def __init__(self, readers: Readers, chains: list[list[Call]], x: Value, tap: Tap, transposed: bool) -> None:
        self.x, self.tap, self.transposed, self.batch = x, tap, transposed, readers.r.batch
        self.cuts = [v for chain in chains if (v := chain[-1].output) is not None]
        self.ops = _between(self.cuts, x, readers.r.span.start)
        generator = torch.Generator().manual_seed(0)
        self.given = [torch.randn(v.shape, generator=generator).to(v.tensor) for v in self.cuts]
        for y in self.given:
            y[:1] = y[:1].abs()  # so that every gate is open somewhere
        self.noise = torch.rand(self.read(x.tensor).shape, generator=generator) + 0.5
        self.exact = x.tensor.dtype in (torch.float32, torch.float64)
        self.owned: list[Tensor] = []

    def read(self, x: Tensor) -> Tensor:
        return self.tap.layout.read(x.transpose(-1, -2) if self.transposed else x, self.batch)

    def write(self, x: Tensor) -> Tensor:
        x = self.tap.layout.write(x)
        return (x.transpose(-1, -2) if self.transposed else x).to(self.x.tensor)

    def run(self, given: list[Tensor]) -> Tensor:
        """x [batch, position, unit, ...] in its native order, for other outputs of the projections."""
        made: dict[int, Tensor] = {id(v.tensor): y for v, y in zip(self.cuts, given, strict=True)}
        for op in self.ops:
            args, kwargs = _filled(op.args, made), _filled(op.kwargs, made)
            if in_place(op.name):
                args = (args[0].clone(), *args[1:])
            func = op.func or (op.call.module if op.call is not None else None)
            if func is None:
                raise Unread(f"{op.name!r} behind the projection cannot be run again")
            out = func(*args, **kwargs)
            results = list(tensors(args[:1] if op.name == "__setitem__" else out))
            if len(results) != len(op.outputs):
                raise Unread(f"what {op.name!r} does behind the projection cannot be run again")
            made |= {id(v.tensor): t for v, t in zip(op.outputs, results, strict=True)}
        return made[id(self.x.tensor)]

    def columns(self) -> _Replay:
        """Fills `owned`: of every projection [unit, e] the columns of each unit."""
        units = self.noise.shape[2]
        base = 256 if self.exact else 2
        places = [base**k for k in range(64) if base**k < units] or [1]
        number = torch.arange(units).view(-1, *[1] * (self.noise.ndim - 3))
        weights = [self.noise, *(self.noise * (1 + number // place % base) for place in places)]
        try:
            with torch.enable_grad():
                leaves = [y.detach().clone().requires_grad_() for y in self.given]
                out = self.run([y.view_as(y) for y in leaves])
                slopes = [
                    torch.autograd.grad(out, leaves, self.write(w), retain_graph=True, allow_unused=True)
                    for w in weights
                ]
        except (RuntimeError, TypeError, IndexError, KeyError) as error:
            raise Unread(f"what lies behind the projection cannot be run again ({type(error).__name__})") from error
        self.owned = [self._owned(grads, places, base, units) for grads in zip(*slopes, strict=True)]
        return self

    def _owned(self, slopes: tuple[Tensor | None, ...], places: list[int], base: int, units: int) -> Tensor:
        """[unit, e] from the slopes [..., column] of the sums with each digit."""
        if any(g is None for g in slopes):
            raise Unread("a projection does not reach them")
        first, *rest = (g.flatten(0, -2).double().cpu() for g in slopes if g is not None)
        size, best = first.abs().max(0)
        owner = torch.zeros(first.shape[-1], dtype=torch.long)
        for place, slope in zip(places, rest, strict=True):
            digit = slope.gather(0, best[None])[0] / first.gather(0, best[None])[0] - 1
            whole = digit.nan_to_num(0.0).round()
            if bool((size > 0).logical_and(((digit - whole).abs() > 0.1) | (whole < 0) | (whole >= base)).any()):
                raise Unread("columns of a projection are shared by several of them")
            owner += place * whole.long()
        reached = size > 0
        counts = owner[reached].bincount(minlength=units)
        if len(counts) != units or int(counts.min()) == 0 or int(counts.min()) != int(counts.max()):
            raise Unread("they have no equal numbers of columns of a projection")
        columns = reached.nonzero()[:, 0]
        return columns[owner[reached].argsort(stable=True)].view(units, -1)

    def linear(self, which: int, columns: Tensor) -> bool:
        """Whether x is linear in these columns of one projection."""
        step = torch.zeros_like(self.given[which])
        step[..., columns.flatten()] = 3.0
        with torch.no_grad():
            here, up, down = (
                self.run([y + sign * step if i == which else y for i, y in enumerate(self.given)]).double()
                for sign in (0, 1, -1)
            )
        return bool((up + down - 2 * here).abs().max() < (1e-3 if self.exact else 0.1) * (up - here).abs().max())


def _weighs(call: Call) -> bool:
    """Whether a call is one module with weights."""
    return not call.children and call.input is not None and next(call.module.parameters(), None) is not None


def _between(cuts: list[Value], x: Value, first: int) -> list[Op]:
    """The operations from the cuts to x that depend on them, in order."""
    ends = {id(v) for v in cuts}
    reached, found = set(ends), []
    ops = flow.ancestors(x, lambda v: id(v) in ends or v.producer is None or v.producer.index < first)
    for op in sorted(ops, key=lambda op: op.index):
        if any(id(v) in reached for v in op.inputs):
            reached |= {id(v) for v in op.outputs}
            found.append(op)
    return found


def _filled(tree: Any, made: dict[int, Tensor]) -> Any:
    """An operation's arguments with tensors that were made anew in place of those of the trace."""
    if isinstance(tree, Tensor):
        return made.get(id(tree), tree)
    if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
        return type(tree)(_filled(item, made) for item in tree)
    if isinstance(tree, dict):
        return {k: _filled(v, made) for k, v in tree.items()}
    return tree
