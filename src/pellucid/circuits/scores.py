"""How much does each edge matter? One number per edge, and the circuits that cutting them off at some size
gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.circuits.circuit import Circuit
from pellucid.circuits.graph import Graph
from pellucid.circuits.question import Question
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Provenance, Result

By = Literal["size", "sign"]
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # those of the MIB benchmark


class EdgeScores(Result):
    """`score` [source, reader]: how much the metric falls when the edge is switched off (NaN where there is
    no edge).

    Positive edges support the answer, negative ones work against it. `error` is the standard error over
    prompts, and `each` [prompt, source, reader] the score on every prompt.
    """

    def __init__(self, graph: Graph, each: Tensor, kind: str, ablation: str, provenance: Provenance) -> None:
        self.graph, self.each, self.ablation = graph, each, ablation
        mean = each.mean(0)
        error = each.std(0) / len(each) ** 0.5 if len(each) > 1 else torch.full_like(mean, float("nan"))
        absent = ~graph.possible
        data = xr.Dataset(
            {
                n: (("source", "reader"), x.masked_fill(absent, float("nan")).numpy())
                for n, x in (("score", mean), ("error", error))
            },
            {"source": [s.name for s in graph.sources], "reader": [r.name for r in graph.readers]},
            {"ablation": ablation},
        )
        super().__init__(data, kind=kind, title=f"Edges by {kind}", provenance=provenance)

    @property
    def tensor(self) -> Tensor:
        """[source, reader], 0 where there is no edge."""
        return torch.from_numpy(np.nan_to_num(self.data["score"].values))

    def of(self, edge: str) -> float:
        return float(self.tensor[self.graph.edge(edge)])

    def circuit(
        self, n: int | None = None, *, fraction: float | None = None, by: By = "size", prune: bool = False
    ) -> Circuit:
        """The `n` first edges (or that fraction), by absolute size or by sign (the most supporting first)."""
        if (n is None) == (fraction is None):
            raise InputError("a circuit needs its size: give either n=100 edges or fraction=0.05")
        n = round(len(self.graph) * fraction) if fraction is not None else n
        circuit = ranked(self.graph, self.tensor, [n or 0], by, self.ablation, self.provenance)[0]
        return circuit.pruned() if prune else circuit

    def above(self, threshold: float) -> Circuit:
        """The edges whose absolute score exceeds a threshold."""
        on = (self.tensor.abs() > threshold) & self.graph.possible
        return Circuit(self.graph, on, self.tensor, self.ablation, self.provenance)


def ranked(
    graph: Graph, scores: Tensor, sizes: Sequence[int], by: By, ablation: str, provenance: Provenance
) -> list[Circuit]:
    """The circuits of the first edges of a ranking, one per size."""
    if by not in ("size", "sign"):
        raise InputError(f"cannot rank edges by {by!r}: expected 'size' or 'sign'")
    key = scores.abs() if by == "size" else scores
    flat = key.masked_fill(~graph.possible, -float("inf")).flatten()
    order = flat.argsort(descending=True, stable=True)
    made = []
    for n in sizes:
        on = torch.zeros_like(flat, dtype=torch.bool)
        on[order[: min(n, len(graph))]] = True
        made.append(Circuit(graph, on.reshape(scores.shape), scores, ablation, provenance))
    return made


def provenance(made_by: str, model: Model, question: Question, seed: int | None = None, **arguments: Any) -> Provenance:
    inputs = {"prompts": list(question.inputs.texts)}
    if question.reference is not None:
        inputs["reference"] = list(question.reference.texts)
    metric = {"metric": question.metric.name}
    return Provenance(made_by, model.name, digest=model.digest, inputs=inputs, arguments=metric | arguments, seed=seed)
