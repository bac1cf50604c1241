"""Who can send what to whom inside a model, and which of these edges are in the circuit?

Sources write messages into the residual stream: the embedding, every head, every MLP (and every mixer that has
no heads). Readers take the stream in: the query, key and value of every head, every MLP, and the logits. An
edge is a source and a reader that comes after it:

    layers.0.attn.heads.1 -> layers.5.attn.heads.7.q        layers.3.mlp -> logits        embed -> layers.0.mlp

With grouped queries a key or value is read once for its group: `layers.5.attn.kv_heads.2.k`. Short names are
understood: `5.7` or `a5.h7` is a head, `5.7.q` its query, `m3` an MLP. A graph is two axes, sources and
readers, both in the order of the pass; a circuit is a matrix [source, reader] over them (as in Hanna et al.
2024, EAP-IG).

In an encoder-decoder the keys and values of cross-attention (`decoder.layers.0.cross.heads.1.k`) read what the
encoder wrote, everything else what its own stack wrote. `Split` takes nodes further apart: the embedding into
tables, some neurons off their MLP, and every node by position, so that `5.7@S2` is a node of its own (Haklay et
al. 2025).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid.errors import InputError, nearest

REST = "rest"


@dataclass(frozen=True)
class Split:
    """How far nodes are taken apart.

    embedding: "parts" makes one source of each embedding table.
    neurons: sites such as "layers.3.mlp.neurons.17" that become sources of their own; they are heard apart,
        while what they read is read by their MLP.
    positions: addresses as after `@` in a site: "S2" (a span of the prompts), -1, "2:6"; nodes are parted by
        these and the "rest", and an edge joins nodes of one position (attention is what moves between them).
    """

    embedding: Literal["whole", "parts"] = "whole"
    neurons: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.embedding not in ("whole", "parts"):
            raise InputError(f"cannot split the embedding by {self.embedding!r}: expected 'whole' or 'parts'")
        for name in ("neurons", "positions"):
            given = getattr(self, name)
            values = (given,) if isinstance(given, (str, int)) else given
            object.__setattr__(self, name, tuple(str(v).removeprefix("@") for v in values))

    @property
    def places(self) -> tuple[str, ...]:
        """The positions nodes are parted by, with the rest; empty where they are not."""
        return (*self.positions, REST) if self.positions else ()


@dataclass(frozen=True)
class Source:
    """Something that writes to the residual stream. `kind`: "embed", "head", "mlp", "neuron" or "mixer".

    `unit` is the head (or neuron), `kv` the key-value head it attends with, `part` the attention ("attn" or
    "cross"), `depth` the block counted through all stacks (-1: before the first).
    """

    name: str
    kind: str
    layer: int = -1
    unit: int = -1
    kv: int = -1
    part: str = ""
    stack: str = ""
    depth: int = -1
    position: str = ""


@dataclass(frozen=True)
class Reader:
    """Something that reads the residual stream: what the sources from `first` up to `feeds` wrote. `kind`: "q",
    "k", "v", "mlp", "mixer" or "logits"."""

    name: str
    kind: str
    feeds: int
    layer: int
    unit: int = -1
    part: str = ""
    stack: str = ""
    first: int = 0
    depth: int = -1
    position: str = ""


@dataclass(frozen=True)
class Graph:
    """All sources and readers of a model, split as `split` says."""

    sources: tuple[Source, ...]
    readers: tuple[Reader, ...]
    split: Split = field(default_factory=Split)

    def parted(self) -> Graph:
        """With every node once for each position of the split; [source, position] and [reader, position] in order."""
        places = self.split.places
        if not places or self.sources[0].position:
            return self
        n = len(places)
        sources = tuple(replace(s, name=f"{s.name}@{p}", position=p) for s in self.sources for p in places)
        readers = tuple(
            replace(r, name=f"{r.name}@{p}", position=p, first=n * r.first, feeds=n * r.feeds)
            for r in self.readers
            for p in places
        )
        return Graph(sources, readers, self.split)

    # ---- as plain values, to be kept

    def plain(self) -> dict[str, Any]:
        return {"sources": [dict(vars(s)) for s in self.sources], "readers": [dict(vars(r)) for r in self.readers],
                "split": asdict(self.split)}  # fmt: skip

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Graph:
        """What `plain` gave. KeyError or TypeError for anything else."""
        sources, readers = (Source(**s) for s in values["sources"]), (Reader(**r) for r in values["readers"])
        return cls(tuple(sources), tuple(readers), Split(**values["split"]))

    # ---- sizes

    @cached_property
    def possible(self) -> Tensor:
        """[source, reader] whether the source comes before the reader, at the same position.

        >>> Graph((Source("embed", "embed"),), (Reader("logits", "logits", 1, 0),)).possible
        tensor([[True]])
        """
        index = torch.arange(len(self.sources))[:, None]
        found = (index >= torch.tensor([r.first for r in self.readers])) & (
            index < torch.tensor([r.feeds for r in self.readers])
        )
        if self.split.places and self.sources[0].position:
            place = {p: i for i, p in enumerate(self.split.places)}
            here, there = (torch.tensor([place[n.position] for n in nodes]) for nodes in (self.sources, self.readers))
            found = found & (here[:, None] == there[None])
        return found

    def __len__(self) -> int:
        """How many edges there are."""
        return self._size

    @cached_property
    def _size(self) -> int:
        return int(self.possible.sum())

    def __repr__(self) -> str:
        return f"<Graph of {len(self.sources)} sources, {len(self.readers)} readers, {len(self)} edges>"

    @cached_property
    def depth(self) -> int:
        """How many blocks there are, through all stacks."""
        return self.readers[-1].depth

    # ---- masks by position

    def fold(self, mask: Tensor) -> Tensor:
        """[..., source, reader, position] over nodes without position, from [..., source, reader]."""
        n = len(self.split.places)
        if not n:
            return mask[..., None]
        s, r = len(self.sources) // n, len(self.readers) // n
        return mask.reshape(*mask.shape[:-2], s, n, r, n).diagonal(dim1=-3, dim2=-1)

    def unfold(self, mask: Tensor) -> Tensor:
        """The inverse of `fold`, with zeros where there is no edge."""
        n = len(self.split.places)
        if not n:
            return mask[..., 0]
        wide = torch.diag_embed(mask, dim1=-3, dim2=-1)  # [..., source, position, reader, position]
        return wide.flatten(-4, -3).flatten(-2)

    # ---- names

    @cached_property
    def _source_index(self) -> dict[str, int]:
        return {s.name: i for i, s in enumerate(self.sources)}

    @cached_property
    def _reader_index(self) -> dict[str, int]:
        return {r.name: i for i, r in enumerate(self.readers)}

    def source(self, name: str) -> int:
        """The index of a source by its name, long or short. InputError names the nearest."""
        return _find(_long(name), self._source_index, "source", name)

    def reader(self, name: str) -> int:
        """The index of a reader; `5.7.k` of a grouped head is the key of its group."""
        full = _long(name)
        match = re.fullmatch(r"(.*\.)(heads\.\d+)\.([kv])(@.+)?", full)
        if match and full not in self._reader_index:
            owner = self._source_index.get(f"{match[1]}{match[2]}{match[4] or ''}")
            if owner is not None:
                full = f"{match[1]}kv_heads.{self.sources[owner].kv}.{match[3]}{match[4] or ''}"
        return _find(full, self._reader_index, "reader", name)

    def edge(self, name: str) -> tuple[int, int]:
        """The (source, reader) indices of `source -> reader`."""
        left, arrow, right = name.partition("->")
        if not arrow:
            raise InputError(f"{name!r} is no edge: expected 'source -> reader', such as 'embed -> logits'")
        source, reader = self.source(left.strip()), self.reader(right.strip())
        if not self.possible[source, reader]:
            s, r = self.sources[source], self.readers[reader]
            why = "stands at another position than" if s.position != r.position else "comes after"
            why = "is not in the stream of" if source < r.first else why
            raise InputError(f"there is no edge {name!r}: {s.name} {why} its reader")
        return source, reader

    def name(self, source: int, reader: int) -> str:
        return f"{self.sources[source].name} -> {self.readers[reader].name}"

    def edges(self) -> Iterator[tuple[int, int]]:
        yield from self.possible.nonzero().tolist()

    def nodes(self, names: Iterable[str]) -> set[int]:
        """Sources by name; `layers.3.attn` or `a3` means all heads of a layer, a name without position all
        positions."""
        found: set[int] = set()
        for name in names:
            full = re.sub(r"^a(\d+)$", r"layers.\1.attn", _long(name))
            alike = self._named.get(full)
            found |= alike if alike else {self.source(name)}
        return found

    @cached_property
    def _named(self) -> dict[str, set[int]]:
        """The names of several sources at once: an attention's heads, a node's positions."""
        found: dict[str, set[int]] = {}
        for i, s in enumerate(self.sources):
            plain = s.name.partition("@")[0]
            for name in {plain, plain.partition(".heads.")[0]}:
                found.setdefault(name, set()).add(i)
        return found

    # ---- which readers make which source

    def inputs_of(self, source: int) -> list[int]:
        """The readers a source's message is made from: a head's query and its group's key and value; an MLP's
        own. At a position: the query there, keys and values anywhere."""
        return self._made[source]

    def owners(self, reader: int) -> list[int]:
        """The sources that are made from what this reader reads; none for the logits."""
        return self._owned[reader]

    @cached_property
    def _made(self) -> list[list[int]]:
        at: dict[tuple[int, str, str, int], list[int]] = {}
        for i, r in enumerate(self.readers):
            at.setdefault((r.depth, r.part, r.kind, r.unit), []).append(i)
        made = []
        for s in self.sources:
            wanted = {
                "head": (("q", s.unit), ("k", s.kv), ("v", s.kv)),
                "mlp": (("mlp", -1),),
                "neuron": (("mlp", -1),),
                "mixer": (("mixer", -1),),
            }.get(s.kind, ())
            found = [i for kind, unit in wanted for i in at.get((s.depth, s.part, kind, unit), ())]
            made.append([
                i for i in found
                if self.readers[i].position == s.position or self.readers[i].kind in ("k", "v", "mixer")
            ])  # fmt: skip
        return made

    @cached_property
    def _owned(self) -> list[list[int]]:
        owned: list[list[int]] = [[] for _ in self.readers]
        for i, readers in enumerate(self._made):
            for r in readers:
                owned[r].append(i)
        return owned


def _long(name: str) -> str:
    """Long names of the short ones.

    >>> _long("5.7.q"), _long("a5.h7"), _long("m3@S2"), _long("logits")
    ('layers.5.attn.heads.7.q', 'layers.5.attn.heads.7', 'layers.3.mlp@S2', 'logits')
    """
    name = re.sub(r"^((?:encoder|decoder)\.)?a?(\d+)\.h?(\d+)", r"\1layers.\2.attn.heads.\3", name)
    return re.sub(r"^((?:encoder|decoder)\.)?m(\d+)(?=@|$)", r"\1layers.\2.mlp", name)


def _find(full: str, known: dict[str, int], what: str, given: str) -> int:
    if full not in known:
        raise InputError(f"this graph has no {what} {given!r}{nearest(full, known)}")
    return known[full]
