"""Writing edits into the tensors of a forward pass: where each is met, in whose rows, columns and steps it holds.

An edit knows values (`pellucid.engine.edits`); here it gets its place on the map (`placed`), and the tensor of its tap as
the model has it there is changed at the edit's unit and positions only (`apply`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Tap
from pellucid.engine.edits import Edit, Place, brought, like, turned
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.locate import Spot, block_of, spots
from pellucid.errors import InputError, Refused, SiteError


@dataclass(eq=False)
class Chosen:
    """Where an edit is written in a tensor of n positions, all on the host."""

    everywhere: bool  # at every position, none named
    columns: Tensor  # [batch, k] of the tensor
    which: Tensor  # [batch, k] those of them that it is written to
    real: Tensor  # [batch, n]
    positions: Tensor  # [batch, k] counted from each row's first real token
    any: bool
    all: bool


@dataclass(eq=False)
class Window:
    """The columns of a stream that a forward pass computes: all of the prompt, or what is new while generating."""

    stream: Stream
    keys: Stream  # the tokens its queries look at: those of the encoder in cross-attention
    offset: int = 0
    width: int | None = None  # None: as wide as the tensor at hand
    history: dict[int, list[Tensor]] = field(default_factory=dict)  # id of an edit -> its decision [batch] per step
    generating: bool = False

    @classmethod
    def on(cls, inputs: Inputs, spot: Spot, offset: int = 0) -> Window:
        return cls(inputs.stream(spot.stream), inputs.stream(spot.keys), offset)

    def of(self, spot: Spot, n: int) -> Window:
        """The window as keys and values see it: they come with everything cached before."""
        if spot.tap.port not in ("k", "v") or self.width is None or n == self.width:
            return self
        return replace(self, offset=max(0, self.offset + self.width - n))

    def fits(self, n: int) -> bool:
        """Whether a tensor of n positions has one for each token; some families put tokens in, or merge them."""
        return self.generating or n == self.stream.ids.shape[1] - self.offset

    def first_key(self, queries: int, keys: int) -> Tensor:
        """[batch] where each row's first real token is among the keys; a cache with a window has dropped the oldest."""
        dropped = 0 if self.keys is not self.stream else max(0, self.offset + queries - keys)
        return (self.keys.starts - dropped).clamp_min(0)

    def real(self, n: int) -> Tensor:
        """[batch, n] whether the columns hold real tokens, on the host; generated ones do."""
        mask = self.stream.real
        columns = torch.arange(self.offset, self.offset + n)
        return mask[:, columns.clamp(max=mask.shape[1] - 1)] | (columns >= mask.shape[1])

    def chosen(self, edit: Edit, site: Site, n: int) -> Chosen:
        """Where an edit of a site is written; of prompts it is told once, however many variants ask."""
        key = (site.at, edit.tokens, self.offset, n)
        known = self.stream.placed
        if self.generating or id(edit) in self.history or key not in known:
            found = self._chosen(edit, site, n)
            if self.generating or id(edit) in self.history:
                return found
            known[key] = found
        return known[key]

    def _chosen(self, edit: Edit, site: Site, n: int) -> Chosen:
        real, columns = self.real(n), self.stream.find(site.at)
        everywhere = columns is None
        if columns is None:
            columns, which = torch.arange(n).expand(len(real), n), real
        else:
            columns = columns - self.offset
            inside = (columns >= 0) & (columns < n)
            columns = columns.clamp(0, n - 1)
            which = inside & real.gather(1, columns)
        positions = (columns + self.offset - self.stream.starts[:, None]).clamp_min(0)
        if edit.tokens is not None:
            first, end = (each[:, None] for each in edit.between(self.stream.lengths))
            which = which & (positions >= first) & (positions < end)
        allowed = self.allowed(edit, n)
        if allowed is not None:
            which = which & allowed.cpu().gather(1, columns)
        return Chosen(everywhere, columns, which, real, positions, bool(which.any()), bool(which.all()))

    def allowed(self, edit: Edit, n: int) -> Tensor | None:
        """[batch, n] what the edit's condition said when each column was first computed; None: no condition."""
        decisions = self.history.get(id(edit))
        if decisions is None:
            return None
        prompt = self.stream.mask.shape[1]
        steps = (max(0, c - prompt + 1) for c in range(self.offset, self.offset + n))
        return torch.stack([decisions[min(s, len(decisions) - 1)] for s in steps], 1)


MASKED = -5e3  # scores below it are masked: families write from -1e4 to minus infinity


def apply(edit: Edit, spot: Spot, x: Tensor, window: Window, inside: bool = False) -> Tensor:
    """The tensor `x` (canonical, the whole part) after an edit; the same object if the edit does not reach it, or where it may
    be written `inside` x."""
    axis = spot.position_axis - (spot.unit is not None and spot.unit_axis < spot.position_axis)
    values = (x if spot.unit is None else x.select(spot.unit_axis, spot.unit)).movedim(axis, 1)
    batch, n = values.shape[:2]
    window = window.of(spot, n)
    if not window.fits(n) and (window.stream.find(spot.site.at) is not None or edit.sources or window.stream.padded):
        raise Refused(
            f"{str(spot.site)!r} has {n} positions for a prompt of {window.stream.ids.shape[1]} tokens: they cannot be told apart"
        )
    where = window.chosen(edit, spot.site, n)
    if not where.any:
        return x
    keyed = "key" in spot.site.dims
    if keyed:
        by = window.first_key(n, values.shape[-1])
        values = turned(values, by, values.ndim - 1)
    rows = torch.arange(batch, device=x.device)[:, None]
    index = brought(where.columns, x)  # a model spread over devices has its prompts on the first
    old = values if where.everywhere else values[rows, index]
    place = Place(spot.site, window.stream, values, where.real, where.positions, window.generating)
    new = edit.new(old, place).to(x.dtype)
    if spot.site.part.endswith(".scores"):
        new = torch.where(old < MASKED, old, new)
    if not where.all:
        new = torch.where(like(where.which, old), new, old)
    if inside and not keyed:
        if where.everywhere:
            values.copy_(new)
        else:
            values[rows, index] = new
        return x
    if not where.everywhere:
        made = values.clone()
        made[rows, index] = new
        new = made
    if keyed:
        new = turned(new, -by, new.ndim - 1)
    new = new.movedim(1, axis)
    if spot.unit is None:  # laid out in memory as the model made it: some families call view
        return new if new.stride() == x.stride() else torch.empty_like(x).copy_(new)
    out = x.clone()
    out.select(spot.unit_axis, spot.unit).copy_(new)
    return out


# ---- edits on their taps


class Written:
    """An edit at the tap of its own site."""

    def __init__(self, edit: Edit, spot: Spot) -> None:
        self.edit, self.spot = edit, spot
        self.taps: tuple[Tap, ...] = (spot.tap,)

    def meet(self, tap: Tap, x: Tensor, window: Window, inside: bool = False) -> Tensor:
        """The tensor as the edit leaves it; `inside`: x is the caller's own and may be written to."""
        return apply(self.edit, self.spot, x, window, inside)


class Middle(Written):
    """An edit of resid_mid in a pre-norm block: no module hands that state on alone, so the change is carried by the
    last of its summands (mid = sum of c * summand, hence new summand = old + (new mid - old mid) / c)."""

    def __init__(self, edit: Edit, spot: Spot, anatomy: Anatomy) -> None:
        super().__init__(edit, spot)
        block = block_of(anatomy, spot.site)
        state = block.states[-1]
        terms = [t for t in state.terms if not t.source.startswith("mlp")]
        if len(terms) == 1 and terms[0].source.startswith("state "):  # the middle is a state of its own
            state = block.states[int(terms[0].source.removeprefix("state "))]
            terms = list(state.terms)
        taps = [t.carried or block.taps.get("resid_pre" if t.source == "in" else t.source) for t in terms]
        if None in taps:
            raise Refused(f"{str(spot.site)!r} can be kept, but not edited: one of its summands cannot be met")
        self.constant = state.constant
        self.coefficients = {tap: t.coefficient for tap, t in zip(taps, terms, strict=True) if tap is not None}
        self.taps = tuple(self.coefficients)
        self._met: dict[Tap, Tensor] = {}

    def meet(self, tap: Tap, x: Tensor, window: Window, inside: bool = False) -> Tensor:
        self._met[tap] = x
        if len(self._met) < len(self.taps):
            return x
        c = self.coefficients[tap]
        rest: Any = 0.0 if self.constant is None else self.constant
        for t, value in self._met.items():
            rest = rest + value * self.coefficients[t] if t is not tap else rest
        self._met = {}
        mid = rest + x * c
        new = apply(self.edit, self.spot, mid, window)
        if new is mid:
            return x
        x = x + (new - mid) / c
        return x + ((new - (rest + x * c)) / c).detach()  # once more: a zero must come out as a zero, not as 1e-8


@dataclass(frozen=True, eq=False)
class Zeros(Edit):
    """Adds zeros. Their gradient is that of the state they are added to, all ways out of it counted."""

    added: list[Tensor] = field(default_factory=list)

    def new(self, x: Tensor, place: Place) -> Tensor:
        self.added.append(torch.zeros_like(x, requires_grad=True))
        return x + self.added[-1]


def placed(anatomy: Anatomy, edits: Sequence[Edit]) -> list[Written]:
    """The edits on the model's taps, selectors expanded. SiteError or Refused where a site cannot be written to."""
    return [_placed(anatomy, edit, spot) for edit in edits for spot in spots(anatomy, edit.site)]


def _placed(anatomy: Anatomy, edit: Edit, spot: Spot) -> Written:
    site = spot.site
    if site.port == "heads" and site.part.endswith(".out"):
        raise SiteError(f"{str(site)!r} cannot be edited: edit the head itself, {str(site).replace('.out', '')!r}")
    if not shows_one_reader(anatomy, spot):
        return Written(edit, spot)
    if site.part == "resid_mid":
        return Middle(edit, spot, anatomy)
    raise Refused(f"{str(site)!r} can be kept, but not edited: this layer is no module of its own")


def check_unconditional(edits: Sequence[Edit]) -> None:
    conditional = next((e for e in edits if e.when is not None), None)
    if conditional is not None:
        raise InputError(
            f"the edit on {str(conditional.site)!r} has a condition, which is asked while generating; a run has no steps"
        )


def shows_one_reader(anatomy: Anatomy, spot: Spot) -> bool:
    """Whether the tap shows a residual to one of its readers only: what is written there would miss the others."""
    site = spot.site
    if site.part not in ("embed", "resid_pre", "resid_mid", "resid_post") or spot.tap.port != "in":
        return False
    return site.part == "resid_mid" or not block_of(anatomy, replace(site, stack=spot.stream)).whole
