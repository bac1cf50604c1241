"""What does a neuron read from the residual stream, and what does it write into it? Its weights, as directions.

    neuron_n = act(g_n . x) (u_n . x)   or   act(u_n . x)      reads g_n, u_n (the gate first), x the normed residual
    mlp.out  = sum_n neuron_n w_n                              writes w_n

What is written passes whatever stands between the projection and the stream: a factor is applied; a norm (sandwich
families) with its gain, its scale set to 1, since it differs from token to token. Which modules a neuron reads through is
on the map (`pellucid.anatomy.readers`), proven by damage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Block, Mlp
from pellucid.anatomy.weights import linear_map
from pellucid.engine.frozen import affine, freeze
from pellucid.engine.locate import block_of, locate, stack_of
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


@torch.no_grad()
def input_weights(model: Model, site: str) -> Tensor:
    """[reader, neuron, d_model] what each neuron reads: one row in a plain MLP, two in a gated one, the gate first.

    Refused where no linear modules are known that feed the neurons one by one from the stream.
    """
    (where,) = model.sites(site)
    mlp, block = _mlp(model, where)
    reads = block.reads.get(f"{mlp.part}.neurons", ())
    if not reads or any(len(r.modules) > 1 or r.columns is None for r in reads):
        why = block.unread.get(f"{mlp.part}.neurons", "there is a bottleneck before them")
        raise Refused(f"no linear modules are known that feed {site!r} neuron by neuron: {why}")
    maps = ((r.columns, linear_map(model.module.get_submodule(r.modules[0]), r.width)[0].float()) for r in reads)
    return torch.stack([weight[:, columns[:, 0]].T for columns, weight in maps if columns is not None])
