"""Which edges survive when a mask over all of them is learnt to keep the answer with as few as possible?

    minimise over theta   mean ((m(masked model) - m(model)) / (m(model) - m(empty)))^2 + strength * expected
                          share on

A mask is a number between 0 (off: the edge brings its replacement) and 1 (on) per edge, or per node, which
then stands for all edges from it:

    "hard-concrete"   sampled at every step: s = sigmoid((logit(u) + theta) / b) stretched to [-.1, 1.1] and
                      clipped, so
                      that exact zeros and ones occur; P(on) = sigmoid(theta - b log(.1 / 1.1))   (Louizos et
                                                                                                  al. 2018;
                      edges: Bhaskar et al. 2024, nodes: Cao et al. 2021, subnetwork probing)
    "sigmoid"         s = sigmoid(theta), no sampling; the share on is its mean. Fractions can carry what
                      matters (a tenth of a message still saturates a softmax), so edges that are needed may
                      end below one half

The edges whose mask is above one half are the circuit. Edge pruning as published aims at a given sparsity by
Lagrange multipliers; here `strength` is the price of an edge, and several strengths give several sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pellucid.causal.contrast import ask
from pellucid.circuits.ablation import How
from pellucid.circuits.circuit import Circuit
from pellucid.circuits.execution import Runner, wire
from pellucid.circuits.graph import Split
from pellucid.errors import InputError
from pellucid.metrics import Metric
from pellucid.model import Model
from pellucid.technique import technique
from pellucid.training import train

LOW, HIGH, B = -0.1, 1.1, 2 / 3  # of the hard-concrete distribution
Mask = Literal["hard-concrete", "sigmoid"]
Unit = Literal["edge", "node"]


@dataclass(eq=False)
class Pruning:
    """An estimator in scikit-learn's manner: `fit` leaves `circuit_`, `mask_` [source, reader] and `losses_`
    [step].

    >>> Pruning(strength=0.5, steps=20).fit(model, prompts, how="resample").circuit_
    <Circuit of ... of 222 edges ...>
    """

    mask: Mask = "hard-concrete"
    unit: Unit = "edge"
    strength: float = 1.0
    steps: int = 200
    learning_rate: float = 0.1
    seed: int = 0
    circuit_: Circuit = field(init=False)
    mask_: Tensor = field(init=False)
    losses_: list[float] = field(init=False)

    def __post_init__(self) -> None:
        for value, known, what in ((self.mask, get_args(Mask), "mask"), (self.unit, get_args(Unit), "unit")):
            if value not in known:
                raise InputError(f"no {what} {value!r}: expected one of {', '.join(known)}")

    @technique
    def fit(
        self,
        model: Model,
        prompts: Any,
        metric: Metric | Any = None,
        *,
        how: How,
        reference: Any = None,
        split: Split | None = None,
    ) -> Pruning:
        """Learn the masks on some prompts. The model's weights are not touched. Judge the circuit on other
        prompts."""
        wiring = wire(model, split)
        question = ask(model, prompts, metric, reference)
        runner = Runner.of(wiring, question, how, self.seed)
        possible = wiring.graph.possible
        whole = runner.scores(torch.stack([possible, torch.zeros_like(possible)]))
        clean, scale = whole[0], (whole[0].mean() - whole[1].mean()).abs().clamp_min(1e-6)
        shape = possible.shape if self.unit == "edge" else (len(possible), 1)
        theta = torch.full(shape, 2.0, dtype=runner.replacements.dtype)
        generator = torch.Generator().manual_seed(self.seed)

        def loss(_: int, step: int) -> Tensor:
            on, share = self._sample(theta, generator)
            far = ((runner.scores(on.expand(possible.shape) * possible)[0] - clean) / scale).square().mean()
            return far + self.strength * (share.expand(possible.shape) * possible).sum() / possible.sum()

        adam = partial(torch.optim.Adam, lr=self.learning_rate)
        self.losses_ = train({"theta": theta}, range(self.steps), loss, adam, seed=self.seed, what="mask steps")
        self.mask_ = (self._settled(theta).expand(possible.shape) * possible).float()
        self.circuit_ = Circuit(wiring.graph, self.mask_ > 0.5, self.mask_, how)
        return self

    def _sample(self, theta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(a mask, the probability or share of each entry being on)"""
        if self.mask == "sigmoid":
            return theta.sigmoid(), theta.sigmoid()
        u = torch.rand(theta.shape, generator=generator, dtype=theta.dtype).clamp(1e-6, 1 - 1e-6)
        s = ((u.logit() + theta) / B).sigmoid() * (HIGH - LOW) + LOW
        return s.clamp(0, 1), (theta - B * math.log(-LOW / HIGH)).sigmoid()

    def _settled(self, theta: Tensor) -> Tensor:
        """The mask without noise."""
        if self.mask == "sigmoid":
            return theta.sigmoid()
        return (theta.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
