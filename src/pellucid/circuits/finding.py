"""From the map to the wiring: which readings and writings does each block of a model have?

What reads the stream, through which norm and with which columns of which projection, is on the map
(`pellucid.anatomy.readers`). `pellucid.circuits.execution.wire` then proves the wiring on the model.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from pellucid.anatomy.structure import Block, Reads, Stack, State, Tap
from pellucid.anatomy.wiretap import tapped
from pellucid.anatomy.writers import Writer
from pellucid.circuits.graph import Graph, Source, Split
from pellucid.circuits.nodes import graph_of, parts, stacks_of
from pellucid.circuits.wiring import PLAIN, Norm, Reading, Stage, Wiring, Writing
from pellucid.errors import Refused
from pellucid.model import Model

NAMES = {"q": "queries", "k": "keys", "v": "values"}


def find_wiring(model: Model, split: Split) -> Wiring:
    """The wiring of a model, not proven yet. Refused with the reason where a reader has no input of its own."""
    stacks = stacks_of(model.anatomy)
    _check_positions(model, stacks)
    tables = _tables(model, stacks) if split.embedding == "parts" else {}
    finder = _Finder(model, graph_of(model.anatomy, split, list(tables)))
    for stack in stacks:
        for block in stack.blocks:
            finder.block(stack, block)
    modules = Counter(r.tap.module for r in finder.readings)
    shared = next((name for name, n in modules.items() if n > 1), None)
    if shared is not None:
        raise Refused(f"blocks or parts of this model share columns of {shared!r}: their inputs cannot be parted")
    end = finder.graph.readers[-1]
    tap, n = stacks[-1].blocks[-1].taps["resid_post"], len(finder.graph.readers)
    finder.readings.append(Reading(tap, end.depth, [n - 1], end.first, end.feeds, end.stack, None))
    embeds = [(stacks[0].name, tap) for tap in tables.values()]
    embeds = embeds or [(s.name, s.blocks[0].taps["resid_pre"]) for s in stacks]
    stages = {s.name: finder.stages(s) for s in stacks}
    return Wiring(model, finder.graph, embeds, finder.readings, finder.writings, stages)


def _check_positions(model: Model, stacks: tuple[Stack, ...]) -> None:
    """Refused unless every block has a residual for each token."""
    anatomy = model.anatomy
    taps = {b.taps["resid_pre"]: (s, b) for s in stacks for b in s.blocks}
    met, _ = tapped(model.module, taps, _rows(model), lambda: model.module(**anatomy.inputs))
    for tap, (stack, block) in taps.items():
        where, ids = (
            f"{stack.prefix}layers.{block.index}",
            anatomy.inputs.get("input_ids" if stack is stacks[0] else "decoder_input_ids"),
        )
        if tap.layout != PLAIN or tap not in met:
            raise Refused(f"circuits need the residual given to {where} as [batch, position, d_model]")
        if isinstance(ids, Tensor) and ids.shape[1] != met[tap].shape[1]:
            raise Refused(
                f"circuits need a residual for each token; {where} has {met[tap].shape[1]} positions where "
                f"the prompt has {ids.shape[1]} tokens"
            )


def _rows(model: Model) -> int:
    """How many rows the probe has."""
    return next(v.shape[0] for v in model.anatomy.inputs.values() if isinstance(v, Tensor) and v.ndim > 1)


class _Finder:
    def __init__(self, model: Model, graph: Graph) -> None:
        self.model, self.graph = model, graph
        self.readings: list[Reading] = []
        self.writings: list[Writing] = []

    def block(self, stack: Stack, block: Block) -> None:
        """Where the parts of one block read and write, in the order of the pass."""
        self.stack, self.at = stack, block
        self.where = f"{stack.prefix}layers.{block.index}"
        self.depth = next(s.depth for s in self.graph.sources if (s.stack, s.layer) == (stack.name, block.index))
        for part in parts(block):
            self.readings += self.projections(part) if part in ("attn", "cross") else [self.component(part)]
            self.writings.append(self.writing(part))

    def module(self, name: str) -> nn.Module:
        return self.model.module.get_submodule(name)

    def coefficient(self, part: str) -> float | Tensor:
        return next(t.coefficient for s in self.at.states for t in s.terms if t.source == f"{part}.out")

    def readers(self, part: str, kind: str) -> list[int]:
        wanted = (self.depth, part if part in ("attn", "cross") else "", kind)
        return [i for i, r in enumerate(self.graph.readers) if (r.depth, r.part, r.kind) == wanted]

    def reading(self, reads: Reads, readers: list[int], columns: Tensor | None = None) -> Reading:
        """Some readers of the graph at their place on the map."""
        if isinstance(reads.scale, Tensor) or reads.scale != 1.0:
            raise Refused(
                f"circuits need the stream as it is; what {self.where} reads is multiplied by something first"
            )
        if (columns is not None and reads.tap.layout != PLAIN) or (reads.stream.layout != PLAIN and reads.norm):
            raise Refused(f"circuits need what {self.where} reads as [batch, position, d_model]")
        r = self.graph.readers[readers[0]]
        norm = Norm(self.module(reads.norm)) if reads.norm else None
        if columns is None:  # what is met is the stream itself, unless a norm that others share comes before
            stream = reads.stream if reads.norm else None
            return Reading(reads.tap, self.depth, readers, r.first, r.feeds, r.stack, stream, norm)
        chain = tuple(map(self.module, reads.modules))
        return Reading(
            reads.tap, self.depth, readers, r.first, r.feeds, self.graph.sources[r.first].stack, reads.stream, norm,
            chain[-1], columns, reads.width, chain if len(chain) > 1 or not _matrix(chain[-1]) else (),
        )  # fmt: skip

    def projections(self, part: str) -> list[Reading]:
        """The projections of one attention, with the columns of every head's query, key and value."""
        own = {port: self.columns(part, port) for port in "qkv"}
        found: list[Reading] = []
        for tap in dict.fromkeys(reads.tap for reads, _ in own.values()):
            here = [(port, reads, columns) for port, (reads, columns) in own.items() if reads.tap == tap]
            if len({columns.shape[1] for _, _, columns in here}) > 1:
                raise Refused(f"queries, keys and values of {self.where} have unequal widths in one projection")
            columns = torch.cat([columns for _, _, columns in here])
            if len(columns.unique()) < columns.numel():
                raise Refused(f"the heads of {self.where} share columns of a projection: their inputs cannot be parted")
            found.append(self.reading(here[0][1], [i for port, *_ in here for i in self.readers(part, port)], columns))
        return found

    def columns(self, part: str, port: str) -> tuple[Reads, Tensor]:
        """What reads the stream for a port, and [head, e] the columns of each head."""
        what, reads = f"the {NAMES[port]} of {self.where}", self.at.reads.get(f"{part}.{port}", ())
        if f"{part}.{port}" not in self.at.taps:
            raise Refused(f"{what} are not on the map of this model")
        if len(reads) != 1 or reads[0].columns is None:
            why = self.at.unread.get(f"{part}.{port}", "they are made from more than one projection")
            raise Refused(
                f"{what} are no columns of a projection of the residual ({why}), so each head's input cannot be "
                "changed alone"
            )
        heads, wanted = len(reads[0].columns), len(self.readers(part, port))
        if heads != wanted:
            raise Refused(f"{what} come in {heads} heads, its map says {wanted}")
        return reads[0], reads[0].columns

    def component(self, part: str) -> Reading:
        """Where an MLP or mixer alone can be given another stream."""
        reads = self.at.reads.get(part, ())
        if len(reads) != 1 or not reads[0].alone:
            raise Refused(f"the {part} of {self.where} has no input of its own to edit")
        return self.reading(reads[0], self.readers(part, part))

    def writing(self, part: str) -> Writing:
        block = self.at
        first = next(i for i, s in enumerate(self.graph.sources) if s.depth == self.depth and part in (s.part, s.kind))
        adds = block.taps[f"{part}.out"]
        common = (first, self.depth, self.stack.name, self.coefficient(part))
        neurons = tuple(s.unit for s in self.graph.sources if s.depth == self.depth and s.kind == "neuron")
        if part not in ("attn", "cross") and not (part == "mlp" and neurons):
            return Writing(adds, adds, *common)
        try:
            writer = Writer.of(self.model.module, block, part)
        except Refused as why:
            what = "heads" if part in ("attn", "cross") else "neurons"
            raise Refused(f"the {what} of {self.where} do not write to the residual independently: {why}") from None
        if part == "mlp":
            return Writing(adds, adds, *common, writer, neurons, block.taps["mlp.neurons"])
        return Writing(block.taps[f"{part}.z_out"], adds, *common, writer)

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


def _matrix(module: nn.Module) -> bool:
    """Whether it is one module with a matrix."""
    return getattr(getattr(module, "weight", None), "ndim", 0) >= 2


def _tables(model: Model, stacks: tuple[Stack, ...]) -> dict[str, Tap]:
    """Token and position embeddings, where their sum is what enters the first block."""
    if len(stacks) > 1:
        raise Refused("an encoder-decoder's embeddings cannot be split: use the whole embedding")
    embeds, resid = stacks[0].embeds, stacks[0].blocks[0].taps["resid_pre"]
    met, _ = tapped(model.module, {resid, *embeds.values()}, _rows(model), lambda: model.module(**model.anatomy.inputs))
    total = sum(met[tap] for tap in embeds.values())
    if len(embeds) < 2 or not torch.allclose(total.expand_as(met[resid]), met[resid], atol=1e-5):  # type: ignore[union-attr]
        raise Refused("what enters the first block is not a sum of embedding tables: use embedding='whole'")
    return dict(embeds)
