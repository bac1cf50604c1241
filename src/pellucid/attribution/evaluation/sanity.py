"""Does an attribution depend on what it is said to explain?

Weights      The model's weights are drawn anew from the top down: the head, then block after block, at last the embedding
             (cascading randomisation, Adebayo et al. 2018). An attribution of the trained model that is much like that of
             a random one shows the input or the architecture, not what was learnt.
Target       The same prompt is explained for another answer drawn at random (Sixt et al. 2020). If that gives the same
             scores, they do not explain the answer.
Labels       The model is compared with one trained alike on shuffled labels (Adebayo et al. 2018).
Twin         A functionally equal model with other weights must get the same attributions (implementation invariance,
             Sundararajan et al. 2017). The twin here looks its tokens up in another basis: E = (E A) A^-1, so that
             gradients with respect to what the embedding hands out are others, and what they say about tokens should not be.

The first three report Spearman's correlation of the scores with those of the intact model, signed and in size (`magnitude`);
near 0 passes. Weights are drawn from a normal distribution with each tensor's own mean and deviation, in changed models
(`pellucid.controls`); parameters outside blocks go with the last block registered before them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pellucid.attribution.case import Case
from pellucid.attribution.evaluation.agreement import mean_over_prompts
from pellucid.attribution.evaluation.scores import Method, explain, methods_named, read_scores
from pellucid.attribution.players import Players
from pellucid.changed import Change
from pellucid.controls import redrawn
from pellucid.corpus import read_each
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval, spearman
from pellucid.technique import technique

Methods = Mapping[str, Method] | Sequence[str] | None
SAME = 1e-3  # how far the logits of two equal models may be apart, relative to the largest


@technique
def weight_randomisation(
    model: Model,
    prompts: Sequence[Any],
    target: Any = None,
    *,
    methods: Methods = None,
    against: Any = None,
    players: Any = "token",
    seed: int = 0,
) -> Result:
    """Explain prompts again and again while the weights are lost from the top down.

    Gives `correlation` and `magnitude` [technique, depth], means over prompts with 95 % bootstrap intervals (`_low`, `_high`); `depth` names what was drawn anew
    last. Refused for a method that is refused on the model, and for quantised weights.
    """
    asked = _Asked(model, prompts, target, against, players, methods_named(methods))
    before, lost, found = asked.scores(model), model, []
    layers = layers_from_the_top(model)
    for depth, (_, parameters) in enumerate(layers):
        lost = redrawn(lost, parameters, seed + depth)
        found.append(_similarity(before, asked.scores(lost)))
    return asked.result("Weight randomisation", "depth", [name for name, _ in layers], found, seed)


@technique
def target_randomisation(
    model: Model,
    prompts: Sequence[Any],
    target: Any = None,
    *,
    methods: Methods = None,
    players: Any = "token",
    draws: int = 3,
    seed: int = 0,
) -> Result:
    """Explain prompts for other answers, drawn at random: `correlation` and `magnitude` [technique, draw] as above."""
    asked = _Asked(model, prompts, target, None, players, methods_named(methods))
    rng, before = np.random.default_rng(seed), asked.scores(model)
    found = []
    for _ in range(draws):
        others = [_other(case, rng) for case in asked.cases]
        found.append(_similarity(before, asked.scores(model, others)))
    return asked.result("Target randomisation", "draw", list(range(draws)), found, seed)


@technique
def label_randomisation(
    model: Model,
    control: Model,
    prompts: Sequence[Any],
    target: Any = None,
    *,
    methods: Methods = None,
    players: Any = "token",
    seed: int = 0,
) -> Result:
    """Compare a classifier with `control`, one trained alike on shuffled labels: `correlation` and `magnitude` [technique,
    control]. By default the class the model chooses is explained in both. InputError if they cut prompts otherwise."""
    asked = _Asked(model, prompts, target, None, players, methods_named(methods))
    for prompt, case in zip(prompts, asked.cases, strict=True):
        if not torch.equal(
            control.inputs(prompt).stream("encoder").ids[0].cpu(), case.inputs.stream("encoder").ids[0].cpu()
        ):
            raise InputError(f"{control.name} cuts the prompts into other tokens than {model.name}")
    found = _similarity(asked.scores(model), asked.scores(control))
    return asked.result("Label randomisation", "control", [control.name], [found], seed)


@technique
def implementation_invariance(
    model: Model,
    prompts: Sequence[Any],
    target: Any = None,
    *,
    methods: Methods = None,
    twin: Model | None = None,
    against: Any = None,
    players: Any = "token",
    seed: int = 0,
) -> Result:
    """Explain prompts on a functionally equal model (by default `reparametrised(model)`).

    Gives `deviation` [technique], the largest over prompts of max |phi - phi'| / max |phi|: 0 for an invariant method. What
    draws at random must be given the same seed for both, as methods are by default. InputError if the models differ.
    """
    twin = reparametrised(model, seed) if twin is None else twin
    asked = _Asked(model, prompts, target, against, players, methods_named(methods))
    for case in asked.cases:
        with torch.no_grad():
            here, there = (m.run(case.inputs).logits for m in (model, twin))
        apart, fine = (here.double() - there.double()).abs().max(), max(SAME, 8 * torch.finfo(here.dtype).eps)
        if float(apart) > fine * max(1.0, float(here.abs().max())):
            raise InputError(f"{twin.name} is another function than {model.name}: their logits differ")
    one, two = asked.scores(model), asked.scores(twin)
    sizes = [[np.abs(a).max() for a in row] for row in one]
    gaps = [[np.abs(a - b).max() for a, b in zip(x, y, strict=True)] for x, y in zip(one, two, strict=True)]
    data = xr.Dataset(
        {"deviation": ("technique", (np.array(gaps) / np.maximum(np.array(sizes), 1e-12)).max(0))},
        coords={"technique": list(asked.methods)},
    )
    return Result(data, kind="sanity", title="Attributions of a functionally equal model")


# ---- explaining


class _Asked:
    """What is explained: prompts, the targets of the intact model, players, methods."""

    def __init__(
        self, model: Model, prompts: Sequence[Any], target: Any, against: Any, players: Any, methods: dict[str, Method]
    ) -> None:
        if isinstance(prompts, str) or not len(prompts):
            raise InputError("give a list of prompts, one at least")
        read_each(model, list(prompts))
        self.model, self.prompts, self.against, self.players, self.methods = model, prompts, against, players, methods
        self.cases = [Case.of(model, prompt, target, against=against) for prompt in prompts]
        self.targets = [case.question.metric if target is None else target for case in self.cases]
        self.parts = [Players.of(case, players) for case in self.cases]

    def scores(self, model: Model, targets: Sequence[Any] | None = None) -> list[list[np.ndarray]]:
        """[prompt][method] arrays [player]."""
        rows = zip(self.prompts, targets or self.targets, self.cases, self.parts, strict=True)
        return [
            [
                read_scores(case, parts, explain(method, model, prompt, target, self.against, self.players))
                for method in self.methods.values()
            ]
            for prompt, target, case, parts in rows
        ]

    def result(self, check: str, dim: str, labels: list[Any], found: list[np.ndarray], seed: int) -> Result:
        """found: for each label [prompt, method, measure]."""
        by_prompt = np.stack(found, 1)
        low, high = interval(by_prompt, seed)
        variables = {}
        for ending, values in (("", mean_over_prompts(by_prompt)), ("_low", low), ("_high", high)):
            for i, name in enumerate(("correlation", "magnitude")):
                variables[name + ending] = (("technique", dim), values[..., i].T)
        data = xr.Dataset(variables, coords={"technique": list(self.methods), dim: labels})
        title = f"{check} on {len(self.prompts)} prompts: correlation with the intact model"
        return Result(data, kind="sanity", title=title)


def _similarity(one: list[list[np.ndarray]], two: list[list[np.ndarray]]) -> np.ndarray:
    """[prompt, method, (signed, in size)]"""
    return np.array(
        [
            [(spearman(a, b), spearman(np.abs(a), np.abs(b))) for a, b in zip(x, y, strict=True)]
            for x, y in zip(one, two, strict=True)
        ]
    )


def _other(case: Case, rng: np.random.Generator) -> int:
    """A class or a token drawn at random, not the one the model would choose."""
    question = case.question
    if question.kind in ("label", "span", "value") or question.metric is None:
        raise InputError(f"another answer is drawn among tokens or classes, and this question is of a {question.kind}")
    with torch.no_grad():
        row = question.rows(case.model.run(case.inputs))[0]
    if len(row) < 2:
        raise InputError(f"{case.model.name} gives one number: there is no other answer to explain")
    chosen = int(row.argmax())
    return int(rng.choice([i for i in range(len(row)) if i != chosen]))


# ---- other weights


def layers_from_the_top(model: Model) -> list[tuple[str, list[str]]]:
    """Names of the parameters of the head, of each block from the last to the first, and of the embedding."""
    blocks = {
        block.module: f"{stack.prefix}layers.{block.index}" for stack in model.anatomy.stacks for block in stack.blocks
    }
    groups: dict[str, list[str]] = {"embedding": []}
    last = [name for name, _ in model.module.named_parameters() if _block_of(name, blocks)][-1:]
    current, passed = "embedding", False
    for name, _ in model.module.named_parameters():
        own = _block_of(name, blocks)
        current = own or ("head" if passed else current)
        passed = passed or name in last
        groups.setdefault(current, []).append(name)
    return [(name, parameters) for name, parameters in reversed(groups.items()) if parameters]


def _block_of(name: str, blocks: Mapping[str, str]) -> str | None:
    return next((label for module, label in blocks.items() if name.startswith(f"{module}.")), None)


class Factored(nn.Module):
    """An embedding in another basis, turned back where it is used."""

    back: Tensor

    def __init__(self, table: Any, basis: Tensor) -> None:
        super().__init__()
        self.table = copy.deepcopy(table)
        weight = table.weight.detach()
        self.table.weight = nn.Parameter((weight.double() @ basis).to(weight))
        self.register_buffer("back", torch.linalg.inv(basis))

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.table.weight
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        looked_up: Tensor = self.table(ids)
        return (looked_up.double() @ self.back).to(looked_up)


@dataclass(frozen=True, eq=False, repr=False)
class Reparametrised(Change):
    """The embedding stored in another basis: turned, and stretched by up to 2."""

    seed: int = 0

    def apply(self, tree: Any) -> None:
        table = tree.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise Refused("this model has no embedding module whose basis could be changed")
        d = table.weight.shape[1]
        generator = torch.Generator().manual_seed(self.seed)
        turned, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
        stretched = torch.exp2(torch.rand(d, generator=generator, dtype=torch.float64) * 2 - 1)
        tree.set_input_embeddings(Factored(table, (turned * stretched).to(table.weight.device)))


def reparametrised(model: Model, seed: int = 0) -> Model:
    """The same function, whose embedding is stored in another basis (turned, and stretched by up to 2). Refused for a model
    without an embedding module that can be exchanged."""
    made = model.changed(Reparametrised(seed))
    for (
        stack
    ) in made.anatomy.stacks:  # a lookup that is turned back counts as one layer: the twin's own vectors lie inside
        if "tokens" in stack.embeds:
            tap = stack.embeds["tokens"]
            stack.embeds["tokens"] = replace(tap, module=f"{tap.module}.table")
    return made


__all__: list[str] = [
    "implementation_invariance",
    "label_randomisation",
    "reparametrised",
    "target_randomisation",
    "weight_randomisation",
]
