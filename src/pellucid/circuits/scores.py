"""How much does each edge matter? One number per edge, and the circuits that cutting them off at some size
gives.

    effect(s -> r) = metric(all edges on but s -> r) - metric(all edges on)

as everywhere in pellucid: negative where the edge supports the answer, positive where it works against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.causal.grid import described
from pellucid.circuits.circuit import Circuit
from pellucid.circuits.graph import Graph
from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.technique import technique

By = Literal["size", "sign"]
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # those of the MIB benchmark
EDGES = ("source", "reader")


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """`result` has the `effect` [source, reader] of switching each edge off (NaN where there is no edge), its `error`, the
    standard error over prompts, and `each` [prompt, source, reader], the effect on every prompt; with the graph, that is
    all there is, so `EdgeScores(Result.load(path))` is what was saved."""

    result: Result

    @classmethod
    def of(cls, graph: Graph, each: Tensor, kind: str, how: str) -> EdgeScores:
        """From effects `each` [prompt, source, reader] under `how` edges were switched off."""
        each = (each if each.dtype == torch.float64 else each.float()).masked_fill(~graph.possible, float("nan"))
        error = each.std(0) / len(each) ** 0.5 if len(each) > 1 else torch.full_like(each[0], float("nan"))
        columns = {"effect": (EDGES, each.mean(0)), "error": (EDGES, error), "each": (("prompt", *EDGES), each)}
        data = xr.Dataset(
            {name: (dims, values.numpy()) for name, (dims, values) in columns.items()},
            {"source": [s.name for s in graph.sources], "reader": [r.name for r in graph.readers]},
            {"how": how, "graph": graph.plain()},
        )
        return cls(Result(data, kind=kind, title=f"Edges by {kind}"))

    @cached_property
    def graph(self) -> Graph:
        return Graph.of_plain(self.result.data.attrs["graph"])

    @cached_property
    def each(self) -> Tensor:
        """[prompt, source, reader] effects, 0 where there is no edge."""
        return torch.from_numpy(np.nan_to_num(self.result["each"].values))

    @property
    def tensor(self) -> Tensor:
        """[source, reader] effects, 0 where there is no edge."""
        return torch.from_numpy(np.nan_to_num(self.result["effect"].values))

    @property
    def how(self) -> str:
        return str(self.result.data.attrs["how"])

    def of_edge(self, edge: str) -> float:
        """The effect of one edge by its name."""
        return float(self.tensor[self.graph.edge(edge)])

    def __repr__(self) -> str:
        return repr(self.result)

    def show(self) -> None:
        self.result.show()

    def save(self, path: str | Path) -> Path:
        """As a result is saved; `EdgeScores.load` gives these scores again, `Result.load` the numbers."""
        return self.result.save(path)

    @classmethod
    def load(cls, path: str | Path) -> EdgeScores:
        """Read what `save` wrote. InputError if the file is missing, damaged or something else."""
        found = Result.load(path)
        if not {"graph", "how"} <= found.data.attrs.keys():
            raise InputError(f"{str(path)!r} holds no scores of edges but {found.kind!r}: read it by Result.load")
        return cls(found)

    @technique
    def circuit(
        self, n: int | None = None, *, fraction: float | None = None, by: By = "size", prune: bool = False
    ) -> Circuit:
        """The `n` first edges (or that fraction), by absolute size or by sign (the most supporting first)."""
        if (n is None) == (fraction is None):
            raise InputError("a circuit needs its size: give either n=100 edges or fraction=0.05")
        n = round(len(self.graph) * fraction) if fraction is not None else n
        circuit = ranked(self.graph, -self.tensor, [n or 0], by, self.how)[0]
        return circuit.pruned() if prune else circuit

    @technique
    def above(self, threshold: float) -> Circuit:
        """The edges whose effect is larger in size than a threshold."""
        return Circuit(self.graph, (self.tensor.abs() > threshold) & self.graph.possible, -self.tensor, self.how)

    @technique
    def tested(self, seed: int = 0) -> Result:
        """`effect` with its interval over prompts, and `p` of a sign-flip test corrected for the number of edges."""
        there = self.graph.possible.numpy()
        columns: dict[str, Any] = {}
        for name, values in described("effect", self.each.numpy()[:, there], seed, test=True).items():
            columns[name] = np.full(there.shape, np.nan)
            columns[name][there] = values
        data = xr.Dataset({n: (EDGES, x) for n, x in columns.items()}, {d: self.result[d].values for d in EDGES})
        return Result(data, kind=f"{self.result.kind}, tested", title=self.result.title)


def ranked(graph: Graph, support: Tensor, sizes: Sequence[int], by: By, how: str) -> list[Circuit]:
    """The circuits of the first edges by how much they support the answer, one per size."""
    if by not in ("size", "sign"):
        raise InputError(f"cannot rank edges by {by!r}: expected 'size' or 'sign'")
    key = support.abs() if by == "size" else support
    flat = key.masked_fill(~graph.possible, -float("inf")).flatten()
    order = flat.argsort(descending=True, stable=True)
    made = []
    for n in sizes:
        on = torch.zeros_like(flat, dtype=torch.bool)
        on[order[: min(n, len(graph))]] = True
        made.append(Circuit(graph, on.reshape(support.shape), support, how))
    return made
