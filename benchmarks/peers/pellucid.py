"""pellucid: a sweep is one query; the planner decides how to run it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from workloads import Shape

import pellucid

library = "pellucid"

EVERYTHING = ["resid_pre", "resid_mid", "resid_post", "attn.out", "mlp.neurons", "mlp.out"]
EVERYTHING += [f"attn.{part}" for part in ("q", "k", "v", "z", "pattern")]


class Peer:
    note = "one sweep, planned"
    every_layer, in_place = True, False

    def __init__(self, module: nn.Module, tokenizer: Any, shape: Shape) -> None:
        self.shape, self.model = shape, pellucid.load(module, tokenizer=tokenizer)
        self.metric = pellucid.metrics.logit_difference(*shape.answers) if shape.answers else shape.metric

    def patch(self, clean: Tensor, corrupted: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        run = self.model.run(clean, keep="layers.*.resid_pre")
        sites = [f"layers.{layer}.resid_pre@{p}" for layer in layers for p in range(corrupted.shape[1])]
        variants = [pellucid.Patch(site, run) for site in sites]
        yield self.model.sweep(corrupted, variants, self.metric).values

    def ablate(self, prompts: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        heads = range(self.shape.heads)
        variants = [pellucid.Ablate(f"layers.{layer}.attn.heads.{head}") for layer in layers for head in heads]
        yield self.model.sweep(prompts, variants, self.metric).values

    def keep(self, ids: Tensor) -> dict[str, Tensor]:
        run = self.model.run(ids, keep=[f"layers.*.{part}" for part in EVERYTHING])
        return {str(site): run.tensor(site) for site in run.sites}

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.run(ids).logits

    def steer(self, ids: Tensor, layer: int, vector: Tensor, max_new_tokens: int, do_sample: bool) -> Tensor:
        edits = [pellucid.Steer(f"layers.{layer}.resid_post", vector)]
        return self.model.generate(ids, edits=edits, max_new_tokens=max_new_tokens).tokens[0]
