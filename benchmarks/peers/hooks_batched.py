"""Plain hooks again, with all runs of a layer as one batch: what a careful person writes by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from peers import hooks

library = "torch"


class Peer(hooks.Peer):
    note = "the runs of a layer as one batch"
    every_layer, in_place = False, False

    def patch(self, clean: Tensor, corrupted: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        residuals, rows = self._block_inputs(clean), torch.arange(corrupted.shape[1])
        for layer in layers:

            def put_in(x: Tensor, new: Tensor = residuals[layer]) -> Tensor:
                x = x.clone()
                x[rows, rows] = new[0]
                return x

            with hooks.before(self.blocks[layer], put_in):
                values = self.shape.metric(self.module(corrupted.expand(len(rows), -1)))
            yield values

    def ablate(self, prompts: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        heads = torch.arange(self.shape.heads)

        def remove(z: Tensor) -> Tensor:
            z = z.clone()
            z.view(len(heads), len(prompts), z.shape[1], len(heads), -1)[heads, :, :, heads] = 0
            return z

        for layer in layers:
            with hooks.before(self.blocks[layer].get_submodule(self.shape.out_projection), remove):
                values = self.shape.metric(self.module(prompts.repeat(len(heads), 1)))
            yield values
