"""What can happen at a site, as values: ablate, patch, steer, scale, project out, replace.

An edit names its site and says what the tensor there becomes. Which unit, positions, rows and generation steps that is
written to is the engine's business. All edits let gradients through, to the old value and to what they bring in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import ordinary
from pellucid.anatomy.sites import Position, Site
from pellucid.engine.inputs import Stream
from pellucid.engine.locate import locate
from pellucid.engine.steps import Step, Watch
from pellucid.errors import InputError, one_of, plain

How = Literal["zero", "mean", "position_mean", "resample"]


_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")
Condition = Callable[[Step], "bool | Tensor"] | Watch


class Source(Protocol):
    """A run that kept the site an edit takes values from."""

    anatomy: Anatomy

    def everywhere(self, site: Site, /) -> tuple[Tensor, Tensor]:
        """The values of the site's unit, [batch, position, ...], and which positions are real, [batch, position]."""

    def stream(self, site: Site, /) -> Stream:
        """The tokens the site's positions are counted on."""


@dataclass(frozen=True, eq=False)
class Place:
    """The surroundings of an edit."""

    site: Site
    stream: Stream  # the prompts its positions are counted on
    values: Tensor  # [batch, position, ...] the site's unit at every position
    real: Tensor  # [batch, position] False on padding; this and the positions are on the host, where indices may be
    positions: Tensor  # [batch, n] the chosen positions, counted from each row's first real token
    generating: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """Base of the edits. `new` is given the values at the chosen positions, [batch, n, ...], and returns what stands
    there instead. `when` decides at each generation step. For scores and patterns n counts queries, keys are counted
    from the first real token as positions are, and masked scores stay masked.

    `tokens` is a slice over prompt and answer, counted on each row's real tokens, negative from the end of the prompt: "1:" all
    but the first token (where many models have an attention sink), "-1:" the last token of the prompt and every one written."""

    site: Site | str
    when: Condition | None = field(default=None, kw_only=True)
    tokens: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site.parse(self.site))
        if self.tokens is not None and not (isinstance(self.tokens, str) and _SLICE.fullmatch(self.tokens)):
            raise InputError(f"tokens={self.tokens!r}: expected a slice such as '1:' or '-1:'")
        kinds = {f.name: str(f.type) for f in fields(self)}
        for name, value in plain(kinds, {name: getattr(self, name) for name in kinds}).items():
            object.__setattr__(self, name, value)

    def new(self, x: Tensor, place: Place) -> Tensor:
        raise NotImplementedError

    def between(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The positions [row] from which and before which `tokens` says it acts, for prompts of `lengths`."""
        ends: list[Tensor] = []
        for text, default in zip((self.tokens or ":").split(":"), (0, torch.iinfo(torch.long).max), strict=True):
            n = int(text) if text else default
            ends.append((lengths + n).clamp_min(0) if text.startswith("-") else torch.full_like(lengths, n))
        return ends[0], ends[1]

    def __repr__(self) -> str:
        """The code that makes it where its values can be written, else beginning without `pl.`, large values described."""
        stated = [(f.name, getattr(self, f.name)) for f in fields(self)[3:] if f.init]  # without site, when, tokens
        changed = [(f, v) for f, v in stated if not _is_default(type(self), f, v)]
        words = [repr(str(self.site)), *(f"{f}={_written(v)}" for f, v in changed)]
        words += [f"{k}={_written(v)}" for k, v in (("tokens", self.tokens), ("when", self.when)) if v is not None]
        code = all(_plain(v) for _, v in changed) and self.when is None
        return f"{'pl.' * (code and type(self).__module__ == __name__)}{type(self).__name__}({', '.join(words)})"

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the fields that hold a run (or prompts to be run) which must have kept this edit's site."""
        return ()

    @property
    def digest(self) -> str:
        """That of the weights this edit was made for; "" where any will do."""
        return str(vars(self).get("_digest", ""))  # that of a file it came from


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Edit):
    """Remove what a site says: set it to zero, or to what it is on average over a stated reference.

    `how`: "zero"; "mean" over all real positions and prompts of the reference; "position_mean" over its prompts only;
    "resample": another prompt's value at the same position, prompts drawn by `seed`. The reference is a run that
    kept the site, or prompts; without one it is the batch itself. Patterns have no mean over positions, and scores
    (where masked ones are no numbers) only zero.

    >>> Ablate("layers.9.attn.heads.9").how
    'zero'
    """

    how: How = "zero"
    reference: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.how, How, "cannot ablate by ")
        part = self.site.part  # type: ignore[union-attr]
        if self.how != "zero" and (part.endswith(".scores") or (part.endswith(".pattern") and self.how == "mean")):
            raise InputError(
                f"{str(self.site)!r} cannot be ablated by {self.how!r}: each query sees other keys; use 'zero'"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        return () if self.reference is None else ("reference",)

    def new(self, x: Tensor, place: Place) -> Tensor:
        if self.how == "zero":
            return torch.zeros_like(x)
        if self.reference is None and place.generating:
            raise InputError(
                f"ablating {str(place.site)!r} by {self.how} while generating needs reference=: a run or prompts"
            )
        # the mean is over all positions, so a reference that kept some of them will not do
        values, lengths = _reference(
            self.reference, replace(place, site=replace(place.site, at=None)) if self.how == "mean" else place
        )
        real = torch.arange(values.shape[1]) < lengths[:, None]
        if self.how == "mean":
            return (values.flatten(0, 1) if bool(real.all()) else values[real]).mean(0).expand_as(x)
        if self.how == "position_mean":
            weight = brought(real, x).to(values.dtype).reshape(*real.shape, *[1] * (values.ndim - 2))
            mean = (values * weight).sum(0) / weight.sum(0).clamp_min(1)
            return _with_keys_of(x, _at(mean[None], lengths.max()[None], place.positions), place)
        rows = self._draw(len(values), len(x))
        return _with_keys_of(x, _at(values[brought(rows, x)], lengths[rows], place.positions), place)

    def _draw(self, pool: int, batch: int) -> Tensor:
        """[batch] rows of the reference; of the batch itself never a prompt's own."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.reference is not None:
            return torch.randint(pool, (batch,), generator=generator)
        if batch == 1:
            raise InputError("resampling a single prompt needs reference=: a run or prompts to draw from")
        return (torch.arange(batch) + torch.randint(1, batch, (batch,), generator=generator)) % batch


@dataclass(frozen=True, eq=False, repr=False)
class Patch(Edit):
    """Put in the values of another run (one that kept the site, or a prompt to run), at the same positions.

    `source_at` names other positions of the source to take them from. A tensor is put in as it is (broadcast to
    [batch, n, ...]).
    """

    source: Source | Tensor | str | Sequence[str]
    source_at: Position = None

    @property
    def sources(self) -> tuple[str, ...]:
        return () if isinstance(self.source, Tensor) else ("source",)

    def new(self, x: Tensor, place: Place) -> Tensor:
        if isinstance(self.source, Tensor):
            return torch.as_tensor(_fitting(self.source, x, "the tensor", place)).expand_as(x)
        values, lengths = _reference(self.source, place)
        if self.source is None:
            raise InputError(f"Patch at {str(place.site)!r} has no source: give a run, prompts or a tensor")
        _check_rows(values, len(x))
        stream = self.source.stream(place.site)  # type: ignore[union-attr]
        if self.source_at is not None:
            if not isinstance(self.source_at, int | str):
                raise InputError(f"source_at={self.source_at!r}: expected a position, such as -1, '1:4' or \"'Paris'\"")
            found = stream.find(self.source_at)
            positions = place.positions if found is None else found - stream.starts[:, None]
            if positions.shape[1] not in (1, x.shape[1]):
                raise InputError(
                    f"source_at={self.source_at!r} names {positions.shape[1]} positions for the {x.shape[1]} of "
                    f"{str(place.site)!r}: expected one, or as many"
                )
            return _with_keys_of(x, _at(values, lengths, positions.expand(len(x), x.shape[1])), place)
        _check_aligned(stream, place)
        inside = place.positions < lengths[:, None]  # padding, and what is generated, has no counterpart
        new = _with_keys_of(x, _at(values, lengths, place.positions.minimum(lengths[:, None] - 1)), place)
        return new if bool(inside.all()) else torch.where(like(inside, x), new, x)


@dataclass(frozen=True, eq=False, repr=False)
class Steer(Edit):
    """Add `strength * vector` to the site. The vector broadcasts to [batch, n, ...]; usually it is [d_model]. With `keep_norm`
    each token's values are brought back to the length they had."""

    vector: Tensor
    strength: float = 1.0
    keep_norm: bool = False

    def new(self, x: Tensor, place: Place) -> Tensor:
        made = x + self.strength * _fitting(self.vector, x, "the vector", place)
        return made * (x.norm(dim=-1, keepdim=True) / made.norm(dim=-1, keepdim=True)) if self.keep_norm else made


@dataclass(frozen=True, eq=False, repr=False)
class Rotate(Edit):
    """Turn each token's values towards a vector [d] by `degrees` (away from it: negative), at most onto it, within the plane of
    the two; their length stays."""

    vector: Tensor
    degrees: float = 10.0

    def new(self, x: Tensor, place: Place) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        h, u = x.to(wide), torch.nn.functional.normalize(_rows(self.vector, "the vector", x, place)[0], dim=0).to(wide)
        along = h @ u
        rest = h - along[..., None] * u
        size = rest.norm(dim=-1)
        angle = (torch.atan2(along, size) + math.radians(self.degrees)).clamp(-math.pi / 2, math.pi / 2)
        aside = rest / size.clamp_min(torch.finfo(wide).tiny)[..., None]
        turned = angle.sin()[..., None] * u + angle.cos()[..., None] * aside
        return torch.where(size[..., None] > 0, h.norm(dim=-1, keepdim=True) * turned, h).to(x.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Edit):
    """Set the scalar products with some directions, [d] or [k, d], to `values` (a number, or [k]), by the smallest change."""

    directions: Tensor
    values: float | Tensor = 0.0

    def new(self, x: Tensor, place: Place) -> Tensor:
        rows = _rows(self.directions, "the directions", x, place)
        inverse = torch.linalg.pinv(rows)  # knows dependent and zero directions for what they are
        wide = torch.promote_types(x.dtype, torch.float32)
        wanted = torch.as_tensor(self.values, dtype=wide, device=x.device)
        if wanted.ndim > 1 or (wanted.ndim == 1 and len(wanted) != len(rows)):
            raise InputError(
                f"{list(wanted.shape)} values for {len(rows)} directions at {str(place.site)!r}: expected one, or as many"
            )
        return x + ((wanted - x.to(wide) @ rows.T.to(wide)) @ inverse.T.to(wide)).to(x.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Edit):
    """Multiply the site by a factor (a number or something that broadcasts)."""

    factor: float | Tensor

    def new(self, x: Tensor, place: Place) -> Tensor:
        return x * _fitting(self.factor, x, "the factor", place)


@dataclass(frozen=True, eq=False, repr=False)
class ProjectOut(Edit):
    """Remove the span of some directions, [d] or [k, d], from the last dimension of the site. `keep` is the share of it that stays:
    .5 dampens, 2 amplifies."""

    directions: Tensor
    keep: float = 0.0

    def new(self, x: Tensor, place: Place) -> Tensor:
        rows = _rows(self.directions, "the directions", x, place)
        inverse = torch.linalg.pinv(rows)  # knows dependent and zero directions for what they are
        wide = torch.promote_types(x.dtype, torch.float32)
        return x - (1.0 - self.keep) * ((x.to(wide) @ inverse.to(wide)) @ rows.to(wide)).to(x.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Replace(Edit):
    """Put in whatever `function` makes of the values [batch, n, ...]."""

    function: Callable[[Tensor], Tensor]

    def new(self, x: Tensor, place: Place) -> Tensor:
        if not callable(self.function):
            raise InputError(f"Replace at {str(place.site)!r} takes a function of the values, not {self.function!r}")
        new = self.function(x)
        if not isinstance(new, Tensor) or new.shape != x.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise InputError(
                f"the function at {str(place.site)!r} must return a tensor of shape {tuple(x.shape)}, not {got}"
            )
        return new


# ---- printing


def _is_default(kind: type[Edit], name: str, value: Any) -> bool:
    default = kind.__dataclass_fields__[name].default
    return type(value) is type(default) and isinstance(value, (str, int, float, type(None))) and value == default


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) or (isinstance(value, (list, tuple)) and all(map(_plain, value)))


def _written(value: Any) -> str:
    """A value in an edit's text: plain ones as code, others by what they are."""
    if isinstance(value, Tensor):
        return f"<tensor {list(value.shape)}>"
    if callable(value):
        return f"<{getattr(value, '__name__', type(value).__name__).strip('<>')}>"
    return repr(value)


# ---- fitting what comes from elsewhere


def brought(index: Tensor, x: Tensor) -> Tensor:
    """An index or a mask of the host on the device of `x`, without waiting for it."""
    return index.to(x.device, non_blocking=True)


def like(mask: Tensor, x: Tensor) -> Tensor:
    """A mask [batch, n] of the host as one of x [batch, n, ...], on its device."""
    return brought(mask, x).reshape(*mask.shape, *[1] * (x.ndim - 2))


def turned(values: Tensor, by: Tensor, axis: int) -> Tensor:
    """Values [batch, ...] turned by[row] steps towards the front along `axis`; what falls off comes back behind.

    >>> turned(torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([0, 1]), 1)
    tensor([[0, 1, 2],
            [4, 5, 3]])
    """
    if not bool(by.any()):
        return values
    n = values.shape[axis]
    index = brought((torch.arange(n, device=by.device) + by[:, None]) % n, values)
    shape = [1] * values.ndim
    shape[0], shape[axis] = index.shape
    return values.gather(axis, index.reshape(shape).expand_as(values))


def left_aligned(values: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Values [batch, position, ...] with each row's first real token in column 0, and the rows' lengths, on the host."""
    if bool(real.all()):
        return values[:, : real.shape[1]], torch.full((len(real),), real.shape[1])
    real = real.long().cpu()
    lengths = real.sum(1)
    return turned(values, real.argmax(1), 1)[:, : int(lengths.max())], lengths


def _reference(source: Any, place: Place) -> tuple[Tensor, Tensor]:
    """The reference's values at the site's unit, real positions first [rows, position, ...], and its lengths [rows]."""
    if source is None:
        values, real = place.values, place.real
    elif hasattr(source, "everywhere"):
        values, real = source.everywhere(place.site)
        values = values.to(place.values.device, place.values.dtype)
    else:
        raise InputError(
            f"{str(place.site)!r} can be taken from a run, prompts or token ids, not from {type(source).__name__}"
        )
    return left_aligned(values, real)


def _check_rows(values: Tensor, batch: int) -> None:
    if len(values) not in (1, batch):
        raise InputError(
            f"the reference has {len(values)} prompts but the run has {batch}: expected one prompt or the same number"
        )


def _at(values: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
    """values[b, positions[b, i]]; a single row serves every row."""
    _check_rows(values, len(positions))
    beyond = positions >= lengths.expand(len(positions))[:, None]
    if bool(beyond.any()):
        raise InputError(
            f"position {int(positions[beyond].max())} is beyond the reference prompt, which has {int(lengths.min())} tokens"
        )
    rows = torch.arange(len(positions), device=values.device)[:, None] if len(values) > 1 else 0
    return values[rows, brought(positions, values)]


def _with_keys_of(x: Tensor, new: Tensor, place: Place) -> Tensor:
    """Scores and patterns of a reference, with the keys of `x`: those that the reference does not have stay."""
    if "key" not in place.site.dims or new.shape[-1] == x.shape[-1]:
        return new
    if new.shape[-1] > x.shape[-1]:
        raise InputError(
            f"{str(place.site)!r} has {x.shape[-1]} keys but its reference {new.shape[-1]}: expected prompts of equal length"
        )
    return torch.cat([new, x[..., new.shape[-1] :]], -1)


def _check_aligned(source: Stream, place: Place) -> None:
    """Same positions mean the same only where the prompts are equally long; else say where they part."""
    own, n = place.stream, len(source.lengths)
    if n not in (1, len(own.lengths)) or bool((source.lengths == own.lengths).all()):
        return
    row = next(b for b, labels in enumerate(own.labels) if len(labels) != len(source.labels[b % n]))
    here, there = own.labels[row], source.labels[row % n]
    part = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    shown = [" ".join(map(repr, labels[part : part + 5])) or "its end" for labels in (there, here)]
    raise InputError(
        f"cannot patch {str(place.site)!r} from a prompt of {len(there)} tokens into one of {len(here)}: they part at "
        f"position {part}, {shown[0]} there and {shown[1]} here; give source_at=... or prompts of equal length"
    )


def _tensor(value: Any, what: str, place: Place) -> Tensor:
    """Numbers as a tensor; InputError for what is none."""
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.dtype == torch.bool or found.is_complex():
        raise InputError(f"{what} for {str(place.site)!r} is {value!r}: expected numbers, such as a tensor")
    return found


def _rows(value: Any, what: str, x: Tensor, place: Place) -> Tensor:
    """Directions [k, d] in float64."""
    given = _tensor(value, what, place)
    rows = torch.atleast_2d(given).to(x.device, torch.float64)
    if rows.ndim != 2 or rows.shape[1] != x.shape[-1] or not bool(rows.isfinite().all()):
        raise InputError(
            f"{what} for {str(place.site)!r} are {list(given.shape)}: expected [k, {x.shape[-1]}] of finite numbers"
        )
    return rows


def _fitting(value: Any, x: Tensor, what: str, place: Place) -> Any:
    """A number, or a tensor that broadcasts to x [batch, n, ...]; InputError for anything else."""
    if isinstance(value, (int, float)):
        return value
    value = _tensor(value, what, place).to(x.device, x.dtype)
    shape = (1,) * (x.ndim - value.ndim) + tuple(value.shape)
    if len(shape) > x.ndim or any(a not in (1, b) for a, b in zip(shape, x.shape, strict=True)):
        raise InputError(
            f"{what} for {str(place.site)!r} is {list(value.shape)}: it does not broadcast to {list(x.shape)}"
        )
    return value


def moving(edits: Sequence[Edit]) -> bool:
    """Whether an edit brings in a tensor that requires grad: who gives one wants to differentiate."""

    def within(value: Any) -> bool:
        if isinstance(value, Tensor):
            return value.requires_grad
        if isinstance(value, (list, tuple)):
            return any(map(within, value))
        return within([*value.values()]) if isinstance(value, dict) else False

    return any(within(getattr(e, f.name)) for e in edits if isinstance(e, Edit) for f in fields(e))


# ---- many units at once


@dataclass(frozen=True, eq=False, repr=False)
class Swap(Edit):
    """Units of a site take other values, position by position: many heads or neurons of a layer in one edit.

    values: [batch or 1, position, unit, ...] (or [batch or 1, position, ...] without units), position 0 the first real
    token.
    """

    values: Tensor
    units: tuple[int, ...] | None = None

    def new(self, x: Tensor, place: Place) -> Tensor:
        rows = torch.arange(len(x), device=x.device)[:, None] if len(self.values) > 1 else 0
        new = self.values[rows, brought(place.positions.clamp(max=self.values.shape[1] - 1), x)].to(x.dtype)
        if self.units is None:
            return new
        x = x.clone()
        x[:, :, list(self.units)] = new
        return x


def swaps(sites: Sequence[Site], source: Source) -> list[Edit]:
    """Edits that give all `sites` together the values of a run that kept them (their `whole`)."""
    units: dict[Site, list[Site]] = {}
    for site in sites:
        units.setdefault(replace(site.whole, at=site.at), []).append(site)
    made: list[Edit] = []
    for whole, some in units.items():
        if len(some) == 1 or "key" in whole.dims:
            made += [Patch(site, source) for site in some]
            continue
        chosen = [locate(source.anatomy, site).unit for site in some]
        values = aligned_values(source, whole.whole)
        if None in chosen:  # the whole and some of its units
            made.append(Swap(whole, values))
        else:
            made.append(Swap(whole, values[:, :, chosen], tuple(chosen)))  # type: ignore[arg-type]
    return made


def aligned_values(run: Source, site: Site) -> Tensor:
    """The values at a site, [batch, position, unit, ...], position 0 the first real token of each row."""
    return left_aligned(*run.everywhere(site))[0]


# ---- sources that are prompts


def _brought(edit: Edit, device: torch.device) -> Edit:
    """The edit with its tensors on the model's device: they go there once, not at every step and variant."""
    given = {f.name: getattr(edit, f.name) for f in fields(edit) if f.init}
    moved: dict[str, Any] = {
        k: ordinary(v).to(device)
        for k, v in given.items()
        if isinstance(v, Tensor) and (v.device != device or v.is_inference())
    }
    return replace(edit, **moved) if moved else edit


def resolved(anatomy: Anatomy, edits: Sequence[Edit], run: Callable[[Any, list[Site]], Source]) -> list[Edit]:
    """`edits` with their tensors on the model's device, and every prompt (a string or several) among their sources replaced
    by a run that kept the sites; each set of prompts is run once."""

    def asked(edit: Edit) -> dict[str, Any]:
        given = {name: getattr(edit, name) for name in edit.sources}
        return {n: g for n, g in given.items() if isinstance(g, (str, list, tuple))}

    wanted: dict[str, tuple[Any, dict[Site, None]]] = {}  # by what is written of the prompts, which may be lists of ids
    for edit in edits:
        for prompts in asked(edit).values():
            given = list(prompts) if isinstance(prompts, tuple) else prompts
            wanted.setdefault(repr(given), (given, {}))[1][edit.site.whole] = None  # type: ignore[union-attr]
    device = next((p.device for p in anatomy.module.parameters() if p.device.type != "meta"), torch.device("cpu"))
    edits = [_brought(edit, device) for edit in edits]
    runs = {key: run(prompts, [*sites]) for key, (prompts, sites) in wanted.items()}
    ready: list[dict[str, Any]] = [
        {n: runs[repr(list(p) if isinstance(p, tuple) else p)] for n, p in asked(e).items()} for e in edits
    ]
    return [replace(e, **given) if given else e for e, given in zip(edits, ready, strict=True)]
