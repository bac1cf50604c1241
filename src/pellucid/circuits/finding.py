"""Finding the wiring of a model: one run of its probe, in which every reader's own input is looked for.

Which columns of a projection belong to which head is found, not assumed: in a batch with one row per head, the
gradient of head h of row h with respect to the projection's output is nonzero on exactly its columns. Where a
module takes the stream is known by the very tensor being handed to it.
`pellucid.circuits.execution.wire` then proves the wiring on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.structure import Block, Stack, State, Tap
from pellucid.anatomy.wiretap import Wiretap
from pellucid.circuits.graph import Graph, Source, Split
from pellucid.circuits.nodes import graph_of, parts, sequential, stacks_of
from pellucid.circuits.wiring import PLAIN, Norm, Reading, Stage, Wiring, Writing
from pellucid.engine.stubbed import grow
from pellucid.errors import Refused
from pellucid.model import Model


def find_wiring(model: Model, split: Split) -> Wiring:
    """The wiring of a model, not proven yet. Refused with the reason where a reader has no input of its own."""
    stacks = stacks_of(model.anatomy)
    calls = Calls(model, stacks)
    tables = _tables(model, calls, stacks) if split.embedding == "parts" else {}
    finder = _Finder(model, graph_of(model.anatomy, split, list(tables)), calls, stacks)
    for stack in stacks:
        for block in stack.blocks:
            finder.block(stack, block)
    end = finder.graph.readers[-1]
    tap, n = stacks[-1].blocks[-1].taps["resid_post"], len(finder.graph.readers)
    finder.readings.append(Reading(tap, end.depth, [n - 1], end.first, end.feeds, end.stack, None))
    embeds = [(stacks[0].name, Tap(name, "out", PLAIN)) for name in tables.values()]
    embeds = embeds or [(s.name, s.blocks[0].taps["resid_pre"]) for s in stacks]
    stages = {s.name: finder.stages(s) for s in stacks}
    return Wiring(model, finder.graph, embeds, finder.readings, finder.writings, stages)


# ---- what is found by running the probe once


@dataclass(eq=False)
class Call:
    name: str
    module: nn.Module
    key: int | str
    given: Tensor
    made: Tensor | None = None


class Calls:
    """One forward pass of the probe's first row, once per head, with every module call that is given a tensor."""

    def __init__(self, model: Model, stacks: tuple[Stack, ...]) -> None:
        module, anatomy = model.module, model.anatomy
        blocks = [b for s in stacks for b in s.blocks]
        self.rows = max([2, *(a.heads for b in blocks for a in b.attentions.values())])
        inputs = {
            k: grow(v[:1], self.rows, 1) if isinstance(v, Tensor) and v.ndim else v for k, v in anatomy.inputs.items()
        }
        self.calls: list[Call] = []
        self.met: dict[Tap, Tensor] = {}
        hooks: list[Any] = []
        for name, m in module.named_modules():
            hooks.append(m.register_forward_pre_hook(self._before(name), with_kwargs=True))
            hooks.append(m.register_forward_hook(self._after, with_kwargs=True))
        self._open: list[Call | None] = []
        taps = {t for b in blocks for t in _wanted(b)}
        try:
            with torch.enable_grad(), Wiretap(module, {t: self._keep(t) for t in taps}, self.rows):
                module(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        names = [c.name for c in self.calls]
        self.repeated = {n for n in names if names.count(n) > 1}

    def _keep(self, tap: Tap) -> Callable[[Tensor], None]:
        def keep(x: Tensor) -> None:
            self.met[tap] = x

        return keep

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            every: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            given = [(k, v) for k, v in every if isinstance(v, Tensor)]
            call = Call(name, module, given[0][0], given[0][1]) if given else None
            self._open.append(call)
            if call is not None:
                self.calls.append(call)

        return hook

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._open.pop()
        first = output[0] if isinstance(output, tuple) and output else output
        if call is not None and isinstance(first, Tensor):
            call.made = first

    def within(self, block: Block) -> list[Call]:
        return [c for c in self.calls if c.name.startswith(f"{block.module}.")]


def _wanted(block: Block) -> Iterator[Tap]:
    """What is kept of a block: queries, keys and values, and the stream wherever it is on the map."""
    for name, tap in block.taps.items():
        if name.rpartition(".")[2] in ("q", "k", "v", "out", "resid_pre", "resid_mid", "resid_post"):
            yield tap
    for state in block.states:
        if state.norm_out is not None:
            yield state.norm_out


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape)


def _close(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5)


# ---- from blocks to readings and writings


@dataclass(frozen=True, eq=False)
class Stream:
    """The residual as it is at some point: its value, and where it is met."""

    value: Tensor
    tap: Tap


Origin = tuple[Tap, Norm | None, tuple[nn.Module, ...]]  # a stream, the norm it passes, and modules that follow


class _Finder:
    def __init__(self, model: Model, graph: Graph, calls: Calls, stacks: tuple[Stack, ...]) -> None:
        self.model, self.graph, self.calls, self.stacks = model, graph, calls, stacks
        self.readings: list[Reading] = []
        self.writings: list[Writing] = []

    def block(self, stack: Stack, block: Block) -> None:
        """Where the parts of one block read and write, in the order of the pass."""
        self.stack, self.at = stack, block
        self.where = f"{stack.prefix}layers.{block.index}"
        self.here = self.calls.within(block)
        self.depth = next(s.depth for s in self.graph.sources if (s.stack, s.layer) == (stack.name, block.index))
        attending: list[Reading] = []
        for part in parts(block):
            if part in ("attn", "cross"):
                found = self.projections(part)
                attending += found
            else:
                found = [self.component(part, attending)]
            self.readings += found
            self.writings.append(self.writing(part))

    # ---- streams

    def stream(self, tap: Tap, where: str) -> Stream:
        value = self.calls.met.get(tap)
        if tap.layout != PLAIN or value is None or value.ndim != 3:
            raise Refused(f"circuits need {where} as [batch, position, d_model]")
        return Stream(value, tap)

    @property
    def given(self) -> Stream:
        """What the block was given."""
        found = self.stream(self.at.taps["resid_pre"], f"the residual given to {self.where}")
        inputs = self.model.anatomy.inputs
        ids = inputs.get("input_ids" if self.stack is self.stacks[0] else "decoder_input_ids")
        if isinstance(ids, Tensor) and ids.shape[1] != found.value.shape[1]:
            raise Refused(
                f"circuits need a residual for each token; {self.where} has {found.value.shape[1]} positions where "
                f"the prompt has {ids.shape[1]} tokens"
            )
        return found

    def between(self, part: str) -> Stream | None:
        """The stream a later part reads, where it is on the map."""
        state = next((s for s in self.at.states if any(t.source == f"{part}.out" for t in s.terms)), self.at.states[-1])
        n = self.at.states.index(state)
        if n and self.at.states[n - 1].norm_out is not None:
            tap: Tap | None = self.at.states[n - 1].norm_out
        else:
            tap = self.at.taps.get("resid_mid") if part == "mlp" and sequential(self.at) else None
        return None if tap is None else self.stream(tap, f"the residual between the parts of {self.where}")

    def after(self, part: str) -> Tensor | None:
        """The value of the stream behind a part of a block without norms; None where that cannot be told."""
        total = self.given.value
        for name in parts(self.at):
            made = self.calls.met.get(self.at.taps[f"{name}.out"])
            if made is None or len(self.at.states) > 1 or made.shape != total.shape:
                return None
            total = total + made * self.coefficient(name)
            if name == part:
                break
        return total

    def coefficient(self, part: str) -> float | Tensor:
        return next(t.coefficient for s in self.at.states for t in s.terms if t.source == f"{part}.out")

    # ---- attention

    def projections(self, part: str) -> list[Reading]:
        """The projections of one attention, with the columns of every head's query, key and value."""
        found: dict[str, Reading] = {}
        taken: dict[str, Tensor] = {}
        for port in "qkv":
            call, columns, (stream, prefix, steps) = self.columns(part, port)
            assert call.made is not None
            mine = torch.zeros(call.made.shape[-1], dtype=torch.long)
            taken[call.name] = taken.get(call.name, mine) + mine.index_fill(0, columns.flatten().cpu(), 1)
            readers = self._readers(part, port)
            old = found.get(call.name)
            if old is not None and old.columns is not None and old.columns.shape[1] == columns.shape[1]:
                readers, columns = old.readers + readers, torch.cat([old.columns, columns])
            elif old is not None:
                raise Refused(f"queries, keys and values of {self.where} have unequal widths in one projection")
            r = self.graph.readers[readers[0]]
            heard = self.graph.sources[r.first].stack
            found[call.name] = Reading(
                Tap(call.name, "out", PLAIN), self.depth, readers, r.first, r.feeds, heard, stream,
                prefix, call.module, columns, call.given.shape[-1],
                (*steps, call.module) if steps or not _linear(call) else (),
            )  # fmt: skip
        if any(int(t.max()) > 1 for t in taken.values()) or self.calls.repeated & set(found):
            raise Refused(f"the heads of {self.where} share columns of a projection: their inputs cannot be parted")
        return list(found.values())

    def _readers(self, part: str, kind: str) -> list[int]:
        wanted = (self.depth, part if part in ("attn", "cross") else "", kind)
        return [i for i, r in enumerate(self.graph.readers) if (r.depth, r.part, r.kind) == wanted]

    def columns(self, part: str, port: str) -> tuple[Call, Tensor, Origin]:
        """The projection behind a port (or what it ends in), [head, e] its columns of each head, and what it reads."""
        x = self.calls.met.get(self.at.taps.get(f"{part}.{port}", self.at.taps["resid_pre"]))
        what = {"q": "queries", "k": "keys", "v": "values"}[port]
        if x is None or x.ndim != 4:
            raise Refused(f"the {what} of {self.where} are not on the map of this model")
        heads = x.shape[2]
        if heads != len(self._readers(part, port)):
            raise Refused(
                f"the {what} of {self.where} come in {heads} heads, its map says {len(self._readers(part, port))}"
            )
        rows = torch.arange(heads, device=x.device)
        own = x[rows, :, rows]  # row h, head h: [head, position, e]
        noise = torch.rand(own.shape, generator=torch.Generator().manual_seed(0)).to(own) + 0.5
        linear = [c for c in self.here if _projects(c)]
        if linear and x.requires_grad:
            outputs = [c.made for c in linear if c.made is not None]
            grads = torch.autograd.grad((own * noise).sum(), outputs, allow_unused=True, retain_graph=True)
            for call, grad in zip(linear, grads, strict=True):
                reached = None if grad is None else (grad != 0).any(1)[:heads]  # [head, column]
                if reached is None or not 0 < int(reached.sum(1).min()) == int(reached.sum(1).max()):
                    continue
                origin = self.origin(call, part, port) if int(reached.sum(0).max()) == 1 else None
                if origin is not None and (_linear(call) or any(map(_matrix, origin[2]))):
                    return call, reached.nonzero()[:, 1].reshape(heads, -1), origin
        raise Refused(
            f"the {what} of {self.where} are no columns of a projection of the residual (what else they are "
            "made of is shared by heads), so each head's input cannot be changed alone"
        )

    def origin(self, call: Call, part: str, port: str, further: int = 3) -> Origin | None:
        """Which stream a projection reads, through which norm, and which modules stand between."""
        before = [c for c in self.calls.calls if _same(c.made, call.given) and not _same(c.given, c.made)]
        if part == "cross" and port != "q":
            encoder = self.stacks[0]
            streams = [self.stream(encoder.blocks[-1].taps["resid_post"], "the end of the encoder")]
        elif part == "cross":
            found = self.between(part)
            middle = self.after("attn")
            streams = [] if found is None else [found]
            for c in before if found is None else ():
                if middle is not None and _close(c.given, middle) and c.name not in self.calls.repeated:
                    streams.append(Stream(c.given, Tap(c.name, "in", PLAIN, c.key)))
        else:
            streams = [self.given]
        for stream in streams:
            if _same(call.given, stream.value):
                return stream.tap, None, ()
            for c in before:
                if _same(c.given, stream.value) and not _linear(c):
                    return stream.tap, Norm(c.module), ()
        for c in before if further else ():
            behind = self.origin(c, part, port, further - 1) if _projects(c) else None
            if behind is not None:
                return *behind[:2], (*behind[2], c.module)
        return None

    # ---- MLPs and mixers

    def component(self, part: str, attending: list[Reading]) -> Reading:
        """Where an MLP or mixer alone can be given another stream."""
        (reader,) = self._readers(part, part)
        r = self.graph.readers[reader]
        mid = self.at.taps.get("resid_mid")
        if part == "mlp" and mid is not None and mid.port == "in" and mid.layout != PLAIN:
            return Reading(mid, self.depth, [reader], r.first, r.feeds, r.stack, None)  # tokens in one row (OPT)
        stream = self.between(part) if part == "mlp" else None
        stream = stream or self.given
        behind = self.after(part)
        projecting = {a.tap.module for a in attending}
        attend = {a.module for a in self.at.attentions.values()} | projecting
        inner = [c for c in self.here if not any(_related(c.name, m) for m in attend)]
        shared = {id(c.given) for c in self.here if c.name in projecting}  # what attention's projections read
        own = self.at.taps[f"{part}.out"].module
        also = {self.at.taps[f"{p}.out"].module for p in parts(self.at) if p != part} - {self.at.module}

        def reading(call: Call, stream: Tap | None, norm: Norm | None = None) -> Reading:
            if call.name in self.calls.repeated:
                raise Refused(
                    f"the {part} of {self.where} is run more than once in a pass, so its input cannot be told apart"
                )
            tap = Tap(call.name, "in", PLAIN, call.key)
            return Reading(tap, self.depth, [reader], r.first, r.feeds, r.stack, stream, norm)

        for c in inner:
            adds = behind is not None and _close(c.made, behind) and not _same(c.made, c.given)
            if (
                _same(c.given, stream.value)
                and not adds
                and id(c.made) not in shared
                and not self._serves(c, own, also)
            ):
                return reading(c, None)
        for c in inner:
            norm = next((n for n in self.here if _same(n.given, stream.value) and _same(n.made, c.given)), None)
            if norm is not None and not self._serves(c, own, also):
                return reading(c, stream.tap, Norm(norm.module))
        raise Refused(f"the {part} of {self.where} has no input of its own to edit")

    def _serves(self, call: Call, own: str, also: set[str]) -> bool:
        """Whether a call belongs to another part than the one looked at (mixer and MLP of one block)."""
        mine = _related(call.name, own)
        return not mine and any(_related(call.name, m) for m in also if m != own)

    def writing(self, part: str) -> Writing:
        block = self.at
        first = next(i for i, s in enumerate(self.graph.sources) if s.depth == self.depth and part in (s.part, s.kind))
        adds = block.taps[f"{part}.out"]
        common = (first, self.depth, self.stack.name, self.coefficient(part))
        if part in ("attn", "cross"):
            attention = block.attentions[part]
            if attention.o_proj is None or attention.path is None:
                raise Refused(f"the heads of {self.where} do not write to the residual independently")
            projection = self.model.module.get_submodule(attention.o_proj)
            return Writing(block.taps[f"{part}.z_out"], adds, *common, attention, projection)
        neurons = tuple(s.unit for s in self.graph.sources if s.depth == self.depth and s.kind == "neuron")
        if part != "mlp" or not neurons:
            return Writing(adds, adds, *common)
        mlp = block.mlps["mlp"]
        assert mlp.down_proj is not None
        down = self.model.module.get_submodule(mlp.down_proj)
        return Writing(adds, adds, *common, None, down, neurons, block.taps["mlp.neurons"], mlp)

    # ---- stages

    def stages(self, stack: Stack) -> list[Stage]:
        mine = [i for i, s in enumerate(self.graph.sources) if s.stack == stack.name]
        if all(s.norm_in is None for b in stack.blocks for s in b.states):
            return [Stage(mine[0], mine[-1] + 1, stack.name)]
        embeds = sum(self.graph.sources[i].kind == "embed" for i in mine)
        found = [Stage(mine[0], mine[0] + embeds, stack.name)]
        for block in stack.blocks:
            for state in block.states:
                first = found[-1].last
                own = [
                    i for i in mine
                    if self.graph.sources[i].layer == block.index and f"{_part(self.graph.sources[i])}.out" in
                    {t.source for t in state.terms}
                ]  # fmt: skip
                if own != list(range(first, first + len(own))) or not own:
                    raise Refused(
                        f"circuits need parts that add to the stream in order; {stack.prefix}layers.{block.index} mixes them"
                    )
                norm, tap = self._norm(state, f"{stack.prefix}layers.{block.index}")
                found.append(Stage(first, own[-1] + 1, stack.name, norm, tap, self.graph.sources[first].depth))
        return found

    def _norm(self, state: State, where: str) -> tuple[Norm | None, Tap | None]:
        if state.norm_in is None or state.norm_out is None:
            return None, None
        if state.norm_in.module != state.norm_out.module or state.norm_in.layout != PLAIN:
            raise Refused(f"the norm of the residual of {where} is no module that can be called alone")
        return Norm(self.model.module.get_submodule(state.norm_in.module)), state.norm_in


def _part(source: Source) -> str:
    return source.part or {"neuron": "mlp"}.get(source.kind, source.kind)


def _related(a: str, b: str) -> bool:
    """Whether one module holds the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _linear(call: Call) -> bool:
    return _matrix(call.module)


def _matrix(module: nn.Module) -> bool:
    """Whether it is one module with a matrix."""
    return not list(module.children()) and getattr(getattr(module, "weight", None), "ndim", 0) >= 2


def _projects(call: Call) -> bool:
    """Whether a call may be (the end of) a projection: [batch, position, d] in and out, with weights."""
    return (
        call.made is not None
        and call.made.requires_grad
        and call.made.ndim == call.given.ndim == 3
        and not list(call.module.children())
        and not isinstance(call.module, nn.Embedding)
        and any(True for _ in call.module.parameters())
    )


def _tables(model: Model, calls: Calls, stacks: tuple[Stack, ...]) -> dict[str, str]:
    """`tokens` and `positions` -> module, where their sum is what enters the first block."""
    if len(stacks) > 1:
        raise Refused("an encoder-decoder's embeddings cannot be split: use the whole embedding")
    tables = [c for c in calls.calls if isinstance(c.module, nn.Embedding) and c.made is not None]
    resid = calls.met.get(stacks[0].blocks[0].taps["resid_pre"])
    total = sum(c.made for c in tables if c.made is not None) if tables else None
    fits = isinstance(total, Tensor) and resid is not None
    if len(tables) < 2 or not fits or not torch.allclose(total.expand_as(resid), resid, atol=1e-5):  # type: ignore[union-attr, arg-type]
        raise Refused("what enters the first block is not a sum of embedding tables: use embedding='whole'")
    words = model.module.get_input_embeddings()  # type: ignore[operator]
    names = [
        "tokens" if c.module is words else "positions" if len(tables) == 2 else c.name.rpartition(".")[2]
        for c in tables
    ]
    return dict(zip(names, (c.name for c in tables), strict=True))
