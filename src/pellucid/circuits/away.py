"""Circuits where `pl.on` says: masks that are run, and edges that are attributed, as errands (`pellucid.workers.errand`).

Masks travel as the edges that are off, and the logits that the metric reads come back; so the metric may be any function. An
attribution needs its gradient: there it is one of `pl.metrics`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.causal.contrast import Asked
from pellucid.circuits.ablation import How
from pellucid.circuits.execution import Runner, wire
from pellucid.circuits.graph import Split
from pellucid.circuits.passing import Score
from pellucid.model import Model
from pellucid.workers.errand import Errand, Tensors, Values, Work, done
from pellucid.workers.job import Read, get_inputs, get_reads, put_inputs, put_reads

FEW = 500  # edges that are written one by one


class Circuits(Work):
    """Runs circuits; a piece is masks, packed bits in base64."""

    errand = "circuits"

    def __init__(self, model: Model, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        question = get_question(model, about, tensors, get_reads(about["reads"], tensors))
        self.runner = Runner.of(wire(model, get_split(about)), question, about["how"], about["seed"])
        self.score = self.runner.score

    @classmethod
    def of(cls, runner: Runner) -> Circuits:
        """Of a runner that is there, whose metric is not asked."""
        made, question = cls.__new__(cls), runner.question
        metric = question.metric
        made.runner = runner
        reads: Any = Read(metric.positions, metric.tokens, metric.classes)
        made.score = Score(runner.wiring, question.inputs, reads)
        return made

    def first(self) -> Tensors:
        return self({"masks": [pack(self.runner.wiring.graph.possible, self.runner.wiring.graph.possible)]})

    def __call__(self, piece: Mapping[str, Any]) -> Tensors:
        """What the metric reads under each mask [mask, batch, ...]."""
        on = torch.stack([unpack(mask, self.runner.wiring.graph.possible) for mask in piece["masks"]])
        with torch.no_grad():
            read = self.score(*self.runner.run(on, whole=self.score.whole))
        return {"read": read.cpu()}


def scored(runner: Runner, how: How, seed: int, groups: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
    """The metric [mask, batch] of each group of masks, in order."""
    question, graph = runner.question, runner.wiring.graph

    def values() -> Values:
        about, tensors = put_question(question, graph.split)
        return {**about, "reads": put_reads(question.metric, tensors), "how": how, "seed": seed}, tensors

    errand = Errand(runner.wiring.model, "circuits.away:Circuits", values, Circuits.of(runner))
    pieces = ({"masks": [pack(mask, graph.possible) for mask in group]} for group in groups)
    for _, found in done(errand, pieces):
        yield torch.stack([question.metric(read) for read in found["read"]])


# ---- values


def put_question(question: Asked, split: Split) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The prompts and what they are contrasted with; not the metric."""
    tensors: dict[str, Tensor] = {}
    reference = None if question.reference is None else put_inputs(question.reference, tensors)
    return {"inputs": put_inputs(question.inputs, tensors), "reference": reference, "split": asdict(split)}, tensors


def get_question(model: Model, about: Mapping[str, Any], tensors: Mapping[str, Tensor], metric: Any) -> Asked:
    reference = None if about["reference"] is None else get_inputs(about["reference"], tensors, model)
    return Asked(get_inputs(about["inputs"], tensors, model), reference, metric)


def get_split(about: Mapping[str, Any]) -> Split:
    return Split(**about["split"])


def pack(on: Tensor, possible: Tensor) -> str | list[list[int]]:
    """A mask as the edges that are off, or, where these are many, as its bits.

    >>> pack(torch.tensor([[True, False]]), torch.ones(1, 2, dtype=torch.bool))
    [[0, 1]]
    """
    off = (possible & ~on).nonzero()
    return off.tolist() if len(off) <= FEW else base64.b64encode(np.packbits(on.cpu().numpy()).tobytes()).decode()


def unpack(said: str | list[list[int]], possible: Tensor) -> Tensor:
    if isinstance(said, str):
        bits = np.unpackbits(np.frombuffer(base64.b64decode(said), np.uint8), count=possible.numel())
        return torch.from_numpy(bits.astype(bool)).view(possible.shape)
    on = possible.clone()
    for source, reader in said:
        on[source, reader] = False
    return on
