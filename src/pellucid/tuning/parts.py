"""What may change: all that is free, some layers, or some heads and neurons; and the proof that nothing else did.

Whole tensors that are not chosen do not enter the optimiser at all (a tensor with a gradient of zero still decays in AdamW).
Of a tensor that belongs to chosen and other units alike, the entries that are a chosen unit's alone are trained: gradients of
the others are 0 and the tensor has no weight decay, so every other entry keeps its bits. Which entries are a unit's is not
told by names but found out: those that its activation depends on, and those by which it is read, and that no unit outside
the choice depends on or is read by. Shared ones (keys and values of grouped heads, norms, output biases) stay as they are.

`unchanged` are the names whose tensors are equal bit for bit, by digest; of partly trained ones the untrained entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.changed import Copied, slots, unchangeable
from pellucid.engine.edits import Replace
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.tuning.objective import Opened

Layers = int | slice | Sequence[int]


@dataclass(frozen=True)
class Only:
    """What is trained: whole `layers`, `heads` and `neurons` by layer, parameters by their `names`; and the answer's `head`.

    >>> Only(heads={2: [0, 3]}, head=False)
    Only(layers=None, heads={2: [0, 3]}, neurons={}, names=(), head=False, stack='')
    """

    layers: Layers | None = None
    heads: Mapping[int, Sequence[int]] = field(default_factory=dict)
    neurons: Mapping[int, Sequence[int]] = field(default_factory=dict)
    names: Sequence[str] = ()
    head: bool = True
    stack: str = ""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Parameters of a copy that are trained; `masks` say which entries, where not all; `head` are those of the answer's head."""

    model: Model
    parameters: dict[str, Tensor]
    masks: dict[str, Tensor]
    head: frozenset[str]

    def mask(self) -> None:
        """Gradients of entries that are not chosen become 0."""
        for name, mask in self.masks.items():
            g = self.parameters[name].grad
            if g is not None:
                g.mul_(mask.to(g))

    def changed(self, before: Model) -> list[str]:
        """Names of tensors outside the choice that are not what they were; empty is the proof."""
        own = {name: getattr(*slot) for name, slot in slots(self.model.module).items()}
        found = []
        for name, slot in slots(before.module).items():
            old, new = getattr(*slot).detach(), own[name].detach()
            if name in self.masks:
                rest = ~self.masks[name]
                same = torch.equal(old[rest], new[rest])
            else:
                same = name in self.parameters or _tied(own, name, self.parameters) or torch.equal(old, new)
            found += [] if same else [name]
        return found


def choose(model: Model, only: Any = None) -> Chosen:
    """A copy of the model with the chosen parameters in memory of their own. `only`: None for all that require gradients
    (of a model with adapters these), layers, or `Only`. InputError for what is not there; Refused for what cannot be trained.
    """
    named = dict(model.module.named_parameters())
    head = head_of(model)
    masks: dict[str, Tensor] = {}
    if only is None:
        chosen = [name for name, p in named.items() if p.requires_grad]
        if not chosen:
            raise InputError(
                "every parameter of this model is frozen: say layers=..., or set requires_grad where it may change"
            )
    else:
        own = only if isinstance(only, Only) else Only(layers=only)
        chosen, masks = asked(model, own, named)
        chosen += [name for name in sorted(head) if own.head and name not in chosen]
        if not chosen:
            raise InputError(f"{only!r} names no parameter of this model")
    for name in chosen:
        if why := unchangeable(named[name]):
            raise Refused(f"{name} cannot be trained: {why}; train adapters on it (peft), or other layers")
        if only is not None and not named[name].requires_grad:
            raise InputError(
                f"{name} is frozen (requires_grad is False) and was asked to train: unfreeze it, or leave it out of layers="
            )
    twin = model.changed(Copied(tuple(chosen)))
    copied = dict(twin.module.named_parameters())
    return Chosen(twin, {name: copied[name] for name in chosen}, masks, head & set(chosen))


def head_of(model: Model) -> frozenset[str]:
    """Parameters by which the answer is read off the last block, but those tied to the embeddings."""
    stack = model.anatomy.stacks[-1]
    cut = Opened(f"{stack.name + '.' if stack.name else ''}layers.{len(stack.blocks) - 1}.resid_post")
    named = [(name, p) for name, p in model.module.named_parameters() if p.is_floating_point()]
    free = [p.requires_grad for _, p in named]

    @dataclass(frozen=True, eq=False, repr=False)
    class Cut(Opened):
        def new(self, x: Tensor, place: Any) -> Tensor:
            return super().new(x.detach(), place)

    try:
        for _, p in named:
            p.requires_grad_(True)
        with torch.enable_grad():
            run = model.run(dict(model.anatomy.inputs), edits=[Cut(cut.site)], grad=True)
            found = torch.autograd.grad(run.logits.float().square().sum(), [p for _, p in named], allow_unused=True)
    finally:
        for (_, p), was in zip(named, free, strict=True):
            p.requires_grad_(was)
    tied = {id(p) for _, p in _embedding(model)}
    inside = tuple(f"{b.module}." for s in model.anatomy.stacks for b in s.blocks)
    return frozenset(
        name for (name, p), g in zip(named, found, strict=True)
        if g is not None and id(p) not in tied and not name.startswith(inside)
    )  # fmt: skip


def _embedding(model: Model) -> list[tuple[str, Tensor]]:
    table: Any = model.module.get_input_embeddings()  # type: ignore[operator]
    return list(table.named_parameters())


def asked(model: Model, only: Only, named: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the parameters of a choice (its `head` not counted), and for those that are chosen in part the entries."""
    stack = (
        next((s for s in model.anatomy.stacks if s.name == only.stack), None)
        if only.stack
        else model.anatomy.stacks[-1]
    )
    if stack is None:
        raise InputError(
            f"stack={only.stack!r}: this model has {', '.join(s.name or 'one' for s in model.anatomy.stacks)}"
        )
    n = len(stack.blocks)
    chosen: list[str] = []
    layers = only.layers if only.layers is not None else []
    if not isinstance(layers, int | slice) and (isinstance(layers, str) or not all(isinstance(i, int) for i in layers)):
        raise InputError(
            f"layers={layers!r}: expected layers by number, slice or list (slice(None): all), or Only(...)"
        )
    for i in range(n)[layers] if isinstance(layers, slice) else [layers] if isinstance(layers, int) else layers:
        if not -n <= i < n:
            raise InputError(f"there is no layer {i}: this stack has {n} (0 to {n - 1})")
        chosen += [name for name in named if name.startswith(f"{stack.blocks[i].module}.")]
    for name in only.names:
        if name not in named:
            raise InputError(f"there is no parameter {name!r} in this model")
        places = [
            other for other, slot in slots(model.module).items() if getattr(*slot) is named[name] and other != name
        ]
        if places:
            raise InputError(f"{name} is tied with {', '.join(places)}: it cannot be trained alone")
        chosen.append(name)
    masks: dict[str, Tensor] = {}
    for part, units in (("attn.z", only.heads), ("mlp.neurons", only.neurons)):
        for layer, own in units.items():
            for name, mask in owned(model, part, stack.name, layer % n, own).items():
                if name not in chosen or name in masks:
                    masks[name] = masks[name] | mask if name in masks else mask
    return list(dict.fromkeys([*chosen, *masks])), masks


def owned(model: Model, part: str, stack: str, layer: int, units: Sequence[int]) -> dict[str, Tensor]:
    """Which entries of which parameters are these units' alone: masks by name. `part` is attn.z (heads) or mlp.neurons."""
    site = Site(part, layer, stack)
    (site,) = model.sites(site)
    block = next(s for s in model.anatomy.stacks if s.name == stack).blocks[layer]
    named = {
        n: p for n, p in model.module.named_parameters() if n.startswith(f"{block.module}.") and p.is_floating_point()
    }
    free = {n: p.requires_grad for n, p in named.items()}
    given = dict(model.anatomy.inputs)
    noise = torch.Generator().manual_seed(0)
    reached: list[list[Tensor | None]] = []
    try:
        for p in named.values():
            p.requires_grad_(True)
        with torch.enable_grad():
            met = model.run(given, keep=[site], grad=True).tensor(site)
            size = met.shape[2]
            if not units or not all(0 <= u < size for u in units):
                raise InputError(f"units {list(units)} of {str(site)!r}: expected some of 0 to {size - 1}")
            mine = torch.zeros(size, dtype=torch.bool)
            mine[list(units)] = True
            after = Site(part.split(".")[0] + ".out", layer, stack)
            for keep in (mine, ~mine):
                shaped = keep.reshape(-1, *[1] * (met.ndim - 3)).to(met)
                weights = torch.randn(met.shape, generator=noise).to(met)
                met = model.run(given, keep=[site], grad=True).tensor(site)
                ins = torch.autograd.grad((met * shaped * weights).sum(), list(named.values()), allow_unused=True)
                drawn = torch.randn(met.shape, generator=noise).to(met) * shaped
                out = model.run(given, keep=[after], edits=[Replace(site, partial(_instead, drawn))], grad=True).tensor(
                    after
                )
                outs = torch.autograd.grad(
                    (out * torch.randn(out.shape, generator=noise).to(out)).sum(),
                    list(named.values()),
                    allow_unused=True,
                )
                floors = _rounding(ins), _rounding(outs)
                reached.append([_either(a, b, floors) for a, b in zip(ins, outs, strict=True)])
    finally:
        for n, p in named.items():
            p.requires_grad_(free[n])
    found: dict[str, Tensor] = {}
    for name, own, rest in zip(named, *reached, strict=True):
        if own is not None and bool((alone := own & ~rest if rest is not None else own).any()):
            found[name] = alone
    return found


def _instead(drawn: Tensor, x: Tensor) -> Tensor:
    return drawn


def _rounding(gradients: Sequence[Tensor | None]) -> float:
    return 1e-6 * max((float(g.abs().max()) for g in gradients if g is not None), default=0.0)


def _either(a: Tensor | None, b: Tensor | None, floors: tuple[float, float]) -> Tensor | None:
    """Where one of two gradients is not 0; one that is all rounding (a key's bias, to which softmax is blind) is none."""
    known = [
        x.detach() != 0
        for x, floor in zip((a, b), floors, strict=True)
        if x is not None and float(x.abs().max()) > floor
    ]
    return None if not known else known[0] if len(known) == 1 else known[0] | known[1]


def _tied(own: Mapping[str, Tensor], name: str, parameters: Mapping[str, Tensor]) -> bool:
    return any(own[name] is p for p in parameters.values())
