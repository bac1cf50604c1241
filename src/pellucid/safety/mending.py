"""What carries a failure, and what may mend it? The parts of `trace_failure`.

Pairs are of a failing prompt and its passing twin, with an answer that is right and one that is wrong; m is how far the right one is before
the wrong one. By `goal` what is to be mended is

    right    the share of failing prompts with m > 0
    alike    the gap, |mean of m at passing - m at failing|: twins should be answered alike, whichever is right (a bias: the passing twin names
             the opposite). Components are held at their mean over both sides, and a direction is turned by the pair's answers
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import numbers
from pellucid.changed import Copied
from pellucid.controls import random_directions
from pellucid.engine.edits import Clamp, Edit, Steer
from pellucid.engine.inputs import Inputs
from pellucid.errors import Refused
from pellucid.metrics import Metric, logit_difference
from pellucid.model import Model
from pellucid.safety.contrast import Seen
from pellucid.safety.formats import in_weights
from pellucid.safety.vector import Vector
from pellucid.training import draws as batches_of
from pellucid.training import linear, train

Goal = Literal["right", "alike"]
LAST = "-1:"
KEEP = 0.95  # share of what was right beside the failure that a mitigation must leave to be chosen


@dataclass(frozen=True, eq=False)
class Mitigation:
    """What mends: edits from the prompt's last token on, or a changed model."""

    edits: tuple[Edit, ...] = ()
    model: Model | None = None
    control: bool = False

    def at(self, tokens: str) -> list[Edit]:
        return [replace(e, tokens=tokens) for e in self.edits]


@dataclass(frozen=True, eq=False)
class Cases:
    """Failing and passing prompts with the right and the wrong token of each."""

    model: Model
    failing: list[Any]
    passing: list[Any]
    right: list[int]
    wrong: list[int]
    groups: np.ndarray
    goal: Goal = "right"

    def take(self, rows: Sequence[int]) -> Cases:
        failing, passing, right, wrong = (
            [side[i] for i in rows] for side in (self.failing, self.passing, self.right, self.wrong)
        )
        return replace(self, failing=failing, passing=passing, right=right, wrong=wrong, groups=self.groups[list(rows)])

    @property
    def metric(self) -> Metric:
        return logit_difference([[i] for i in self.right], [[i] for i in self.wrong])

    def sides(self) -> tuple[Inputs, Inputs]:
        return self.model.inputs(self.failing), self.model.inputs(self.passing)

    def margins(self, mitigations: Sequence[Mitigation], passing: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """[mitigation, prompt] how far the right answer is before the wrong one, of failing and of passing prompts (these where `goal` or you need them)."""
        fail, passed = self.sides()
        found = scores(self.model, fail, self.metric, mitigations)
        return found, scores(self.model, passed, self.metric, mitigations) if passing or self.goal == "alike" else found

    def mended(self, margins: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """[mitigation] what `goal` asks for, higher for better."""
        fail, passed = margins
        return (fail > 0).mean(1) if self.goal == "right" else -np.abs((passed - fail).mean(1))

    def effects(self, sets: Sequence[Mitigation]) -> np.ndarray:
        """[mitigation] the exact change, in nats, of what fails."""
        margins = self.margins([Mitigation(), *sets], passing=False)
        nats = margins[0].mean(1) if self.goal == "right" else self.mended(margins)
        return nats[1:] - nats[0]


def scores(model: Model, inputs: Inputs, metric: Any, mitigations: Sequence[Mitigation]) -> np.ndarray:
    """[mitigation, prompt] of a metric: edits in one sweep, changed models one by one."""
    edited = [m for m in mitigations if m.model is None]
    swept = iter(numbers(model.sweep(inputs, [list(m.edits) for m in edited], metric).values) if edited else [])
    return np.stack(
        [next(swept) if m.model is None else numbers(m.model.score(m.model.run(inputs), metric)) for m in mitigations]
    )


def attribution(model: Model, cases: Cases, sites: Sequence[Site]) -> tuple[list[Tensor], np.ndarray]:
    """What each component is held at [1, ...], and its attribution: by how much that mends, to first order."""
    wholes = list(dict.fromkeys(str(s.whole) + "@-1" for s in sites))
    fail, passed = cases.sides()
    alike = cases.goal == "alike"
    run = model.run(fail, keep=wholes, grad_of=cases.metric)
    clean = model.run(passed, keep=wholes, grad_of=cases.metric if alike else None)
    means, estimates = [], []
    for site in (s.at_position(-1) for s in sites):
        there, here = clean.tensor(site), run.tensor(site)
        means.append((torch.cat([there, here]) if alike else there).mean(0, keepdim=True).detach())
        change = ((means[-1] if alike else there) - here) * run.grad(site)
        if alike:
            change = change - (means[-1] - there) * clean.grad(site)
        estimates.append(float(change.flatten(1).sum(1).mean()))
    return means, np.array(estimates)


def sizes(cases: Cases, best: Sequence[int], held: Any) -> list[int]:
    """How many of the best components, taken together, mend most; and how many of those that keep the passing prompts right."""
    if not best:
        return []
    margins = cases.margins([Mitigation(), *(Mitigation(held(best[:k])) for k in range(1, len(best) + 1))])
    mended, kept = cases.mended(margins), (margins[1] > 0).mean(1)
    able = np.flatnonzero(kept[1:] >= KEEP * kept[0]) + 1 if cases.goal == "right" else np.zeros(0, dtype=int)
    return sorted({int(mended[1:].argmax()) + 1} | ({int(able[mended[able].argmax()])} if len(able) else set()))


def directions(model: Model, cases: Cases, layers: Sequence[int], draws: int, seed: int) -> dict[str, Mitigation]:
    """Steering (not towards likeness) and projection at the layer that does most on these pairs, random directions there, and the weight projection."""
    n, alike = len(cases.right), cases.goal == "alike"
    seen = Seen.of(model, [*cases.passing, *cases.failing], [Site.parse(f"layers.{i}.resid_post") for i in layers])
    good, bad = (dict(zip(layers, x, strict=True)) for x in (seen.values[:, :n], seen.values[:, n:]))
    ones = torch.ones(n)
    turned = torch.where(torch.tensor(cases.right) < torch.tensor(cases.wrong), ones, -ones) if alike else ones
    change = {i: ((good[i] - bad[i]) * turned[:, None]).mean(0) for i in layers}

    def steering(i: int, v: Tensor) -> Mitigation:
        return Mitigation((Steer(f"layers.{i}.resid_post", v, tokens=LAST),))

    def projection(i: int, v: Tensor) -> Mitigation:
        u = normalize(v, dim=0)
        level = float(((torch.cat([good[i], bad[i]]) if alike else good[i]) @ u).mean())
        return Mitigation((Clamp(f"layers.{i}.resid_post", u, level, tokens=LAST),))

    made: dict[str, Mitigation] = {}
    at: list[int] = []
    kinds = {"projection": projection} if alike else {"steering": steering, "projection": projection}
    for name, kind in kinds.items():
        each = [kind(i, change[i]) for i in layers]
        at.append(int(cases.mended(cases.margins(each, passing=False)).argmax()))
        made[f"{name} at layer {layers[at[-1]]}"] = each[at[-1]]
    best, first = layers[at[0]], next(iter(kinds.values()))
    for k, u in enumerate(random_directions(draws, change[best], norm=float(change[best].norm()), seed=seed)):
        made[f"random direction {k + 1}"] = replace(first(best, u), control=True)
    vector = Vector(f"layers.{best}.resid_post", change[best], first=seen.first[at[0]], digest=model.digest).spared()
    with suppress(Refused):  # a norm behind the projections, quantised weights: there is none, which the result shows
        made["weight projection"] = Mitigation(model=in_weights(model, vector, form="project"))
    return made


def retrained(model: Model, cases: Cases, layers: Sequence[int], seed: int) -> Model:
    """A changed model whose layers were trained towards the right answers of both sides."""
    stack = model.anatomy.stacks[-1]
    prefixes = tuple(f"{stack.blocks[i].module}." for i in layers)
    names = tuple(
        name for name, p in model.module.named_parameters() if name.startswith(prefixes) and p.is_floating_point()
    )
    made = model.changed(Copied(names))
    own = dict(made.module.named_parameters())
    prompts, right = [*cases.failing, *cases.passing], torch.tensor(cases.right * 2)

    def loss(rows: Tensor, step: int) -> Tensor:
        run = made.run(made.inputs([prompts[i] for i in rows.tolist()]), grad=True)
        stream = run.inputs.stream("")
        z = run.logits[torch.arange(len(rows)), stream.starts + stream.lengths - 1].float()
        return torch.nn.functional.cross_entropy(z, right[rows].to(z.device))

    batches = batches_of(len(prompts), 16, 3, seed)
    train(
        {k: own[k] for k in names}, batches, loss, lambda ps: torch.optim.Adam(ps, lr=1e-4), schedule=linear, seed=seed
    )
    return made
