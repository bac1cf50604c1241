"""What does a neuron read from the residual stream, and what does it write into it? Its weights, as directions.

    neuron_n = act(g_n . x) (u_n . x)   or   act(u_n . x)      reads g_n, u_n (the gate first), x the normed residual
    mlp.out  = sum_n neuron_n w_n                              writes w_n

What is written passes whatever stands between the projection and the stream: a factor is applied; a norm (sandwich
families) with its gain, its scale set to 1, since it differs from token to token. Which modules a neuron reads through is not
taken from their names: a linear module of the block is a reader if changing its n-th output changes the n-th neuron of the
same token and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.modes import evaluating
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Block, Mlp
from pellucid.anatomy.weights import linear_map
from pellucid.engine.frozen import affine, freeze
from pellucid.engine.locate import block_of, locate, stack_of
from pellucid.engine.watching import watch
from pellucid.errors import InputError, Refused
from pellucid.model import Model

Steps = Sequence[Callable[[Tensor], Tensor]]


@torch.no_grad()
def output_weights(model: Model, site: str) -> Tensor:
    """[neuron, d_model] what each neuron of a site such as `layers.3.mlp.neurons` writes, for an activation of 1.

    For a residual (`resid_*`, `*.out`, `embed`) the axes of the stream. Refused where what is written depends on the token (a
    gate); InputError for sites that write nothing of this kind.
    """
    (where,) = model.sites(site)
    if where.dims[-1] == "d_model" and where.unit is None:
        return torch.eye(stack_of(model.anatomy, where).d_model)
    mlp, block = _mlp(model, where)
    linear, path = mlp.linear, mlp.path
    if linear is None or path is None or "gate" in path.names:
        raise Refused(f"what {site!r} writes is changed token by token before it reaches the stream")
    weight, _ = linear_map(model.module.get_submodule(linear.module), linear.shape)
    return passed(path.steps, path.names, weight.float()) * block.taps[f"{mlp.part}.out"].layout.scale


@torch.no_grad()
def passed(steps: Steps, names: Sequence[str], rows: Tensor) -> Tensor:
    """Directions [row, d] after steps in a row, without their constants; of a norm the gain, its scale being 1.

    Refused if a step is neither affine nor a norm.
    """
    x = torch.randn(1, 1, rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    rows = rows[:, None]
    for step, name in zip(steps, names, strict=True):
        if affine(step, x):
            rows = step(rows) - step(torch.zeros_like(rows))
        else:
            norm = freeze(step, x)
            if norm is None:
                raise Refused(f"{name!r} is not linear, so a direction cannot be followed through it")
            rows = replace(norm, scale=torch.ones_like(norm.scale))(rows) - norm.offset.to(rows.dtype)
        x = step(x)
    return rows[:, 0]


def _mlp(model: Model, site: Site) -> tuple[Mlp, Block]:
    block = block_of(model.anatomy, site)
    locate(model.anatomy, site)
    mlp = block.mlps.get(site.part.partition(".")[0])
    if mlp is None or not site.part.endswith(".neurons") or mlp.linear is None:
        raise InputError(f"{str(site)!r} holds no neurons of an MLP: name a site such as layers.3.mlp.neurons")
    return mlp, block


# ---- what it reads


@torch.no_grad()
def input_weights(model: Model, site: str) -> Tensor:
    """[reader, neuron, d_model] what each neuron reads: one row in a plain MLP, two in a gated one, the gate first.

    Refused where no linear modules are found that feed the neurons one by one.
    """
    (where,) = model.sites(site)
    _, block = _mlp(model, where)
    d, count = stack_of(model.anatomy, where).d_model, block.sizes["neuron"]
    feeder = Feeder(model, where, count)
    found: list[tuple[bool, Tensor]] = []
    for module in model.module.get_submodule(block.module).modules():
        weight = _weight(module, d)
        for rows in [] if weight is None else _arrangements(len(weight), count):
            linear = [feeder.linear(module, part) for part in rows]
            if None not in linear:
                found += [(bool(flag), weight[part]) for flag, part in zip(linear, rows, strict=True)]  # type: ignore[index]
                break
    if not 1 <= len(found) <= 2:
        raise Refused(f"no linear modules were found that feed {site!r} neuron by neuron")
    return torch.stack([weight for _, weight in sorted(found, key=lambda each: each[0])])


def _weight(module: nn.Module, d: int) -> Tensor | None:
    """[output, d] of a linear module that takes the residual."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding) or not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    takes = weight.shape[0 if type(module).__name__ == "Conv1D" else 1]  # GPT-2's layer keeps [in, out]
    return linear_map(module, d)[0].T.float() if takes == d and next(module.children(), None) is None else None


def _arrangements(outputs: int, count: int) -> list[list[Tensor]]:
    """Which outputs may belong to the neurons, in order: all; or gate and up in halves, or in turn."""
    each = torch.arange(outputs)
    if outputs == count:
        return [[each]]
    return [list(each.view(2, count)), list(each.view(count, 2).T)] if outputs == 2 * count else []


class Feeder:
    """Changes some outputs of a module in a pass over the model's probe, and looks which neurons change."""

    def __init__(self, model: Model, site: Site, count: int) -> None:
        self.model, self.site, self.neurons = model, site, sorted({1 % count, count // 2, count - 1})
        self.inputs = model.inputs({k: v for k, v in model.anatomy.inputs.items() if isinstance(v, Tensor)})
        self.nth = locate(model.anatomy, site).tap.nth
        self.clean = self._run()

    def linear(self, module: nn.Module, rows: Tensor) -> bool | None:
        """Whether outputs `rows` feed the neurons linearly, one by one; None if they do not feed them one by one."""
        outputs = rows[self.neurons]
        up, down = (self._run(module, outputs, sign) - self.clean for sign in (1, -1))
        changed = (up.abs() + down.abs()).amax(0) > 0
        if changed.nonzero()[:, 0].tolist() != self.neurons:
            return None
        return bool((up + down).abs().max() < 1e-3 * up.abs().max())

    def _run(self, module: nn.Module | None = None, outputs: Tensor | None = None, sign: int = 1) -> Tensor:
        """[token, neuron], with some outputs of the module moved by a hundred times their size."""
        calls, seen = [0], []

        def move(_: nn.Module, __: Any, made: Tensor) -> Tensor:
            calls[0] += 1
            if calls[0] != self.nth + 1:  # layers may share a module
                return made
            made = made.clone()
            made[..., outputs] += sign * 100 * made.abs().mean()
            return made

        hook = None if module is None else module.register_forward_hook(move)
        try:
            with evaluating(self.model.module):
                watch(
                    self.model.anatomy, self.inputs, {self.site: lambda x: seen.append(x.flatten(0, 1).float().clone())}
                )
        finally:
            if hook is not None:
                hook.remove()
        return seen[0]
