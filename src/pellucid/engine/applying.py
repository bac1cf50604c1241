"""Writing an edit into a tensor: to its unit, at its positions, in the rows and steps where it holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pellucid.engine.edits import Edit, Place
from pellucid.engine.inputs import Stream
from pellucid.engine.locate import Spot


@dataclass(eq=False)
class Window:
    """The columns of a stream that a forward pass computes: all of the prompt, or what is new while generating."""

    stream: Stream
    offset: int = 0
    width: int | None = None  # None: as wide as the tensor at hand
    history: dict[int, list[Tensor]] = field(default_factory=dict)  # id of an edit -> its decision [batch] per step
    generating: bool = False

    def of(self, spot: Spot, n: int) -> Window:
        """The window as keys and values see it: they come with everything cached before."""
        if spot.tap.port not in ("k", "v") or self.width is None or n == self.width:
            return self
        return replace(self, offset=max(0, self.offset + self.width - n))

    def real(self, n: int) -> Tensor:
        """[batch, n] whether the columns hold real tokens; generated ones do."""
        mask = self.stream.mask.bool()
        columns = torch.arange(self.offset, self.offset + n, device=mask.device)
        return mask[:, columns.clamp(max=mask.shape[1] - 1)] | (columns >= mask.shape[1])

    def allowed(self, edit: Edit, n: int) -> Tensor | None:
        """[batch, n] what the edit's condition said when each column was first computed; None: no condition."""
        decisions = self.history.get(id(edit))
        if decisions is None:
            return None
        prompt = self.stream.mask.shape[1]
        steps = (max(0, c - prompt + 1) for c in range(self.offset, self.offset + n))
        return torch.stack([decisions[min(s, len(decisions) - 1)] for s in steps], 1)


def apply(edit: Edit, spot: Spot, x: Tensor, window: Window) -> Tensor:
    """The tensor `x` (canonical, the whole part) after an edit; the same object if the edit does not reach it."""
    axis = spot.position_axis - (spot.unit is not None and spot.unit_axis < spot.position_axis)
    values = (x if spot.unit is None else x.select(spot.unit_axis, spot.unit)).movedim(axis, 1)
    batch, n = values.shape[:2]
    window = window.of(spot, n)
    real = window.real(n)
    columns = window.stream.find(spot.site.at)
    everywhere = columns is None
    if columns is None:
        columns = torch.arange(n, device=x.device).expand(batch, n)
        chosen = real
    else:
        columns = columns - window.offset
        inside = (columns >= 0) & (columns < n)
        columns = columns.clamp(0, n - 1)
        chosen = inside & real.gather(1, columns)
    allowed = window.allowed(edit, n)
    if allowed is not None:
        chosen = chosen & allowed.gather(1, columns)
    if not bool(chosen.any()):
        return x
    rows = torch.arange(batch, device=x.device)[:, None]
    old = values if everywhere else values[rows, columns]
    positions = (columns + window.offset - window.stream.starts[:, None]).clamp_min(0)
    place = Place(spot.site, values, real, positions, window.stream.lengths, window.generating)
    new = edit.new(old, place).to(x.dtype)
    if not bool(chosen.all()):
        new = torch.where(chosen.reshape(*chosen.shape, *[1] * (old.ndim - 2)), new, old)
    if not everywhere:
        made = values.clone()
        made[rows, columns] = new
        new = made
    new = new.movedim(1, axis)
    if spot.unit is None:
        return new
    out = x.clone()
    out.select(spot.unit_axis, spot.unit).copy_(new)
    return out
