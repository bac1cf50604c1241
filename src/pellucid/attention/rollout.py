"""How much of each input token has reached a position, if attention were all that moves information?

Attention rollout (Abnar and Zuidema 2020): the residual stream keeps a share r of what it had, the rest is mixed by
the mean of the heads, and layers multiply:

    M_l = r I + (1 - r) mean over heads of A_l, its rows scaled to sum to 1
    rollout_l = M_l rollout_(l-1),  rollout_0 = I

Paper and code take r = 1/2. `residual="norms"` measures it instead, for every layer and query: r = |x| / (|x| + |a|),
x what enters the block and a what attention adds; that is ours, after the mixing ratios of Kobayashi et al. (2021).

In an encoder-decoder the decoder's state is a mixture of decoder and source tokens (also ours; the rows of both
together sum to 1): with E the encoder's rollout, X the cross-attention, and D and C what is made of decoder and source,

    self-attention    D <- M D,   C <- M C                    cross-attention    D <- r D,   C <- r C + (1 - r) X E

Rollout says nothing about values, MLPs or the answer. Under a causal mask it favours early tokens whatever the model
does: with 12 layers that look everywhere alike, most of the last row is at token 0. `null` is therefore the rollout of
a model with the same masks and mixing that looks at every visible key alike: compare with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pellucid.attention.patterns import Attended, Kind, attended, labelled, single, visible
from pellucid.engine.edits import Edit
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

Residual = float | str


@technique
def rollout(
    model: Model, prompt: Any, *, residual: Residual = 0.5, decoder: str | None = None, edits: Sequence[Edit] = ()
) -> Result:
    """Attention rollout of one prompt after every layer.

    `residual` is the share r that stays, a number in [0, 1) or "norms". One stack: `rollout` [layer, query, key] with
    `null` beside it. Encoder-decoder: `rollout` over decoder tokens, `source` [layer, query, source_key], and
    `encoder` [encoder_layer, source_query, source_key], each with its `..._null`.
    Raises as `patterns` does; InputError for another residual.

    >>> rollout(model, "The capital of France is").sel(layer=11, query=4).rollout
    <xarray.DataArray 'rollout' (key: 5)>...
    """
    inputs = single(model, prompt, decoder)
    found, mixing = mixed(model, inputs, residual, edits)
    null = rolled(found, [step.alike() for step in mixing])
    variables = {}
    for name, (kind, values) in rolled(found, mixing).items():
        dims = (kind.dims[0], *kind.tokens)
        variables[name] = (dims, values.numpy())
        variables["null" if name == "rollout" else f"{name}_null"] = (dims, null[name][1].numpy())
    order = sorted(variables, key=lambda name: name != "rollout")
    data = labelled(xr.Dataset({name: variables[name] for name in order}), found)
    return Result(data, kind="attention rollout", title=f"Attention rollout, residual share {residual}")


@dataclass(frozen=True, eq=False)
class Step:
    """One attention as mixing: what stays of each query, [query], and the mean pattern, rows summing to 1."""

    kind: Kind
    layer: int
    stays: Tensor
    pattern: Tensor
    seen: Tensor  # [query, key] bool

    def alike(self) -> Step:
        """The same mask and mixing, looking at every visible key alike."""
        seen = self.seen.to(self.pattern)
        return Step(self.kind, self.layer, self.stays, _rows(seen), self.seen)

    @property
    def moves(self) -> Tensor:
        return (1 - self.stays)[:, None] * self.pattern

    @property
    def mixing(self) -> Tensor:
        """M [query, key] of self-attention."""
        return self.moves + torch.diag(self.stays)


def mixed(model: Model, inputs: Any, residual: Residual, edits: Sequence[Edit] = ()) -> tuple[Attended, list[Step]]:
    """The patterns of one prompt and, in the order they are run (the encoder first), their mixing steps."""
    if residual != "norms" and not (isinstance(residual, int | float) and 0 <= residual < 1):
        raise InputError(f"the residual share is {residual!r}: expected a number from 0 up to 1, or 'norms'")
    sites = _norm_sites(model) if residual == "norms" else {}
    keep = [site for pair in sites.values() for site in pair]
    found = attended(model, inputs, edits, keep=keep)
    steps = []
    for kind in found.kinds:
        for layer, pattern, seen in zip(kind.layers, found.values[kind], visible(found.values[kind]), strict=True):
            if residual == "norms":
                stays = _measured(found, sites[kind.stack, layer, kind.area], kind)
            else:
                stays = pattern.new_full(pattern.shape[1:2], float(residual))
            steps.append(Step(kind, layer, stays.double(), _rows(pattern.mean(0).double()), seen))
    stacks = [stack.name for stack in model.anatomy.stacks]
    return found, sorted(steps, key=lambda s: (stacks.index(s.kind.stack), s.layer, s.kind.area == "cross"))


def _rows(x: Tensor) -> Tensor:
    """Rows scaled to sum to 1 (a sink beside the keys takes its share); rows of nothing stay."""
    x = x.double()
    total = x.sum(-1, keepdim=True)
    return x / torch.where(total > 0, total, torch.ones_like(total))


def _norm_sites(model: Model) -> dict[tuple[str, int, str], tuple[str, str]]:
    """Per attention, the sites of the residual before it and of what it adds."""
    made = {}
    for stack in model.anatomy.stacks:
        for block in stack.blocks:
            at = f"{stack.prefix}layers.{block.index}"
            for area in block.attentions:
                made[stack.name, block.index, area] = (f"{at}.resid_pre", f"{at}.{area}.out")
    return {key: pair for key, pair in made.items() if key[2] in ("attn", "cross")}


def _measured(found: Attended, sites: tuple[str, str], kind: Kind) -> Tensor:
    stream = found.run.inputs.stream(kind.stack)
    start, n = int(stream.starts[0]), int(stream.lengths[0])
    before, added = (found.run.tensor(site)[0, start : start + n].double().norm(dim=-1).cpu() for site in sites)
    return before / (before + added).clamp_min(1e-30)


def rolled(found: Attended, steps: Sequence[Step]) -> dict[str, tuple[Kind, Tensor]]:
    """Name -> (kind, [layer, query, key]) of the rollout after every layer."""
    made: dict[str, tuple[Kind, list[Tensor]]] = {}
    ends: dict[str, Tensor] = {}  # stack -> its rollout so far
    source: Tensor | None = None  # of the decoder's state over source tokens
    for step in steps:
        kind, stack = step.kind, step.kind.stack
        name = "rollout" if kind == found.main or (kind.area == "cross") else kind.stack
        if kind.area == "attn":
            before = ends.get(stack)
            ends[stack] = step.mixing if before is None else step.mixing @ before
            source = step.mixing @ source if source is not None and stack == found.main.stack else source
            made.setdefault(name, (kind, []))[1].append(ends[stack])
            continue
        own = torch.eye(len(step.stays), dtype=torch.float64) if stack not in ends else ends[stack]
        arrived = step.moves @ ends["encoder"]
        ends[stack] = step.stays[:, None] * own
        source = arrived if source is None else step.stays[:, None] * source + arrived
        made.setdefault("source", (kind, []))[1].append(source)
        if name in made:
            made[name][1][-1] = ends[stack]
    return {name: (kind, torch.stack(values)) for name, (kind, values) in made.items()}
