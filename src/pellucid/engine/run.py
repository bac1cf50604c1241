"""A run: inputs in, what to keep and what to edit, labelled tensors out. Nothing is left behind on the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import uncached
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.anatomy.writers import Writer
from pellucid.engine.edits import Edit, turned
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.locate import Spot, block_of, locate, spots
from pellucid.engine.writing import Window, Written, Zeros, check_unconditional, placed, shows_one_reader
from pellucid.errors import InputError, Refused, SiteError, nearest

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, eq=False)
class Part:
    """What was kept of a tensor that is not needed whole: one unit of it (None: all) at some columns (None: all)."""

    unit: int | None
    columns: Tensor | None  # [batch, n]
    values: Tensor  # as the site has them, n positions


Kept = Tensor | tuple[Part, ...]


class Run:
    """What a run gave: `logits`, the kept tensors (`run.tensor(site)`, labelled: `run[site]`) and their gradients."""

    def __init__(
        self, anatomy: Anatomy, inputs: Inputs, output: Any, kept: Mapping[Tap, Kept], sites: list[Site]
    ) -> None:
        self.anatomy, self.inputs, self.output = anatomy, inputs, output
        self.kept, self.sites = kept, sites
        self.edits: tuple[Edit, ...] = ()  # under which it was made
        self.gradients: Mapping[Tap, Kept] = {}
        self.metric: Tensor | None = None  # [batch], where a gradient was asked for

    @property
    def logits(self) -> Tensor:
        """[batch, position, vocabulary], or the last hidden state of a model without a head."""
        if self.output is None:
            raise InputError("this run ended at the last site it kept, so it has no logits: run without logits=False")
        return main_output(self.output)

    def tensor(self, site: Site | str) -> Tensor:
        """The kept values at a site, as torch tensor in the order of `site.dims`; positions as the site says."""
        return self._select(Site.parse(site), self.kept)

    def grad(self, site: Site | str) -> Tensor:
        """The gradient of the metric (`grad_of=`), summed over the batch, with respect to the values at a site.

        Shaped as `tensor` is. An edit of the site comes first: the gradient is that of the edited values.
        """
        if not self.gradients:
            raise InputError("this run has no gradients: ask for them with model.run(..., grad_of=metric)")
        site = Site.parse(site)
        if site.port == "heads" and site.part.endswith(".out"):
            part = site.part.removesuffix(".out")
            raise SiteError(
                f"all heads of a layer write to one sum: the gradient at {str(site)!r} is that of '{part}.out'"
            )
        return self._select(site, self.gradients)

    def everywhere(self, site: Site) -> tuple[Tensor, Tensor]:
        """The values at a site's unit over all positions, [batch, position, ...], and which are real (on the host).

        The keys of scores and patterns, always the last dimension, are those of the real tokens, first one first.
        """
        bare = replace(site, at=None)
        spot = locate(self.anatomy, bare)
        value = self._spread(spot) if site.at is not None else None
        value = self.tensor(bare) if value is None else value
        axis = next(i for i, d in enumerate(bare.dims) if d in ("position", "query"))
        value = value.movedim(axis, 1)
        if "key" in bare.dims:  # counted as positions are: the first real token's key first
            keys = self.inputs.stream(spot.keys)
            value = turned(value, keys.starts, value.ndim - 1)[..., : int(keys.lengths.max())]
        return value, self.inputs.stream(spot.stream).real

    def stream(self, site: Site) -> Stream:
        return stream_of(self.inputs, site)

    def _select(self, site: Site, values: Mapping[Tap, Kept]) -> Tensor:
        spot = self._spot(site)
        site = spot.site
        one, spot = spot, _beside(spot)
        found = values.get(spot.tap)
        x = self._from_parts(spot, found) if isinstance(found, tuple) else found
        if x is None:
            if found is None and spot.tap in {locate(self.anatomy, s).tap for s in self.sites}:
                raise SiteError(f"{str(site)!r} was to be kept, but the run did not pass through it")
            kept = sorted({str(s) for s in self.sites})
            raise SiteError(f"{str(site)!r} was not kept in this run: add it to keep=[...]{nearest(str(site), kept)}")
        if not isinstance(found, tuple):
            x = chosen(spot, x, spot.unit, _columns(spot, x, self.inputs.stream(spot.stream)))
        return x if spot is one else head_output(self.anatomy, site, x)

    def _from_parts(self, spot: Spot, parts: tuple[Part, ...]) -> Tensor | None:
        """What is asked for from what was kept of its tensor; None if that lacks some of it."""
        columns = self.inputs.stream(spot.stream).find(spot.site.at)
        for part in parts:
            if part.unit not in (None, spot.unit):
                continue
            x, axis = part.values, _axis(spot)
            if part.unit != spot.unit:
                x = x.select(spot.unit_axis, spot.unit)  # type: ignore[arg-type]
            if part.columns is None:
                return x if columns is None else _at_columns(x, axis, columns)
            if columns is None:
                continue
            same = part.columns[:, None] == columns[..., None]  # [batch, asked, kept]
            if bool(same.any(-1).all()):
                return _at_columns(x, axis, same.long().argmax(-1))
        return None

    def _spread(self, spot: Spot) -> Tensor | None:
        """The values at a site's unit over all positions, no numbers where they were not kept; None if not in parts."""
        parts = self.kept.get(spot.tap)
        mine = [p for p in parts if p.unit == spot.unit and p.columns is not None] if isinstance(parts, tuple) else []
        if not mine:
            return None
        axis = _axis(spot)
        values = mine[0].values.movedim(axis, 1)
        shape = (len(values), self.inputs.stream(spot.stream).ids.shape[1], *values.shape[2:])
        whole = values.new_full(shape, float("nan"))
        for part in mine:
            rows = torch.arange(len(values), device=whole.device)[:, None]
            whole[rows, part.columns.to(whole.device)] = part.values.movedim(axis, 1)  # type: ignore[union-attr]
        return whole.movedim(1, axis)

    def _spot(self, site: Site) -> Spot:
        found = spots(self.anatomy, site)
        if len(found) != 1:
            raise SiteError(f"{str(site)!r} names {len(found)} sites; ask for one at a time")
        return found[0]

    def __getitem__(self, site: Site | str) -> xr.DataArray:
        """The kept values at a site as an xarray with named dimensions; `token` labels the positions."""
        import xarray as xr

        site = self._spot(Site.parse(site)).site
        values = self.tensor(site).detach().float().cpu().numpy()
        coords: dict[str, Any] = {}
        labels = self.stream(site).labels
        for dim, name in (("position", "token"), ("query", "query_token"), ("key", "key_token")):
            size = dict(zip(site.dims, values.shape, strict=True)).get(dim)
            if len(labels) == 1 and site.at is None and size == len(labels[0]):
                coords[dim] = range(size)
                coords[name] = (dim, list(labels[0]))
        return xr.DataArray(values, dims=site.dims, coords=coords, name=str(site))

    def __repr__(self) -> str:
        kept = ", ".join(sorted({str(s) for s in self.sites})[:6]) or "nothing"
        more = f" and {len(self.sites) - 6} more" if len(self.sites) > 6 else ""
        return f"<Run of {len(self.inputs)} prompt(s); kept {kept}{more}>"


def _beside(spot: Spot) -> Spot:
    """What a head writes depends on all heads where a norm follows them: for its output z_out is needed of all."""
    return replace(spot, unit=None) if spot.site.port == "heads" and spot.site.part.endswith(".out") else spot


def _axis(spot: Spot) -> int:
    """Where the positions are once the unit is chosen."""
    return spot.position_axis - (spot.unit is not None and spot.unit_axis < spot.position_axis)


def _columns(spot: Spot, x: Tensor, stream: Stream) -> Tensor | None:
    """The columns [batch, n] that a site names in its whole tensor; None: all."""
    columns, positions, tokens = stream.find(spot.site.at), x.shape[spot.position_axis], stream.ids.shape[1]
    if columns is not None and positions != tokens:
        raise Refused(f"{str(spot.site)!r} has {positions} positions for {tokens} tokens: keep it without '@'")
    return columns


def _at_columns(x: Tensor, axis: int, columns: Tensor) -> Tensor:
    x = x.movedim(axis, 1)
    return x[torch.arange(len(x), device=x.device)[:, None], columns.to(x.device)].movedim(1, axis)


def chosen(spot: Spot, x: Tensor, unit: int | None, columns: Tensor | None) -> Tensor:
    """A unit of a spot's tensor (None: all) at some columns (None: all)."""
    axis = spot.position_axis
    if unit is not None:
        x, axis = x.select(spot.unit_axis, unit), _axis(spot)
    return x if columns is None else _at_columns(x, axis, columns)


def stream_of(inputs: Inputs, site: Site) -> Stream:
    """The stream a site's positions are counted on; keys and values of cross-attention are the encoder's."""
    if site.part in ("cross.k", "cross.v"):
        return inputs.stream("encoder")
    return inputs.stream(site.stack)


def head_output(anatomy: Anatomy, site: Site, z_out: Tensor) -> Tensor:
    """What one head writes to the residual stream [batch, position, d_model], from z_out of all heads of its layer; see
    `pellucid.anatomy.writers`.
    """
    try:
        writer = Writer.of(anatomy.module, block_of(anatomy, site), site.part.partition(".")[0])
        if not isinstance(site.unit, int):
            raise Refused("its heads are not named one by one")
        return writer.written(z_out, [site.unit])[0]
    except Refused as why:
        raise Refused(f"{str(site)!r} is refused on this model: {why}") from None


Put = Callable[[Tensor], Tensor]


def holding(where: str | torch.device | Path | None) -> Put | None:
    """What takes a kept value to where it is held, as a copy: a device, or files of a folder. None: where it is."""
    if where is None:
        return None
    if isinstance(where, Path):
        where.mkdir(parents=True, exist_ok=True)
        count = itertools.count(len(list(where.glob("*.values"))))

        def write(x: Tensor) -> Tensor:
            file = where / f"{next(count):05d}.values"
            held = torch.from_file(str(file), shared=True, size=max(1, x.numel()), dtype=x.dtype)[: x.numel()].view(
                x.shape
            )
            return held.copy_(x.detach())

        return write
    device = torch.device(where)
    return lambda x: x.detach().to(device, copy=True)


class Session:
    """Turns keeps and edits into handlers on taps for one run."""

    def __init__(
        self,
        anatomy: Anatomy,
        inputs: Inputs,
        keep: Iterable[Site | str] = (),
        edits: Sequence[Edit] = (),
        gradients: bool = False,
        put: Put | None = None,
    ) -> None:
        anatomy.check()
        self.inputs, self.gradients, self.put = inputs, gradients, put
        wanted = [spot for k in keep for spot in spots(anatomy, k)]
        self.sites = [spot.site for spot in wanted]
        kept = {spot.tap: spot for spot in wanted}
        self.keeping = set(kept)
        self.wanted: dict[Tap, list[Spot]] = {}
        for spot in wanted:
            self.wanted.setdefault(spot.tap, []).append(_beside(spot))
        self.writing: dict[Tap, list[Written]] = {}
        apart = [s for s in kept.values() if gradients and shows_one_reader(anatomy, s)]
        self.zeros = {s.tap: Zeros(s.site.whole) for s in apart}
        for w in placed(anatomy, [*edits, *self.zeros.values()]):
            for tap in w.taps:
                self.writing.setdefault(tap, []).append(w)
        self.kept: dict[Tap, Any] = {}  # tensors, or `Kept` where nobody needs the whole for its gradient
        self.windows: dict[tuple[str, str], Window] = {}

    def window(self, spot: Spot) -> Window:
        if (spot.stream, spot.keys) not in self.windows:
            self.windows[spot.stream, spot.keys] = Window.on(self.inputs, spot)
        return self.windows[spot.stream, spot.keys]

    def handlers(self) -> dict[Tap, Handler]:
        # in this order: where two sites are one tensor, what is kept is what was written
        return {tap: self._handler(tap) for tap in dict.fromkeys((*self.writing, *self.keeping))}

    def _handler(self, tap: Tap) -> Handler:
        writers, keep = [(w, self.window(w.spot)) for w in self.writing.get(tap, ())], tap in self.keeping

        def handler(x: Tensor) -> Tensor | None:
            old = x
            for w, window in writers:
                x = w.meet(tap, x, window)
            if keep and self.gradients:
                # the kept tensor must lie on the way to the metric: hand the model this very tensor
                x = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
                self.kept[tap] = x
            elif keep:
                self.kept[tap] = self.narrowed(tap, x, copy=True)
            return None if x is old else x

        return handler

    def narrowed(self, tap: Tap, x: Tensor, copy: bool = False) -> Kept:
        """Of a kept tensor what was asked for, in memory of its own: a vector must not hold a whole layer."""
        parts, share = {}, 0.0 if tap in self.wanted else 1.0
        for spot in self.wanted.get(tap, ()):
            stream = self.inputs.stream(spot.stream)
            columns = _columns(spot, x, stream)
            if (spot.unit, spot.site.at) not in parts:
                parts[spot.unit, spot.site.at] = spot, columns
                units = 1 if spot.unit is None else x.shape[spot.unit_axis]
                share += (1.0 if columns is None else columns.shape[1] / stream.ids.shape[1]) / units
        put = self.put or Tensor.clone
        if share >= 1:
            return put(x) if copy or self.put else x
        return tuple(
            Part(spot.unit, columns, put(chosen(spot, x, spot.unit, columns))) for spot, columns in parts.values()
        )

    def check(self, wire: Wiretap) -> None:
        """An edit that never fired is an error, not silence."""
        self.check_met(wire.met)

    def check_met(self, met: Container[Tap]) -> None:
        for tap, writers in self.writing.items():
            if tap not in met:
                site = str(writers[0].spot.site)
                raise SiteError(f"the edit on {site!r} never fired: the run did not pass through it")


def execute(
    anatomy: Anatomy,
    inputs: Inputs,
    keep: Iterable[Site | str] = (),
    edits: Sequence[Edit] = (),
    grad_of: Callable[[Run], Tensor] | None = None,
    forward: dict[str, Any] | None = None,
    put: Put | None = None,
) -> Run:
    """One forward pass of the untouched module. `grad_of` maps the run to [batch]; its gradients are then kept too.

    A graph is kept where gradients are enabled: it is the caller's to say so (see `anatomy.modes`).
    """
    module = anatomy.module
    check_unconditional(edits)
    session = Session(anatomy, inputs, keep, edits, grad_of is not None, put)
    handlers = session.handlers()
    if grad_of is not None and not session.sites:
        raise InputError("grad_of= needs keep=: name the sites whose gradient is wanted")
    if grad_of is not None:
        anatomy.check_gradients()
    given = {**uncached(module), **inputs.tensors, **(forward or {})}
    with torch.set_grad_enabled(grad_of is not None or torch.is_grad_enabled()):
        if handlers:
            with Wiretap(module, handlers, len(inputs)) as wire:
                output = module(**given)
            session.check(wire)
        else:
            output = module(**given)
        run = Run(anatomy, inputs, output, session.kept, session.sites)
        run.edits = tuple(edits)
        if grad_of is not None:
            _differentiate(run, grad_of, session)
    return run


def _differentiate(run: Run, metric: Callable[[Run], Tensor], session: Session) -> None:
    """Fill in the run's gradients; what is kept leaves the graph, which is gone."""
    score = metric(run)
    if not score.requires_grad:
        raise InputError("this metric has no gradient (it counts, or reads nothing that was computed with gradients)")
    wanted = {tap: session.zeros[tap].added[0] if tap in session.zeros else x for tap, x in session.kept.items()}
    found = torch.autograd.grad(score.sum(), list(wanted.values()), allow_unused=True)
    run.gradients = {
        t: session.narrowed(t, torch.zeros_like(x) if g is None else g)
        for (t, x), g in zip(wanted.items(), found, strict=True)
    }
    run.kept = {tap: session.narrowed(tap, x.detach()) for tap, x in session.kept.items()}
    run.output = without_graph(run.output)
    run.metric = score.detach()


def without_graph(output: Any) -> Any:
    """What a forward pass gave, as values: whoever holds it does not hold the whole pass."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, Mapping):
        plain = copy(output)
        for key, value in output.items():
            plain[key] = without_graph(value)  # type: ignore[index]
        return plain
    if isinstance(output, (tuple, list)) and type(output) in (tuple, list):
        return type(output)(map(without_graph, output))
    return output
