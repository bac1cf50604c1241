"""PyTorch hooks and nothing else, one run at a time: what anybody can write. Every peer must equal it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Shape

library = "torch"


class Peer:
    note = "one run at a time; pattern from eager attention"
    every_layer, in_place = False, False

    def __init__(self, module: nn.Module, tokenizer: Any, shape: Shape) -> None:
        self.module, self.shape = module, shape
        self.blocks = module.get_submodule(shape.blocks)

    def patch(self, clean: Tensor, corrupted: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        """For each layer: the metric with its input's clean value put in at each position, [position]."""
        residuals, positions = self._block_inputs(clean), range(corrupted.shape[1])
        for layer in layers:
            yield torch.cat([self._patched(corrupted, residuals, layer, p) for p in positions])

    def ablate(self, prompts: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        """For each layer: the metric with each head's output set to zero, [head, prompt]."""
        for layer in layers:
            yield torch.stack([self._ablated(prompts, layer, head) for head in range(self.shape.heads)])

    def keep(self, ids: Tensor) -> dict[str, Tensor]:
        """Every activation of GPT-2, by site."""
        kept: dict[str, Tensor] = {}
        self.module.set_attn_implementation("eager")  # the fused kernel has no pattern
        handles = [h for n, block in enumerate(self.blocks) for h in _recorders(block, f"layers.{n}.", kept)]
        try:
            self.module(ids)
        finally:
            self.module.set_attn_implementation("sdpa")
            for handle in handles:
                handle.remove()
        return kept

    def forward(self, ids: Tensor) -> Tensor:
        return self.module(ids)[0]

    def steer(self, ids: Tensor, layer: int, vector: Tensor, **options: Any) -> Tensor:
        """Generate with a vector added to what a block returns; [prompt and new tokens]."""
        with after(self.blocks[layer], lambda x: x + vector):
            return self.module.generate(ids, **options)[0]

    def _block_inputs(self, ids: Tensor) -> list[Tensor]:
        inputs: list[Tensor] = []

        def record(_: nn.Module, args: Any) -> None:
            inputs.append(args[0].clone())

        handles = [block.register_forward_pre_hook(record) for block in self.blocks]
        self.module(ids)
        for handle in handles:
            handle.remove()
        return inputs

    def _patched(self, ids: Tensor, residuals: list[Tensor], layer: int, position: int) -> Tensor:
        def put_in(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, position] = residuals[layer][:, position]
            return x

        with before(self.blocks[layer], put_in):
            return self.shape.metric(self.module(ids))

    def _ablated(self, ids: Tensor, layer: int, head: int) -> Tensor:
        def remove(z: Tensor) -> Tensor:
            z = z.clone()
            z.unflatten(-1, (self.shape.heads, -1))[..., head, :] = 0
            return z

        with before(self.blocks[layer].get_submodule(self.shape.out_projection), remove):
            return self.shape.metric(self.module(ids))


def _recorders(block: nn.Module, prefix: str, kept: dict[str, Tensor]) -> list[Any]:
    """Hooks on one GPT-2 block that record everything in it."""

    def record(**values: Tensor) -> None:
        kept.update({prefix + name.replace("__", "."): value.clone() for name, value in values.items()})

    def projected(module: nn.Module, args: Any, output: Tensor) -> None:
        q, k, v = output.chunk(3, -1)
        record(attn__q=q, attn__k=k, attn__v=v)

    def attended(module: nn.Module, args: Any, output: Any) -> None:
        record(attn__out=output[0], attn__pattern=output[1])

    return [
        block.register_forward_pre_hook(lambda m, args: record(resid_pre=args[0])),
        block.attn.c_attn.register_forward_hook(projected),
        block.attn.c_proj.register_forward_pre_hook(lambda m, args: record(attn__z=args[0])),
        block.attn.register_forward_hook(attended),
        block.ln_2.register_forward_pre_hook(lambda m, args: record(resid_mid=args[0])),
        block.mlp.c_proj.register_forward_pre_hook(lambda m, args: record(mlp__neurons=args[0])),
        block.mlp.register_forward_hook(lambda m, args, output: record(mlp__out=output)),
        block.register_forward_hook(lambda m, args, output: record(resid_post=output)),
    ]


@contextmanager
def before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While this lasts, the module's first argument is changed."""
    handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While this lasts, what the module returns is changed."""
    handle = module.register_forward_hook(lambda _, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()
