"""Who can send what to whom inside a model, and which of these edges are in the circuit?

Sources write messages into the residual stream: the embedding, every head, every MLP. Readers take the stream
in: the query, key and value of every head, every MLP, and the logits. An edge is a source and a reader that
comes after it:

    layers.0.attn.heads.1 -> layers.5.attn.heads.7.q        layers.3.mlp -> logits        embed ->
                                                            layers.0.mlp

With grouped queries a key or value is read once for its group: `layers.5.attn.kv_heads.2.k`. Short names are
understood: `5.7` or `a5.h7` is a head, `5.7.q` its query, `m3` an MLP. A graph is two axes, sources and
readers, both in the order of the pass; a circuit is a matrix [source, reader] over them (as in Hanna et al.
2024, EAP-IG).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pellucid.anatomy.structure import Anatomy, Block
from pellucid.errors import InputError, Refused, nearest

Embedding = Literal["whole", "parts"]


@dataclass(frozen=True)
class Source:
    """Something that writes to the residual stream. `kind` is "embed", "head" or "mlp"."""

    name: str
    kind: str
    layer: int = -1
    unit: int = -1


@dataclass(frozen=True)
class Reader:
    """Something that reads the residual stream, from the first `feeds` sources. `kind`: "q", "k", "v", "mlp",
    "logits"."""

    name: str
    kind: str
    feeds: int
    layer: int
    unit: int = -1


@dataclass(frozen=True)
class Graph:
    """All sources and readers of a one-stack model. `groups`: query heads per key-value head, by layer."""

    sources: tuple[Source, ...]
    readers: tuple[Reader, ...]
    groups: tuple[int, ...]

    @classmethod
    def of(cls, anatomy: Anatomy, embedding: Embedding = "whole", parts: Iterable[str] = ()) -> Graph:
        """The graph of a model; with `embedding="parts"`, token and position embeddings (`parts`) are two
        sources.

        Refused where the residual stream is not a plain sum of heads and MLPs (post-norm, several streams,
        mixers).
        """
        if len(anatomy.stacks) != 1:
            raise Refused("circuits need a model of one stack; this one has an encoder and a decoder")
        stack = anatomy.stacks[0]
        embeds = [f"embed.{p}" for p in parts] if embedding == "parts" else ["embed"]
        sources = [Source(name, "embed") for name in embeds]
        readers: list[Reader] = []
        groups = []
        for block in stack.blocks:
            check(block)
            i, attention = block.index, block.attentions["attn"]
            name = f"layers.{i}.attn"
            groups.append(attention.heads // attention.kv_heads)
            shared = "kv_heads" if groups[-1] > 1 else "heads"
            for kind, units, where in (
                ("q", attention.heads, "heads"),
                *((p, attention.kv_heads, shared) for p in "kv"),
            ):
                readers += [Reader(f"{name}.{where}.{u}.{kind}", kind, len(sources), i, u) for u in range(units)]
            before = len(sources)
            sources += [Source(f"{name}.heads.{h}", "head", i, h) for h in range(attention.heads)]
            if "mlp.out" in block.taps:
                feeds = len(sources) if sequential(block) else before
                readers.append(Reader(f"layers.{i}.mlp", "mlp", feeds, i))
                sources.append(Source(f"layers.{i}.mlp", "mlp", i))
        readers.append(Reader("logits", "logits", len(sources), len(stack.blocks)))
        return cls(tuple(sources), tuple(readers), tuple(groups))

    # ---- sizes and positions

    @cached_property
    def possible(self) -> Tensor:
        """[source, reader] whether the source comes before the reader."""
        feeds = torch.tensor([r.feeds for r in self.readers])
        return torch.arange(len(self.sources))[:, None] < feeds[None]

    def __len__(self) -> int:
        """How many edges there are.

        >>> Graph((Source("embed", "embed"),), (Reader("logits", "logits", 1, 0),), ()).possible
        tensor([[True]])
        """
        return int(self.possible.sum())

    def __repr__(self) -> str:
        return f"<Graph of {len(self.sources)} sources, {len(self.readers)} readers, {len(self)} edges>"

    @cached_property
    def _source_index(self) -> dict[str, int]:
        return {s.name: i for i, s in enumerate(self.sources)}

    @cached_property
    def _reader_index(self) -> dict[str, int]:
        return {r.name: i for i, r in enumerate(self.readers)}

    # ---- names

    def source(self, name: str) -> int:
        """The index of a source by its name, long or short. InputError names the nearest."""
        return _find(_long(name), self._source_index, "source", name)

    def reader(self, name: str) -> int:
        """The index of a reader; `5.7.k` of a grouped head is the key of its group."""
        full = _long(name)
        match = re.fullmatch(r"layers\.(\d+)\.attn\.heads\.(\d+)\.([kv])", full)
        if match and full not in self._reader_index and int(match[1]) < len(self.groups):
            layer, head = int(match[1]), int(match[2])
            full = f"layers.{layer}.attn.kv_heads.{head // self.groups[layer]}.{match[3]}"
        return _find(full, self._reader_index, "reader", name)

    def edge(self, name: str) -> tuple[int, int]:
        """The (source, reader) indices of `source -> reader`."""
        left, arrow, right = name.partition("->")
        if not arrow:
            raise InputError(f"{name!r} is no edge: expected 'source -> reader', such as 'embed -> logits'")
        source, reader = self.source(left.strip()), self.reader(right.strip())
        if not self.possible[source, reader]:
            raise InputError(f"there is no edge {name!r}: {self.sources[source].name} comes after its reader")
        return source, reader

    def name(self, source: int, reader: int) -> str:
        return f"{self.sources[source].name} -> {self.readers[reader].name}"

    def edges(self) -> Iterator[tuple[int, int]]:
        yield from self.possible.nonzero().tolist()

    # ---- which readers make which source

    def inputs_of(self, source: int) -> list[int]:
        """The readers a source's message is made from: a head's query and its group's key and value; an MLP's
        own."""
        return self._made[source]

    @cached_property
    def _made(self) -> list[list[int]]:
        made = []
        for s in self.sources:
            if s.kind == "head":
                kv = s.unit // self.groups[s.layer]
                wanted = {("q", s.unit), ("k", kv), ("v", kv)}
            else:
                wanted = {("mlp", -1)} if s.kind == "mlp" else set()
            made.append([i for i, r in enumerate(self.readers) if r.layer == s.layer and (r.kind, r.unit) in wanted])
        return made

    def nodes(self, names: Iterable[str]) -> set[int]:
        """Sources by name; `layers.3.attn` or `a3` means all heads of a layer."""
        found: set[int] = set()
        for name in names:
            whole = re.fullmatch(r"(?:layers\.(\d+)\.attn|a(\d+))", name)
            layer = whole and int(whole[1] or whole[2])
            heads = {i for i, s in enumerate(self.sources) if s.kind == "head" and s.layer == layer} if whole else set()
            found |= heads or {self.source(name)}
        return found


def sequential(block: Block) -> bool:
    """Whether the MLP reads what the attention of its block wrote (and not, in parallel, what the block was
    given)."""
    return "resid_mid" in block.taps


def check(block: Block) -> None:
    """Refused unless the block adds its heads and its MLP to the stream, and nothing else."""
    where = f"layer {block.index}"
    for part in ("attn.out", "attn.z_out", "resid_pre", "resid_post"):
        if part not in block.taps:
            why = block.refused.get(part, block.refused.get("resid", "it is not on the map"))
            raise Refused(f"circuits need {part!r} of {where}, which this model does not give: {why}")
    if len(block.states) != 1 or block.states[0].norm_in is not None:
        raise Refused(f"circuits need a residual stream that is a sum; {where} is {block.form}")
    terms = {t.source: t for t in block.states[0].terms}
    extra = set(terms) - {"in", "attn.out", "mlp.out"}
    if extra or any(t.carried for t in terms.values()):
        raise Refused(f"circuits know heads and MLPs; {where} also adds {', '.join(sorted(extra)) or 'mixed streams'}")
    if isinstance(terms["in"].coefficient, Tensor) or terms["in"].coefficient != 1.0:
        raise Refused(f"circuits need a residual stream that is carried unchanged; {where} scales it")


def _long(name: str) -> str:
    """Long names of the short ones.

    >>> _long("5.7.q"), _long("a5.h7"), _long("m3"), _long("logits")
    ('layers.5.attn.heads.7.q', 'layers.5.attn.heads.7', 'layers.3.mlp', 'logits')
    """
    name = re.sub(r"^a?(\d+)\.h?(\d+)", r"layers.\1.attn.heads.\2", name)
    return re.sub(r"^m(\d+)$", r"layers.\1.mlp", name)


def _find(full: str, known: dict[str, int], what: str, given: str) -> int:
    if full not in known:
        raise InputError(f"this graph has no {what} {given!r}{nearest(full, known)}")
    return known[full]
