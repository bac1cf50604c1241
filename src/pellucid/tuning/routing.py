"""Which texts may change which parts, and how far weights reach: a model made in modules, and what each module carries.

Route       gradients of a text pass through the parts that are its own and through what belongs to nobody, never through another's
            part (gradient routing, Cloud et al. 2024). The forward pass is whole. For every text, exactly:
                activations of another's units are constants on the way back, and so are the entries of parameters that are
                another's units' alone (rows that write a unit, columns that read it)
            Detaching activations alone is not enough: a matrix that reads a unit learns from every value that passes.
            Parameters with such entries have no weight decay, so a part whose texts never come keeps every bit
Locality    units and channels lie on a line from 0 to 1; weights that reach far cost (Liu et al. 2023, brain-inspired modular training)
                sum |w_ij| |x_i - x_j| / sum |w_ij|     over rows and columns of an MLP's matrices; 1/3 if nothing is near
            control: the same with the channels' places shuffled

`parts_off` says what came of it: accuracy on each kind of text with each part silenced, beside as many random units. What else
carries it (attention, norms, the other part) stays: silencing is not removing.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.changed import slots
from pellucid.engine.edits import Edit, Place
from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique
from pellucid.tuning.data import Batch, Encoded, Rationales
from pellucid.tuning.objective import Objective, Pass, check_trained
from pellucid.tuning.parts import Only, asked, owned

_found: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()  # by module: what belongs to whom


@dataclass(frozen=True, eq=False, repr=False)
class Units(Edit):
    """Some units of a site are constants on the way back, or, with `silent`, 0."""

    units: tuple[int, ...] = ()
    silent: bool = False

    def new(self, x: Tensor, place: Place) -> Tensor:
        mine = torch.zeros(x.shape[2], dtype=torch.bool, device=x.device)
        mine[list(self.units)] = True
        mine = mine.reshape(-1, *[1] * (x.ndim - 3))
        return torch.where(mine, torch.zeros_like(x) if self.silent else x.detach(), x)


def units_of(model: Model, only: Only) -> dict[Site, tuple[int, ...]]:
    """The heads and neurons of a choice, by site."""
    stack = only.stack or model.anatomy.stacks[-1].name
    n = next((len(s.blocks) for s in model.anatomy.stacks if s.name == stack), 0)
    found = {}
    for part, units in (("attn.z", only.heads), ("mlp.neurons", only.neurons)):
        for layer, own in units.items():
            if not -n <= layer < n:
                raise InputError(f"there is no layer {layer}: this stack has {n} (0 to {n - 1})")
            (site,) = model.sites(Site(part, layer % n, stack))
            found[site] = tuple(int(u) for u in own)
    return found


@dataclass(frozen=True)
class Route(Objective):
    """Texts whose property `by` is a key of `parts` change what is theirs and what is nobody's, never what is another's (see
    the module); all other texts change what is nobody's. `parts` are `Only(heads=, neurons=, layers=, names=)` by value; of their
    `head=` nothing is taken. Has no loss of its own. InputError where parts overlap or the property is missing.

    >>> Route("topic", {"b": Only(neurons={1: [0, 1]})}).by
    'topic'
    """

    by: str = "topic"
    parts: Mapping[Any, Only] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"Route({self.by})"

    @property
    def properties(self) -> tuple[str, ...]:
        return (self.by,)

    def check(self, model: Model, data: Encoded) -> None:
        super().check(model, data)
        if not self.parts or not all(isinstance(each, Only) for each in self.parts.values()):
            raise InputError(f"parts={self.parts!r}: expected tuning.Only(...) by value of {self.by!r}")
        values = list(data.data.properties[self.by])
        for missing in [key for key in self.parts if key not in values]:
            raise InputError(f"{self.name}: no text has {self.by} {missing!r}, so nothing would ever change its part")
        taken: dict[str, Tensor] = {}
        named = dict(model.module.named_parameters())
        for value, own in self.entries(model).items():
            if not any(named[name].requires_grad for name in own):
                raise InputError(
                    f"{self.name}: nothing that is {value!r}'s alone is trained (frozen, or beside adapters)"
                )
        for own in self.entries(model).values():
            for name, mask in own.items():
                if name in taken and bool((taken[name] & mask).any()):
                    raise InputError(f"{self.name}: two parts share entries of {name}: give parts that do not overlap")
                taken[name] = taken[name] | mask if name in taken else mask

    def entries(self, model: Model) -> dict[Any, dict[str, Tensor]]:
        """Which entries of which parameters are each part's alone."""
        kept = _found.setdefault(model.module, {})
        key = repr(self.parts)
        if key not in kept:
            named, made = dict(model.module.named_parameters()), {}
            for value, only in self.parts.items():
                whole, masks = asked(model, only, named)
                made[value] = {
                    n: masks[n] if n in masks else torch.ones_like(named[n], dtype=torch.bool) for n in whole
                }
            kept[key] = made
        found: dict[Any, dict[str, Tensor]] = kept[key]
        return found

    def undecayed(self, model: Model) -> frozenset[str]:
        return frozenset(name for own in self.entries(model).values() for name in own)

    def groups(self, batch: Batch) -> list[Hashable]:
        """Whose each row is."""
        return [value if value in self.parts else None for value in batch.properties[self.by]]

    def edits_for(self, model: Model, group: Hashable) -> list[Edit]:
        return [
            Units(site, units)
            for value, only in self.parts.items() if value != group
            for site, units in units_of(model, only).items()
        ]  # fmt: skip

    @contextmanager
    def closed(self, model: Model, group: Hashable) -> Iterator[None]:
        """While this lasts, entries that are another's are constants."""
        forbidden: dict[str, Tensor] = {}
        for value, own in self.entries(model).items():
            for name, mask in own.items() if value != group else ():
                forbidden[name] = forbidden[name] | mask if name in forbidden else mask
        places, parameters = slots(model.module), dict(model.module.named_parameters())
        put = []
        try:
            for name, mask in forbidden.items():
                p = parameters[name]
                if p.requires_grad:
                    routed = torch.where(mask.to(p.device), p.detach(), p)
                    for owner, attribute in [slot for slot in places.values() if getattr(*slot) is p]:
                        put.append((owner, attribute, p))
                        owner._parameters[attribute] = routed  # type: ignore[assignment]
            yield
        finally:
            for owner, attribute, p in put:
                owner._parameters[attribute] = p

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class Locality(Objective):
    """Weights of MLPs that reach far along a line cost (see the module). `layers`: None for all of the last stack.

    >>> Locality(weight=1.0).shuffled
    False
    """

    layers: Sequence[int] | None = None
    shuffled: bool = field(default=False, kw_only=True)

    def control(self) -> Objective:
        return replace(self, shuffled=True)

    def check(self, model: Model, data: Encoded) -> None:
        if not self.matrices(model):
            raise InputError(f"{self.name}: no matrix of an MLP's own neurons was found in layers {self.layers}")
        check_trained(model, self.matrices(model), self.name)

    def matrices(self, model: Model) -> dict[str, int]:
        """Matrices that write or read neurons, and which of their axes the neurons lie on."""
        kept = _found.setdefault(model.module, {})
        key = ("matrices", repr(self.layers))
        if key not in kept:
            stack, found = model.anatomy.stacks[-1], {}
            for i in range(len(stack.blocks)) if self.layers is None else self.layers:
                for name, mask in owned(model, "mlp.neurons", stack.name, int(i) % len(stack.blocks), [0]).items():
                    if mask.ndim == 2:
                        found[name] = 0 if bool(mask.any(1).sum() == 1) else 1
            kept[key] = found
        known: dict[str, int] = kept[key]
        return known

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor:
        parameters, found = dict(seen.model.module.named_parameters()), []
        for name, axis in self.matrices(seen.model).items():
            w = parameters[name].float().abs()
            ends = [torch.linspace(0, 1, n, device=w.device) for n in w.shape]
            if self.shuffled:
                order = torch.randperm(w.shape[1 - axis], generator=torch.Generator().manual_seed(0))
                ends[1 - axis] = ends[1 - axis][order.to(w.device)]
            far = (ends[0][:, None] - ends[1][None]).abs()
            found.append((w * far).sum() / w.sum())
        return torch.stack(found).mean()

    def __hash__(self) -> int:
        return hash(repr(self))


@technique
def parts_off(
    model: Model, data: Rationales, by: str, parts: Mapping[Any, Only], *, edits: Sequence[Edit] = (), draws: int = 3, seed: int = 0
) -> Result:  # fmt: skip
    """What does each part carry? Accuracy on each kind of text with a part's units silenced, beside as many random ones.

    `parts` are `Only(heads=, neurons=)` by value of the property `by`. Gives `accuracy` and `lost` (against the whole model) over
    [`off`, `texts`]: off "nothing", each part, and "random", the mean of `draws` draws of as many units as the largest part, at its sites.

    >>> parts_off(tuned.model, data, "praise", {True: Only(neurons={1: [0, 1]})}).data.sizes
    Frozen({'off': 3, 'texts': 2})
    """
    at_least(1, draws=draws)
    encoded = Encoded(model, data)
    encoded.check_properties([by], "parts_off")
    kinds = list(dict.fromkeys(data.properties[by]))
    silenced: list[tuple[str, list[list[Edit]]]] = [("nothing", [[]])]
    by_size = {}
    for value, only in parts.items():
        own = units_of(model, only)
        if not own:
            raise InputError(f"parts[{value!r}] has neither heads nor neurons: only these can be silenced")
        by_size[sum(map(len, own.values()))] = own
        silenced.append((str(value), [[Units(site, units, True) for site, units in own.items()]]))
    drawn, largest = np.random.default_rng(seed), by_size[max(by_size)]
    with torch.no_grad():
        met = model.run(encoded.batch([0]).inputs, keep=list(largest))
    sizes = {site: met.tensor(site).shape[2] for site in largest}
    silenced.append(("random", [
        [Units(site, tuple(drawn.choice(sizes[site], len(units), replace=False).tolist()), True) for site, units in largest.items()]
        for _ in range(draws)
    ]))  # fmt: skip
    rows = np.array([kinds.index(value) for value in data.properties[by]])
    accuracy = np.zeros((len(silenced), len(kinds)))
    for i, (_, several) in enumerate(silenced):
        for cut in several:
            right = np.concatenate([_right(model, encoded, range(a, min(a + 32, len(encoded))), [*edits, *cut]) for a in range(0, len(encoded), 32)])  # fmt: skip
            accuracy[i] += [right[rows == k].mean() / len(several) for k in range(len(kinds))]
    frame = xr.Dataset(
        {"accuracy": (("off", "texts"), accuracy), "lost": (("off", "texts"), accuracy[:1] - accuracy)},
        {"off": [name for name, _ in silenced], "texts": [str(kind) for kind in kinds]},
    )
    return Result(frame, kind="parts_off", title=_said(frame, [str(value) for value in parts]))


@torch.no_grad()
def _right(model: Model, data: Encoded, rows: range, edits: Sequence[Edit]) -> np.ndarray:
    batch = data.batch(rows)
    z = batch.read(model.run(batch.inputs, edits=edits).logits)
    wrong = batch.by_row((z.argmax(-1) != batch.answers.to(z.device)).float())
    return (wrong == 0).cpu().numpy().astype(float)


def _said(frame: xr.Dataset, parts: Sequence[str]) -> str:
    lost, said = frame["lost"], []
    for part in parts:
        if part not in frame["texts"]:
            continue
        own = float(lost.sel(off=part, texts=part))
        rest = float(lost.sel(off=part).drop_sel(texts=part).mean()) if frame.sizes["texts"] > 1 else float("nan")
        by_chance = float(lost.sel(off="random", texts=part))
        if own <= max(by_chance, rest) + 0.05:
            said.append(
                f"{part}'s part carries no more of it than others do ({own:+.2f}, random units {by_chance:+.2f})"
            )
        else:
            said.append(
                f"{part}'s part off costs its texts {own:.2f} and others {rest:.2f} (random units {by_chance:.2f})"
            )
    return "; ".join(said) or "No part is named as a kind of text"
