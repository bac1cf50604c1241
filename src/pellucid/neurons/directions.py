"""What does a neuron read from the residual stream, what does it write into it, and which words does that make more or less
likely? Its weights, as directions.

    neuron_n = act(g_n . x) (u_n . x)   or   act(u_n . x)      reads g_n, u_n (the gate first), x the normed residual
    mlp.out  = sum_n neuron_n w_n                              writes w_n

What is written passes whatever stands between the projection and the stream: a factor is applied; a norm (sandwich
families) with its gain, its scale set to 1, since it differs from token to token. Which modules a neuron reads through is
on the map (`pellucid.anatomy.readers`), proven by damage.

A direction w that is added to the last residual changes the logits, with the scale of the final norm held, by

    (change of logits) = W_U (gain * centred(w)) * activation / rms(residual)

so the tokens it raises and lowers most are the same in every text; only the size depends on it. `logit_effects` gives
W_U (gain * centred(w)): logits per unit of activation where the residual has the size 1. It is the direct effect (Geva et al.
2021; the logit lens of weights): what later layers do with w is not in it. A soft cap is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.frozen import affine, freeze
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Block, Mlp
from pellucid.anatomy.weights import linear_map
from pellucid.engine.locate import block_of, locate, stack_of
from pellucid.errors import InputError, Refused, at_least, listed
from pellucid.model import Model
from pellucid.question import extremes
from pellucid.results import Result
from pellucid.tasks.tokens import texts
from pellucid.technique import technique

CELLS = 1 << 24  # numbers of logits held at a time
Steps = Sequence[Callable[[Tensor], Tensor]]


@torch.no_grad()
def output_weights(model: Model, site: str) -> Tensor:
    """[neuron, d_model] what each neuron of a site such as `layers.3.mlp.neurons` writes, for an activation of 1.

    For a residual (`resid_*`, `*.out`, `embed`) the axes of the stream. Refused where what is written depends on the token (a
    gate); InputError for sites that write nothing of this kind.
    """
    where = _single(model, site)
    if where.dims[-1] == "d_model" and where.unit is None:
        return torch.eye(stack_of(model.anatomy, where).d_model)
    mlp, block = _mlp(model, where)
    linear, path = mlp.linear, mlp.path
    if linear is None or path is None or path.onward is None:
        raise Refused(f"what {site!r} writes is changed token by token before it reaches the stream")
    weight, _ = linear_map(model.module.get_submodule(linear.module), linear.shape)
    names, steps = [n for n, _ in path.onward], [s for _, s in path.onward]
    return passed(steps, names, weight.float()) * block.taps[f"{mlp.part}.out"].layout.scale


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


def _single(model: Model, site: str) -> Site:
    found = model.sites(site)
    if len(found) != 1:
        raise InputError(f"{site!r} names {len(found)} sites: weights are those of one")
    return found[0]


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
    where = _single(model, site)
    mlp, block = _mlp(model, where)
    reads = block.reads.get(f"{mlp.part}.neurons", ())
    if not reads or any(len(r.modules) > 1 or r.columns is None for r in reads):
        why = block.unread.get(f"{mlp.part}.neurons", "there is a bottleneck before them")
        raise Refused(f"no linear modules are known that feed {site!r} neuron by neuron: {why}")
    maps = ((r.columns, linear_map(model.module.get_submodule(r.modules[0]), r.width)[0].float()) for r in reads)
    return torch.stack([weight[:, columns[:, 0]].T for columns, weight in maps if columns is not None])


# ---- what it says


@technique
@torch.no_grad()
def logit_effects(model: Model, units: str | Sequence[str] | Mapping[str, Tensor], *, top: int = 10) -> Result:
    """The `top` tokens each unit raises and lowers most, by its output weights alone.

    `units` are neurons or channels of the last stack's residual (`layers.3.mlp.neurons.*`, with selectors), or directions
    [d_model] by name. Gives over `unit` x `rank`: `raised` with `raised_token`, `lowered` with `lowered_token`; over `unit`
    `size`, the norm of the direction. InputError without units; Refused where the way from the unit to the logits is not
    linear but for norms (masked models with a transform, blocks that norm the residual itself), or there is no head.

    >>> logit_effects(model, "layers.20.mlp.neurons.*").sel(unit="layers.20.mlp.neurons.17").raised_token
    <xarray.DataArray 'raised_token' (rank: 10)>...
    """
    if isinstance(units, Mapping) and not all(isinstance(v, Tensor) for v in units.values()):
        raise InputError(f"units={units!r}: expected directions by name, each a tensor [d_model]")
    named = {k: v.flatten() for k, v in units.items()} if isinstance(units, Mapping) else _directions(model, units)
    if not named:
        raise InputError("no unit was given: name neurons, or give directions")
    at_least(1, top=top)
    wrong = next((k for k, v in named.items() if len(v) != model.anatomy.stacks[-1].d_model), None)
    if wrong is not None:
        width = model.anatomy.stacks[-1].d_model
        raise InputError(f"{wrong!r} has {len(named[wrong])} numbers: a direction of {model.name} has {width}")
    rows = torch.stack([v.float() for v in named.values()])
    vocabulary = effects(model, rows[:1]).shape[1]
    found = [extremes(effects(model, part), top) for part in rows.split(max(1, CELLS // vocabulary))]
    made: dict[str, Any] = {}
    for name in found[0]:
        values = torch.cat([each[name] for each in found]).cpu().numpy()
        made[name] = (("unit", "rank"), texts(model.tokenizer, values) if name.endswith("token") else values)
    made["size"] = ("unit", rows.norm(dim=1).cpu().numpy())
    data = xr.Dataset(made, coords={"unit": list(named)}, attrs={"unit": "logits at a residual of size 1"})
    return Result(data, kind="logit effects", title=f"What {len(named)} units write")


@torch.no_grad()
def effects(model: Model, directions: Tensor) -> Tensor:
    """[unit, vocabulary] of directions [unit, d_model] added to the last residual; see the module. Refused as there."""
    head = model.anatomy.head
    if head is None or "head" in model.anatomy.refusals:
        why = model.anatomy.refusals.get("head", "it has none")
        raise Refused(f"what is written cannot be read through the head of {model.name}: {why}")
    like = next(p for p in model.module.parameters() if p.is_floating_point())
    return passed(head.steps[: head.after], head.names[: head.after], directions.to(like)).float()


def _directions(model: Model, units: str | Sequence[str]) -> dict[str, Tensor]:
    """What each unit writes into the last stack's residual."""
    found: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for pattern in [units] if isinstance(units, str) else listed("units", units, "addresses of units"):
        for site in model.sites(pattern):
            whole, n = _unit(site)
            if whole not in weights:
                _check(model, site)
                weights[whole] = output_weights(model, whole)
            if n >= len(weights[whole]):
                raise InputError(f"there is no unit {n} in {whole!r}, which has {len(weights[whole])}")
            found[str(site)] = weights[whole][n]
    return found


def _unit(site: Site) -> tuple[str, int]:
    if not isinstance(site.unit, int) or site.dims != ("batch", "position"):
        raise InputError(f"{str(site)!r} is no single unit: name one as {site.whole}.17, or all as {site.whole}.*")
    return str(site.whole), site.unit


def _check(model: Model, site: Site) -> None:
    """Refused where what is written does not reach the head as it is."""
    stack = stack_of(model.anatomy, site)
    if stack is not model.anatomy.stacks[-1]:
        raise Refused(f"{str(site)!r} is in the {stack.name}, whose residual the head does not read")
    first = site.layer if isinstance(site.layer, int) else 0
    if any(state.norm_in is not None for block in stack.blocks[first:] for state in block.states):
        raise Refused(
            f"the blocks of {model.name} norm the residual itself, so what {str(site)!r} writes is scaled anew"
        )
    terms = [term for block in stack.blocks for state in block.states for term in state.terms]
    if any(t.carried is not None or (isinstance(t.coefficient, Tensor) and "." not in t.source) for t in terms):
        raise Refused(f"the blocks of {model.name} mix or scale the residual itself: no direction has one effect")
