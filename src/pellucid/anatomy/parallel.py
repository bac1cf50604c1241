"""A model whose weights are split over several processes, and whose activations are whole in each.

transformers' plan leaves heads and neurons where their columns of the weights are: what a process meets there is a part. Here
every projection gathers what it makes, and cuts its share from what it reads (transformers' own styles for that); so a head is
the same head in every process, an edit acts on the shard that it belongs to, and every proof means what it means on one process.
The price is attention that each process computes as a whole; the weights, which do not fit, are split.

All processes run the same program and must meet the same calls: an error is raised in all of them alike.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pellucid.errors import LoadError

# styles that hand on what is whole; fused projections stay whole themselves
GATHERED = {"colwise": "colwise_gather_output", "rowwise": "rowwise_split_input"}
KEPT = {"embedding_rowwise", "embedding_colwise", "all_reduce", *GATHERED.values(), "colwise_rep", "rowwise_rep"}


def split(opener: Any, config: Any, plan: Any) -> dict[str, Any]:
    """Options of from_pretrained for that. LoadError outside torchrun, or for a family without a plan."""
    if plan != "auto" and not isinstance(plan, Mapping):
        raise LoadError(f"tp_plan={plan!r}: expected 'auto', or rules of transformers' by module")
    if "WORLD_SIZE" not in os.environ:
        raise LoadError(
            "tp_plan splits a model over several processes: start the program with torchrun --nproc-per-node 2 program.py"
        )
    from transformers.distributed import DistributedConfig

    build = getattr(opener, "from_config", None) or opener._from_config
    with torch.device("meta"):
        rules: dict[str, str] = dict(build(config).tp_plan or {})
    if not rules:
        raise LoadError(
            f"transformers has no plan to split a {config.model_type} model: give its rules as tp_plan=, or use device_map"
        )
    rules = {
        name: style if style in KEPT or ".experts" in name else GATHERED.get(style, "replicate")
        for name, style in rules.items()
    }
    return {"distributed_config": DistributedConfig(tp_plan=rules | ({} if plan == "auto" else dict(plan)))}


# ---- experts, whose neurons stay split inside one module


@dataclass(frozen=True)
class Parts:
    """This process's part of a module's units, among `size`."""

    group: Any
    rank: int
    size: int

    def gathered(self, x: Tensor) -> Tensor:
        """All units [..., unit] from this process's; the gradient of each comes back to where it is."""
        return _Gather.apply(x, self)

    def own(self, x: Tensor) -> Tensor:
        """This process's units of all; their gradients, of all."""
        return _Own.apply(x, self)

    def summed(self, x: Tensor) -> Tensor:
        """The sum of all parts, with the gradient of one."""
        return _Sum.apply(x, self, False)

    def shared(self, x: Tensor) -> Tensor:
        """A part of something whole that is summed later, with its gradient."""
        return _Scaled.apply(x, 1 / self.size, 1.0)

    def once(self, x: Tensor) -> Tensor:
        """Itself, with its part of a gradient that is summed before."""
        return _Scaled.apply(x, 1.0, 1 / self.size)

    def heard(self, x: Tensor) -> Tensor:
        """Itself, with the sum of all parts' gradients."""
        return _Sum.apply(x, self, True)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts) -> Tensor:
        ctx.parts = parts
        return _all(x, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.chunk(ctx.parts.size, -1)[ctx.parts.rank].contiguous(), None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts) -> Tensor:
        ctx.parts = parts
        return x.chunk(parts.size, -1)[parts.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all(grad, ctx.parts), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts, backwards: bool) -> Tensor:
        ctx.parts, ctx.backwards = parts, backwards
        return x.view_as(x) if backwards else _total(x, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _total(grad, ctx.parts) if ctx.backwards else grad, None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forwards: float, backwards: float) -> Tensor:
        ctx.backwards = backwards
        return x * forwards

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.backwards, None, None


def _all(x: Tensor, parts: Parts) -> Tensor:
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(parts.size)]
    dist.all_gather(made, x.contiguous(), group=parts.group)
    return torch.cat(made, -1)


def _total(x: Tensor, parts: Parts) -> Tensor:
    made = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(made, group=parts.group)
    return made


_parts: WeakKeyDictionary[nn.Module, Parts] = WeakKeyDictionary()


def note(module: nn.Module) -> None:
    """Remember which experts of a model are split: inside their forward pass their weights do not tell."""
    for part in module.modules():
        meshes = [p.device_mesh for p in part.parameters(recurse=False) if p.ndim == 3 and hasattr(p, "device_mesh")]
        if meshes:
            group = meshes[0].get_group() if meshes[0].ndim == 1 else meshes[0].get_group("tp")
            _parts[part] = Parts(group, dist.get_rank(group), dist.get_world_size(group))


def parts_of(module: nn.Module) -> Parts | None:
    """How a module's experts are split; None where they are whole."""
    return _parts.get(module)


def whole(tensor: Tensor) -> Tensor:
    """A weight as a whole; all processes ask for it together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
