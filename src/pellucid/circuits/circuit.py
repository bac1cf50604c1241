"""A circuit: a set of edges with their scores, and where it came from. Saved as JSON, compared, drawn,
walked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pellucid.circuits.graph import Graph
from pellucid.errors import InputError
from pellucid.results import Provenance

if TYPE_CHECKING:
    import networkx  # type: ignore[import-untyped]
    import pandas as pd

FORMAT = {"format": "pellucid-circuit", "version": 1}


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges that are on: `on` [source, reader], `how` the rest is switched off, and `scores`: how much each supports the
    answer (0 where nobody measured it; minus its effect where `EdgeScores` did). `attrs` are what finding it cost."""

    graph: Graph
    on: Tensor
    scores: Tensor
    how: str = ""
    attrs: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("circuit"))

    # ---- making one

    @classmethod
    def from_edges(cls, graph: Graph, edges: Iterable[str], **about: Any) -> Circuit:
        """From names such as `embed -> layers.0.mlp`. InputError for an edge that the graph does not have."""
        on = torch.zeros_like(graph.possible)
        for name in edges:
            on[graph.edge(name)] = True
        return cls(graph, on, torch.zeros(on.shape), **about)

    @classmethod
    def from_nodes(cls, graph: Graph, nodes: Iterable[str], *, mlps: bool = True, **about: Any) -> Circuit:
        """All edges among some heads (`9.9`, `layers.9.attn`), the embedding, the logits and, with `mlps`,
        every MLP."""
        kept = graph.nodes(nodes) | {
            i for i, s in enumerate(graph.sources) if s.kind == "embed" or (mlps and s.kind != "head")
        }
        return cls(graph, among(graph, kept), torch.zeros(graph.possible.shape), **about)

    @classmethod
    def whole(cls, graph: Graph, **about: Any) -> Circuit:
        return cls(graph, graph.possible.clone(), torch.zeros(graph.possible.shape), **about)

    # ---- reading it

    def __len__(self) -> int:
        return int(self.on.sum())

    def __contains__(self, edge: str) -> bool:
        return bool(self.on[self.graph.edge(edge)])

    def __repr__(self) -> str:
        size = f"{len(self)} of {len(self.graph)} edges ({self.fraction:.1%})"
        return f"<Circuit of {size}, {len(self.nodes)} nodes>"

    @property
    def fraction(self) -> float:
        return len(self) / len(self.graph)

    @property
    def edges(self) -> list[str]:
        """Names, strongest first."""
        found = self.on.nonzero().tolist()
        found.sort(key=lambda e: -abs(float(self.scores[tuple(e)])))
        return [self.graph.name(s, r) for s, r in found]

    @property
    def nodes(self) -> list[str]:
        """Sources that are heard, or that read what no heard source reads; in the order of the pass."""
        heard, reading = self.on.any(1).tolist(), self.on.any(0).tolist()
        idle = {
            i for r, read in enumerate(reading) if read for i in self.graph.owners(r)
            if not any(heard[o] for o in self.graph.owners(r))
        }  # fmt: skip
        return [s.name for i, s in enumerate(self.graph.sources) if heard[i] or i in idle]

    @property
    def heads(self) -> list[str]:
        return [n for n in self.nodes if ".heads." in n]

    def table(self) -> pd.DataFrame:
        """One row per edge: source, reader, score."""
        import pandas as pd

        rows = [
            (self.graph.sources[s].name, self.graph.readers[r].name, float(self.scores[s, r]))
            for s, r in self.on.nonzero()
        ]
        return pd.DataFrame(rows, columns=["source", "reader", "score"]).sort_values("score", key=abs, ascending=False)

    # ---- changing it

    def pruned(self) -> Circuit:
        """Without edges that lie on no path from the embedding to the logits."""
        on, before = self.on.clone(), -1
        while before != int(on.sum()):
            before = int(on.sum())
            for i, source in enumerate(self.graph.sources):
                if source.kind == "embed":
                    continue
                inputs = self.graph.inputs_of(i)
                if not bool(on[:, inputs].any()):
                    on[i] = False
            for r, reader in enumerate(self.graph.readers):
                if reader.kind != "logits" and not any(bool(on[i].any()) for i in self.graph.owners(r)):
                    on[:, r] = False
        return replace(self, on=on)

    def without(self, nodes: Iterable[str]) -> Circuit:
        """Without everything some nodes write, and what only they read."""
        gone = self.graph.nodes(nodes)
        return replace(self, on=self.on & ~touching(self.graph, gone))

    def jaccard(self, other: Circuit) -> float:
        """Shared edges as a share of all edges of either; 1.0 for two empty circuits."""
        union = int((self.on | other.on).sum())
        return int((self.on & other.on).sum()) / union if union else 1.0

    # ---- keeping it

    def save(self, path: str | Path) -> Path:
        """One JSON file: the graph's nodes, the edges with their scores, the provenance (but not arrays it was given)."""
        edges = [[s, r, float(self.scores[s, r])] for s, r in self.on.nonzero().tolist()]
        named = [self.graph.name(s, r) for s, r, _ in edges]
        about = {**FORMAT, "how": self.how, "attrs": self.attrs, "provenance": self.provenance.as_dict()}
        Path(path).write_text(
            json.dumps({**about, **self.graph.plain(), "edges": edges, "names": named}, allow_nan=False)
        )
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote. InputError if the file is missing, damaged or something else."""
        try:
            about = json.loads(Path(path).read_text())
            if {k: about.get(k) for k in FORMAT} != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            graph = Graph.of_plain(about)
            on, scores = torch.zeros_like(graph.possible), torch.zeros(graph.possible.shape)
            for s, r, score in about["edges"]:
                on[s, r], scores[s, r] = True, score
            return cls(graph, on, scores, about["how"], about["attrs"], Provenance(**about["provenance"]))
        except OSError as error:
            raise InputError(f"cannot read a circuit from {str(path)!r}: {error.strerror or error}") from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"{str(path)!r} is no readable pellucid circuit ({error}); save it anew") from None

    def to_networkx(self) -> networkx.MultiDiGraph:
        """Nodes are sources and the logits; edges carry `port` (q, k, v, mlp, logits) and `score`."""
        import networkx

        made = networkx.MultiDiGraph(how=self.how)
        made.add_nodes_from(
            (s.name, {"kind": s.kind, "layer": s.layer}) for s in self.graph.sources if s.name in set(self.nodes)
        )
        for s, r in self.on.nonzero().tolist():
            reader = self.graph.readers[r]
            for owner in [self.graph.sources[i].name for i in self.graph.owners(r)] or ["logits"]:
                made.add_edge(self.graph.sources[s].name, owner, port=reader.kind, score=float(self.scores[s, r]))
        return made


def touching(graph: Graph, nodes: set[int]) -> Tensor:
    """[source, reader] every edge a node writes to, or that nobody but these nodes reads."""
    found = torch.zeros_like(graph.possible)
    found[list(nodes)] = True
    readers = {r for n in nodes for r in graph.inputs_of(n)}
    found[:, [r for r in readers if set(graph.owners(r)) <= nodes]] = True
    return found & graph.possible


def among(graph: Graph, nodes: set[int]) -> Tensor:
    """[source, reader] every edge from one of these nodes to another, or to the logits."""
    found = torch.zeros_like(graph.possible)
    readers = sorted(
        {r for n in nodes for r in graph.inputs_of(n)} | {i for i, r in enumerate(graph.readers) if r.kind == "logits"}
    )
    found[torch.tensor(sorted(nodes))[:, None], torch.tensor(readers)] = True
    return found & graph.possible
