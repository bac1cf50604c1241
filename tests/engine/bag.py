"""A mixed bag of edits for any model: every site it has, every kind of edit, all sorts of positions, batches, metrics."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pellucid import metrics
from pellucid.anatomy.sites import PARTS, Site
from pellucid.engine.edits import Ablate, Clamp, Edit, Patch, ProjectOut, Replace, Rotate, Scale, Steer
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import locate, unit_count
from pellucid.engine.run import Run, execute
from pellucid.errors import PellucidError, Refused
from pellucid.model import Model
from tests.zoo import inputs


def all_sites(model: Model) -> list[Site]:
    """Every tensor of the model, and one or two units of those that have units."""
    found: list[str] = ["embed", "final_norm"]
    for stack in model.anatomy.stacks:
        for block in stack.blocks:
            here = f"{stack.prefix}layers.{block.index}"
            found += [f"{here}.{part}" for part in block.taps if part in PARTS]
            for area in (a for a in block.attentions if f"{a}.z_out" in block.taps):
                found += [f"{here}.{area}.heads.{h}" for h in (0, block.attentions[area].heads - 1)]
                ports = [p for p in ("q", "k", "v", "z", "pattern", "scores") if f"{area}.{p}" in block.taps]
                found += [f"{here}.{area}.heads.1.{port}" for port in ports]
            if "mlp.neurons" in block.taps:
                found += [f"{here}.mlp.neurons.3"]
            if "mlp.experts.out" in block.taps:
                experts = unit_count(block, Site("mlp.experts.out", 0))
                found += [f"{here}.mlp.experts.{e}.{port}" for e in range(experts) for port in ("out", "neurons")]
    sites = []
    for text in found:
        try:
            locate(model.anatomy, Site.parse(text))
        except PellucidError:
            continue
        sites.append(Site.parse(text))
    return sites


def positions(inputs: Inputs, stream: str, rng: random.Random) -> Any:
    lengths = inputs.stream(stream).lengths
    shortest = int(lengths.min())
    if shortest < 3:
        return rng.choice([None, 0, -1])
    at = rng.randrange(shortest)
    return rng.choice([None, at, -1, at - shortest, f"{min(at, 1)}:3", "-2:", f"0,{at}"])


class Bag:
    """Edits drawn for one model and batch, with reference runs of other prompts to patch and ablate from."""

    def __init__(self, model: Model, inputs: Inputs, other: Inputs, seed: int = 0) -> None:
        self.model, self.inputs, self.rng = model, inputs, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.sites = all_sites(model)
        with torch.no_grad():
            self.own: Run = execute(model.anatomy, inputs, self.sites)
            self.other: Run = execute(model.anatomy, other, self.sites)

    def variants(self, n: int) -> Iterator[list[Edit]]:
        """Each site about equally often; now and then several edits at once."""
        queue: list[Site] = []
        for _ in range(n):
            edits = []
            for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
                queue = queue or self.rng.sample(self.sites, len(self.sites))
                edits.append(self.edit(queue.pop()))
            yield edits

    def edit(self, site: Site) -> Edit:
        spot = locate(self.model.anatomy, site)
        site = replace(site, at=positions(self.inputs, spot.stream, self.rng))
        batch, keyed = len(self.inputs), "key" in site.dims
        wide = site.dims[-1] != "position"  # a single neuron is one number at each position
        kinds = ["zero", "patch", "scale", "replace"]
        if not keyed:
            kinds += ["mean", "mean of others", "position_mean", "steer", "patch tensor"]
            kinds += ["project", "clamp", "rotate"] * wide
            equal = len(set(self.inputs.stream(spot.stream).lengths.tolist())) == 1
            kinds += (["resample of others"] + ["resample"] * (batch > 1)) * equal
        elif site.part.endswith("pattern"):
            kinds += ["position_mean of others"]
        kind = self.rng.choice(kinds)
        size = (self.own.tensor(replace(site, at=None)).shape[-1],) if wide else ()
        if kind == "patch":
            return Patch(site, self.other)
        if kind == "patch tensor":
            return Patch(site, self.noise(*size))
        if kind == "steer":
            return Steer(site, self.noise(*size), 2.0)
        if kind == "scale":
            return Scale(site, self.rng.choice([-1.0, 0.5, 2.0]))
        if kind == "project":
            return ProjectOut(site, self.noise(2, *size))
        if kind == "clamp":
            return Clamp(site, self.noise(2, *size), 0.5)
        if kind == "rotate":
            return Rotate(
                site, self.noise(*size), 20.0, tokens=self.rng.choice(["1:", "-2:", ":"]) if site.at is None else None
            )
        if kind == "replace":
            return Replace(site, flipped if wide and not keyed else halved)
        how, _, of = kind.partition(" of ")
        return Ablate(site, how, self.other if of else None, seed=3)  # type: ignore[arg-type]

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def flipped(x: Tensor) -> Tensor:
    return x.flip(-1) * 1.5


def halved(x: Tensor) -> Tensor:
    return x * 0.5


# ---- what they are tried on, and what is read


def batches(model: Model) -> dict[str, tuple[Inputs, Inputs]]:
    """Pairs of inputs to sweep and to take references from: one, several, padded, as many prompts as tokens."""
    made = {}
    for name, rows, length, side in (
        ("one", 1, 9, ""), ("right", 3, 9, "right"), ("left", 2, 9, "left"), ("square", 9, 9, ""),
    ):  # fmt: skip
        pair = []
        for seed in (3, 4):
            tensors = inputs(model.module, batch=rows, length=length, seed=seed)
            if side and "attention_mask" in tensors:
                tensors["attention_mask"][0, slice(-2, None) if side == "right" else slice(0, 2)] = 0
            try:
                pair.append(model.inputs(tensors))
            except Refused:  # a family that cannot be padded on this side
                continue
        if len(pair) == 2:
            made[name] = (pair[0], pair[1])
    return made


def scores(logits: Tensor, padded: bool) -> dict[str, Any]:
    """Metrics of all kinds; those that read padding give no two equal numbers, not even natively."""
    if logits.ndim == 2:
        return {"class": metrics.class_logit(1), "class probability": metrics.class_probability(0)}
    made = {
        "logit difference": metrics.logit_difference(7, [9]),
        "log probability": metrics.log_probability([[7, 8]]),
        "sequence": metrics.sequence_log_probability([[7, 9]]),
        "early": metrics.logit(5, position=1),
        "divergence": metrics.kl_divergence(logits.flip(0), positions=None),
        "own": lambda z: z.std(-1).mean(-1),
    }
    return {k: v for k, v in made.items() if not (padded and k in ("divergence", "own"))}


def one_by_one(model: Model, given: Inputs, variants: list[list[Edit]], metric: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack([model.score(model.run(given, edits=v), metric) for v in variants])
