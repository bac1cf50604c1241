"""What can happen at a site, as values: ablate, patch, steer, scale, project out, replace.

An edit names its site and says what the tensor there becomes. Which unit, positions, rows and generation steps that is
written to is the engine's business. All edits let gradients through, to the old value and to what they bring in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from pellucid.anatomy.sites import Position, Site
from pellucid.errors import InputError

if TYPE_CHECKING:
    from pellucid.engine.run import Run

How = Literal["zero", "mean", "position_mean", "resample"]


@dataclass(frozen=True, eq=False)
class Step:
    """What a condition sees while generating: the number of tokens generated so far and which, [batch, index]."""

    index: int
    tokens: Tensor


Condition = Callable[[Step], "bool | Tensor"]


@dataclass(frozen=True, eq=False)
class Place:
    """The surroundings of an edit."""

    site: Site
    values: Tensor  # [batch, position, ...] the site's unit at every position
    real: Tensor  # [batch, position] False on padding
    positions: Tensor  # [batch, n] the chosen positions, counted from each row's first real token
    lengths: Tensor  # [batch] real tokens of each prompt
    generating: bool = False


@dataclass(frozen=True, eq=False)
class Edit:
    """Base of the edits. `new` is given the values at the chosen positions, [batch, n, ...] (for scores and patterns
    n counts queries), and returns what stands there instead. `when` decides at each generation step."""

    site: Site | str
    when: Condition | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site.parse(self.site))

    def new(self, x: Tensor, place: Place) -> Tensor:
        raise NotImplementedError

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the fields that hold a run (or prompts to be run) which must have kept this edit's site."""
        return ()


@dataclass(frozen=True, eq=False)
class Ablate(Edit):
    """Remove what a site says: set it to zero, or to what it is on average over a stated reference.

    `how`: "zero"; "mean" over all real positions and prompts of the reference; "position_mean" over its prompts only;
    "resample": another prompt's value at the same position, prompts drawn by `seed`. The reference is a run that
    kept the site, or prompts; without one it is the batch itself.

    >>> Ablate("layers.9.attn.heads.9").how
    'zero'
    """

    how: How = "zero"
    reference: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.how not in get_args(How):
            raise InputError(f"cannot ablate by {self.how!r}: expected one of {', '.join(get_args(How))}")

    @property
    def sources(self) -> tuple[str, ...]:
        return ("reference",)

    def new(self, x: Tensor, place: Place) -> Tensor:
        if self.how == "zero":
            return torch.zeros_like(x)
        values, lengths = _reference(self.reference, place)
        real = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
        if self.how == "mean":
            return values[real].mean(0).expand_as(x)
        if self.how == "position_mean":
            weight = real.to(values.dtype).reshape(*real.shape, *[1] * (values.ndim - 2))
            mean = (values * weight).sum(0) / weight.sum(0).clamp_min(1)
            return _at(mean[None], lengths.max()[None], place.positions)
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randint(len(values), (len(x),), generator=generator).to(x.device)
        return _at(values[rows], lengths[rows], place.positions)


@dataclass(frozen=True, eq=False)
class Patch(Edit):
    """Put in the values of another run (one that kept the site, or a prompt to run), at the same positions.

    `source_at` names other positions of the source to take them from. A tensor is put in as it is (broadcast to
    [batch, n, ...]).
    """

    source: Run | Tensor | str | Sequence[str] = field(kw_only=False, default=None)  # type: ignore[assignment]
    source_at: Position = None

    @property
    def sources(self) -> tuple[str, ...]:
        return () if isinstance(self.source, Tensor) else ("source",)

    def new(self, x: Tensor, place: Place) -> Tensor:
        if isinstance(self.source, Tensor):
            return self.source.to(x.device, x.dtype).expand_as(x)
        values, lengths = _reference(self.source, place)
        if self.source_at is not None:
            stream = self.source.stream(place.site)  # type: ignore[union-attr]
            columns = stream.find(self.source_at)
            assert columns is not None
            positions = columns - stream.starts[:, None]
            return _at(values, lengths, positions.expand(len(x), -1))
        if not place.generating and bool((lengths != place.lengths).any()):
            raise InputError(
                f"cannot patch {str(place.site)!r} from a prompt of {lengths.tolist()} tokens into one of "
                f"{place.lengths.tolist()}: positions do not align; give source_at=... or prompts of equal length"
            )
        inside = place.positions < lengths[:, None]
        new = _at(values, lengths, place.positions.clamp(max=int(lengths.max()) - 1))
        return torch.where(inside.reshape(*inside.shape, *[1] * (x.ndim - 2)), new, x)


@dataclass(frozen=True, eq=False)
class Steer(Edit):
    """Add `strength * vector` to the site. The vector broadcasts to [batch, n, ...]; usually it is [d_model]."""

    vector: Tensor = field(default=None)  # type: ignore[assignment]
    strength: float = 1.0

    def new(self, x: Tensor, place: Place) -> Tensor:
        return x + self.strength * self.vector.to(x.device, x.dtype)


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """Multiply the site by a factor (a number or something that broadcasts)."""

    factor: float | Tensor = 1.0

    def new(self, x: Tensor, place: Place) -> Tensor:
        return x * self.factor


@dataclass(frozen=True, eq=False)
class ProjectOut(Edit):
    """Remove the span of some directions, [d] or [k, d], from the last dimension of the site."""

    directions: Tensor = field(default=None)  # type: ignore[assignment]

    def new(self, x: Tensor, place: Place) -> Tensor:
        rows = torch.atleast_2d(self.directions).to(x.device, torch.float64)
        basis = torch.linalg.qr(rows.T)[0].to(x.dtype)  # [d, k], orthonormal
        return x - (x @ basis) @ basis.T


@dataclass(frozen=True, eq=False)
class Replace(Edit):
    """Put in whatever `function` makes of the values [batch, n, ...]."""

    function: Callable[[Tensor], Tensor] = field(default=None)  # type: ignore[assignment]

    def new(self, x: Tensor, place: Place) -> Tensor:
        new = self.function(x)
        if not isinstance(new, Tensor) or new.shape != x.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise InputError(f"the function at {str(place.site)!r} must return a tensor of shape {tuple(x.shape)}, not {got}")
        return new


def left_aligned(values: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Values [batch, position, ...] with each row's first real token in column 0, and the rows' lengths."""
    lengths = real.long().sum(1)
    if bool(real[:, 0].all()):
        return values, lengths
    columns = real.long().argmax(1)[:, None] + torch.arange(int(lengths.max()), device=values.device)
    columns = columns.clamp(max=values.shape[1] - 1)
    return values[torch.arange(len(values), device=values.device)[:, None], columns], lengths


def _reference(source: Any, place: Place) -> tuple[Tensor, Tensor]:
    """The reference's values at the site's unit, left aligned [rows, position, ...], and its lengths."""
    if source is None:
        return left_aligned(place.values, place.real)
    values, real = source.everywhere(place.site)
    return left_aligned(values.to(place.values.device, place.values.dtype), real)


def _at(values: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
    """values[b, positions[b, i]]; a single row serves every row."""
    if len(values) not in (1, len(positions)):
        raise InputError(
            f"the reference has {len(values)} prompts but the run has {len(positions)}: expected one prompt or the same number"
        )
    beyond = positions >= lengths.expand(len(positions))[:, None]
    if bool(beyond.any()):
        raise InputError(
            f"position {int(positions[beyond].max())} is beyond the reference prompt, which has {int(lengths.min())} tokens"
        )
    rows = torch.arange(len(positions), device=values.device)[:, None] if len(values) > 1 else 0
    return values[rows, positions]
