"""Where circuits of one graph are run on the judging prompts, each of them once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.causal.contrast import ask
from pellucid.circuits.ablation import How
from pellucid.circuits.circuit import touching
from pellucid.circuits.execution import Runner, capacity, chunks, wire
from pellucid.circuits.graph import Graph
from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.statistics import interval


class Bench:
    """Runs circuits of one graph on some prompts. InputError if the graph is not this model's."""

    def __init__(
        self, model: Model, graph: Graph, prompts: Any, metric: Any, how: How, reference: Any, seed: int
    ) -> None:
        self.model = model
        self.wiring = wire(model, graph.split)
        self.graph = self.wiring.graph
        if self.graph != graph:
            raise InputError("the circuit belongs to another model: its graph has other sources or readers")
        self.question = ask(model, prompts, metric, reference)
        self.runner = Runner.of(self.wiring, self.question, how, seed)
        self._known: dict[bytes, Tensor] = {}

    def each(self, masks: Sequence[Tensor]) -> Tensor:
        """The metric [mask, batch] of each circuit [source, reader]; the same mask is run once, whoever asks."""
        keys = [np.packbits(m.numpy()).tobytes() for m in masks]
        new = {k: m for k, m in zip(keys, masks, strict=True) if k not in self._known}
        for some in progress(chunks(list(new), min(4, capacity(self.runner))), "circuits run, a few at a time"):
            self._known |= zip(some, self.runner.scores(torch.stack([new[k] for k in some])).cpu(), strict=True)
        return torch.stack([self._known[k] for k in keys]) if keys else torch.zeros(0, len(self.question.inputs))

    def without(self, on: Tensor, sets: Sequence[Sequence[str]]) -> Tensor:
        """The metric [set, batch] of a circuit without the nodes of each set."""
        return self.each([on & ~self.gone(k) for k in sets])

    def gone(self, nodes: Sequence[str]) -> Tensor:
        """[source, reader] the edges that go with some nodes."""
        return touching(self.graph, self.graph.nodes(nodes))

    def slope(self, on: Tensor) -> Tensor:
        """[source, reader] the derivative of the mean metric by the mask, at a circuit."""
        mask = on.to(self.runner.replacements).requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.runner.scores(mask).mean(), mask)
        return found.cpu()


def gap(values: Tensor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The interval over prompts of the absolute mean of `values` [..., batch]."""
    x = values.detach().double().movedim(-1, 0).flatten(1).numpy()
    ends = interval(lambda w: np.abs(w @ x) / w.sum(1, keepdims=True), seed, n=len(x), within=(0, np.inf))
    return ends[0].reshape(values.shape[:-1]), ends[1].reshape(values.shape[:-1])
