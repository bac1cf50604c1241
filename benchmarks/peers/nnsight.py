"""nnsight: traces. A sweep's runs of one layer are invokes of one trace, which nnsight runs as one batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor, nn
from workloads import Shape

library = "nnsight"


class Peer:
    note = "the runs of a layer as invokes of one trace; pattern from eager attention"
    every_layer, in_place = False, False

    def __init__(self, module: nn.Module, tokenizer: Any, shape: Shape) -> None:
        self.module, self.shape = module, shape
        task = "text-generation" if shape.answers else "feature-extraction"
        self.model = TransformersModel(module, tokenizer=tokenizer, task=task)
        self.blocks = self.model.get(shape.blocks)

    def patch(self, clean: Tensor, corrupted: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        layers, model, blocks, shape = list(layers), self.model, self.blocks, self.shape
        residuals = {}
        with model.trace(clean):
            for layer in layers:
                residuals[layer] = blocks[layer].input.save()
        for layer in layers:
            with model.trace() as tracer:
                row = [].save()
                for position in range(corrupted.shape[1]):
                    with tracer.invoke(corrupted):
                        blocks[layer].input[:, position] = residuals[layer][:, position]
                        row.append(shape.metric(model.output[0]))
            yield torch.cat(row)

    def ablate(self, prompts: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        model, shape = self.model, self.shape
        for layer in layers:
            projection = self.blocks[layer].get(shape.out_projection)
            with model.trace() as tracer:
                rows = [].save()
                for head in range(shape.heads):
                    with tracer.invoke(prompts):
                        projection.input.unflatten(-1, (shape.heads, -1))[..., head, :] = 0
                        rows.append(shape.metric(model.output[0]))
            yield torch.stack(rows)

    def keep(self, ids: Tensor) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        self.module.set_attn_implementation("eager")
        blocks = self.blocks
        with self.model.trace(ids):
            for n, block in enumerate(blocks):
                kept[f"layers.{n}.resid_pre"] = block.input.save()
                q, k, v = block.attn.c_attn.output.chunk(3, -1)
                kept[f"layers.{n}.attn.q"] = q.save()
                kept[f"layers.{n}.attn.k"] = k.save()
                kept[f"layers.{n}.attn.v"] = v.save()
                kept[f"layers.{n}.attn.z"] = block.attn.c_proj.input.save()
                kept[f"layers.{n}.attn.out"] = block.attn.output[0].save()
                kept[f"layers.{n}.attn.pattern"] = block.attn.output[1].save()
                kept[f"layers.{n}.resid_mid"] = block.ln_2.input.save()
                kept[f"layers.{n}.mlp.neurons"] = block.mlp.c_proj.input.save()
                kept[f"layers.{n}.mlp.out"] = block.mlp.output.save()
                kept[f"layers.{n}.resid_post"] = block.output.save()
        self.module.set_attn_implementation("sdpa")
        return kept

    def forward(self, ids: Tensor) -> Tensor:
        with self.model.trace(ids):
            logits = self.model.output[0].save()
        return logits

    def steer(self, ids: Tensor, layer: int, vector: Tensor, **options: Any) -> Tensor:
        block = self.blocks[layer]
        with self.model.generate(ids, **options) as tracer:
            for _ in tracer.iter[: options["max_new_tokens"]]:
                block.output[:] += vector
            tokens = tracer.result.save()
        return tokens[0]
