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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.engine.edits import Edit, Patch, Place
from pellucid.errors import InputError
from pellucid.neurons.dictionaries.dictionary import Change, Dictionary


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

    dictionary: Dictionary
    ear: Hear | None = None

    def read(self, x: Tensor) -> Tensor:
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
        return torch.where(self.dictionary.within(read)[..., None], made.to(x.dtype), x)


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


def splice_edits(d: Dictionary, at: Any, constant: Tensor | None = None) -> list[Edit]:
    return _placed(d, Splice(_at(d.writes, at), d, constant=constant), at)


def change_edits(
    d: Dictionary, features: Sequence[int], change: Change, value: float | Sequence[float] | Tensor, at: Any
) -> list[Edit]:
    if change not in ("ablate", "scale", "set", "steer"):
        raise InputError(f"a feature cannot be changed by {change!r}: expected 'ablate', 'scale', 'set' or 'steer'")
    numbers = torch.as_tensor(0.0 if change == "ablate" else value, dtype=torch.float32)
    if numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) != len(features)):
        raise InputError(f"value= has the shape {list(numbers.shape)}: expected one number, or one for each of {len(features)} features")  # fmt: skip
    return _placed(d, ChangeFeatures(_at(d.writes, at), d, features=tuple(features), change=change, value=numbers), at)


def patch_edits(d: Dictionary, features: Sequence[int], source: Any, at: Any) -> list[Edit]:
    if d.writes != d.site:
        raise InputError("features of a transcoder are read at another site than they write to: set them to a value instead of patching them")  # fmt: skip
    return [PatchFeatures(_at(d.site, at), d, features=tuple(features), source=source)]


def _placed(d: Dictionary, edit: DictionaryEdit, at: Any) -> list[Edit]:
    if d.writes == d.site:
        return [edit]
    ear = Hear(_at(d.site, at))
    return [ear, replace(edit, ear=ear)]


def _at(site: str, at: Any) -> Site:
    return replace(Site.parse(site), at=at)
