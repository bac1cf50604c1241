"""Writing an edit into a tensor: to its unit, at its positions, in the rows and steps where it holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pellucid.engine.edits import Edit, Place, turned
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.locate import Spot
from pellucid.errors import Refused


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


MASKED = -5e3  # scores below it are masked: families write from -1e4 to minus infinity


def apply(edit: Edit, spot: Spot, x: Tensor, window: Window) -> Tensor:
    """The tensor `x` (canonical, the whole part) after an edit; the same object if the edit does not reach it."""
    axis = spot.position_axis - (spot.unit is not None and spot.unit_axis < spot.position_axis)
    values = (x if spot.unit is None else x.select(spot.unit_axis, spot.unit)).movedim(axis, 1)
    batch, n = values.shape[:2]
    window = window.of(spot, n)
    columns = window.stream.find(spot.site.at)
    everywhere = columns is None
    if not window.fits(n) and (not everywhere or edit.sources or window.stream.padded):
        raise Refused(
            f"{str(spot.site)!r} has {n} positions for a prompt of {window.stream.ids.shape[1]} tokens: they cannot be told apart"
        )
    # a model spread over devices has its prompts on the first
    real, starts = window.real(n).to(x.device), window.stream.starts.to(x.device)
    if columns is None:
        columns = torch.arange(n, device=x.device).expand(batch, n)
        chosen = real
    else:
        columns = columns.to(x.device) - window.offset
        inside = (columns >= 0) & (columns < n)
        columns = columns.clamp(0, n - 1)
        chosen = inside & real.gather(1, columns)
    allowed = window.allowed(edit, n)
    if allowed is not None:
        chosen = chosen & allowed.to(x.device).gather(1, columns)
    if not bool(chosen.any()):
        return x
    keyed = "key" in spot.site.dims
    if keyed:
        by = window.first_key(n, values.shape[-1]).to(x.device)
        values = turned(values, by, values.ndim - 1)
    rows = torch.arange(batch, device=x.device)[:, None]
    old = values if everywhere else values[rows, columns]
    positions = (columns + window.offset - starts[:, None]).clamp_min(0)
    place = Place(spot.site, window.stream, values, real, positions, window.generating)
    new = edit.new(old, place).to(x.dtype)
    if spot.site.part.endswith(".scores"):
        new = torch.where(old < MASKED, old, new)
    if not bool(chosen.all()):
        new = torch.where(chosen.reshape(*chosen.shape, *[1] * (old.ndim - 2)), new, old)
    if not everywhere:
        made = values.clone()
        made[rows, columns] = new
        new = made
    if keyed:
        new = turned(new, -by, new.ndim - 1)
    new = new.movedim(1, axis)
    if spot.unit is None:  # laid out in memory as the model made it: some families call view
        return new if new.stride() == x.stride() else torch.empty_like(x).copy_(new)
    out = x.clone()
    out.select(spot.unit_axis, spot.unit).copy_(new)
    return out
