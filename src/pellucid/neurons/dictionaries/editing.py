"""What happens to the model when a feature is silenced, amplified or put in?

With f = encode(x) and changed activations f', a site becomes

    change    x + (f' - f) W_dec          only the features named differ; what the dictionary misses stays
    splice    decode(f)                   everything the dictionary misses is lost

(Marks et al. 2024 call x - decode(f) the error term.) Rows beyond the dictionary's limit stay as they are. Where the
dictionary is a transcoder f is heard at the site it reads, by an edit that leaves it as it is, and the site it writes
to is edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pellucid.anatomy.sites import Position, Site
from pellucid.engine.edits import Edit, Patch, Place
from pellucid.errors import InputError, among

Change = Literal["ablate", "scale", "set", "steer"]
Positions = int | Sequence[int] | slice | str | None


class Coder(Protocol):
    """What the edits need of a dictionary."""

    @property
    def site(self) -> str: ...
    @property
    def writes(self) -> str: ...
    @property
    def decoder(self) -> Tensor: ...
    @property
    def digest(self) -> str: ...

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, f: Tensor) -> Tensor: ...
    def within(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Hear(Edit):
    """Changes nothing; remembers what was read at the site, for the edit that writes elsewhere in the same pass."""

    heard: list[Tensor] = field(default_factory=list)

    def new(self, x: Tensor, place: Place) -> Tensor:
        self.heard[:] = [x]
        return x


@dataclass(frozen=True, eq=False)
class DictionaryEdit(Edit):
    """Base: `read` gives what the dictionary reads, whether here or where `ear` heard it, which then forgets it."""

    dictionary: Coder
    ear: Hear | None = None

    @property
    def digest(self) -> str:
        return self.dictionary.digest

    def read(self, x: Tensor) -> Tensor:
        width = self.dictionary.decoder.shape[1]
        if x.shape[-1] != width:
            raise InputError(f"{str(self.site)!r} holds {x.shape[-1]} numbers, but this dictionary writes {width}")
        if self.ear is None:
            return x
        if not self.ear.heard:
            d = self.dictionary
            raise InputError(f"a transcoder reads before it writes: {d.site!r} is not met before {d.writes!r}")
        return self.ear.heard.pop()


@dataclass(frozen=True, eq=False)
class Splice(DictionaryEdit):
    """The reconstruction in place of the site; with `constant` [d_out] that instead, on the same rows."""

    constant: Tensor | None = None

    def new(self, x: Tensor, place: Place) -> Tensor:
        read = self.read(x)
        made = self.dictionary.decode(self.dictionary.encode(read)) if self.constant is None else self.constant
        return torch.where(self.dictionary.within(read)[..., None].to(x.device), made.to(x), x)


@dataclass(frozen=True, eq=False)
class ChangeFeatures(DictionaryEdit):
    """x + (f' - f) W_dec for some features."""

    features: tuple[int, ...] = ()
    change: Change = "ablate"
    value: Tensor | float = 0.0  # a number, or [features]

    def new(self, x: Tensor, place: Place) -> Tensor:
        d = self.dictionary
        value = torch.as_tensor(self.value, dtype=d.decoder.dtype, device=d.decoder.device)
        read = self.read(x)
        if self.change == "steer":
            more = value.expand(*x.shape[:-1], len(self.features)) * d.within(read)[..., None]
        else:
            f = d.encode(read)[..., list(self.features)]
            more = (value * f if self.change == "scale" else value) - f
            more = more * d.within(read)[..., None]
        return x + (more @ d.decoder[list(self.features)]).to(x.dtype)


@dataclass(frozen=True, eq=False)
class PatchFeatures(DictionaryEdit):
    """Features as they are in another run (or prompts to be run) that kept the site."""

    features: tuple[int, ...] = ()
    source: Any = None

    @property
    def sources(self) -> tuple[str, ...]:
        return () if isinstance(self.source, Tensor) else ("source",)

    def new(self, x: Tensor, place: Place) -> Tensor:
        there = Patch(place.site, self.source).new(x, place)
        chosen = list(self.features)
        more = self.dictionary.encode(there)[..., chosen] - self.dictionary.encode(x)[..., chosen]
        return x + (more * self.dictionary.within(x)[..., None] @ self.dictionary.decoder[chosen]).to(x.dtype)


def placed(kind: type[DictionaryEdit], dictionary: Coder, positions: Positions, **how: Any) -> list[Edit]:
    """The edit at the site that is written to; for a transcoder with an ear at the one that is read."""
    at = _position(positions)
    here, there = (Site.parse(site).at_position(at) for site in (dictionary.writes, dictionary.site))
    if here == there:
        return [kind(here, dictionary, **how)]
    ear = Hear(there)
    return [ear, kind(here, dictionary, ear, **how)]


def values_of(change: Change, value: float | Sequence[float] | Tensor, features: Sequence[int]) -> Tensor:
    """One number, or one for each feature; InputError for other shapes and unknown changes."""
    if not among(change, Change):
        raise InputError(f"a feature cannot be changed by {change!r}: expected 'ablate', 'scale', 'set' or 'steer'")
    try:
        numbers = torch.as_tensor(0.0 if change == "ablate" else value, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"value={value!r}: expected a number, or one for each feature") from error
    if numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) != len(features)):
        raise InputError(
            f"value= has the shape {list(numbers.shape)}: expected one number, or one for each of {len(features)} features"
        )
    return numbers


def _position(positions: Positions) -> Position:
    """As a site has it after '@'."""
    if isinstance(positions, slice) and positions.step in (None, 1):
        first, last = ("" if end is None else end for end in (positions.start, positions.stop))
        return f"{first}:{last}"
    if positions is None or isinstance(positions, int | str):
        return positions
    if isinstance(positions, slice) or not positions:
        raise InputError(f"positions={positions!r}: expected an index, some, a slice of step 1, or a span's name")
    return ",".join(map(str, positions)) if len(positions) > 1 else int(positions[0])
