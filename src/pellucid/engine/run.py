"""A run: inputs in, what to keep and what to edit, labelled tensors out. Nothing is left behind on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pellucid.anatomy.map import Anatomy
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


class Run:
    """What a run gave: `logits`, the kept tensors (`run.tensor(site)`, labelled: `run[site]`) and their gradients."""

    def __init__(
        self, anatomy: Anatomy, inputs: Inputs, output: Any, kept: dict[Tap, Tensor], sites: list[Site]
    ) -> None:
        self.anatomy, self.inputs, self.output = anatomy, inputs, output
        self.kept, self.sites = kept, sites
        self.edits: tuple[Edit, ...] = ()  # under which it was made
        self.gradients: dict[Tap, Tensor] = {}
        self.metric: Tensor | None = None  # [batch], where a gradient was asked for

    @property
    def logits(self) -> Tensor:
        """[batch, position, vocabulary], or the last hidden state of a model without a head."""
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
        """The values at a site's unit over all positions, [batch, position, ...], and which of them are real.

        The keys of scores and patterns, always the last dimension, are those of the real tokens, first one first.
        """
        bare = replace(site, at=None)
        spot = locate(self.anatomy, bare)
        value = self.tensor(bare)
        axis = next(i for i, d in enumerate(bare.dims) if d in ("position", "query"))
        value = value.movedim(axis, 1)
        if "key" in bare.dims:  # counted as positions are: the first real token's key first
            keys = self.inputs.stream(spot.keys)
            value = turned(value, keys.starts.to(value.device), value.ndim - 1)[..., : int(keys.lengths.max())]
        return value, self.inputs.stream(spot.stream).mask.bool()

    def stream(self, site: Site) -> Stream:
        return stream_of(self.inputs, site)

    def _select(self, site: Site, values: dict[Tap, Tensor]) -> Tensor:
        spot = self._spot(site)
        site = spot.site
        x = values.get(spot.tap)
        if x is None:
            if spot.tap in {locate(self.anatomy, s).tap for s in self.sites}:
                raise SiteError(f"{str(site)!r} was to be kept, but the run did not pass through it")
            kept = sorted({str(s.whole) for s in self.sites})
            raise SiteError(f"{str(site)!r} was not kept in this run: add it to keep=[...]{nearest(str(site), kept)}")
        axis = spot.position_axis
        if site.port == "heads" and site.part.endswith(".out"):
            x = head_output(self.anatomy, site, x)
        elif spot.unit is not None:
            x = x.select(spot.unit_axis, spot.unit)
            axis -= spot.unit_axis < spot.position_axis
        stream = self.inputs.stream(spot.stream)
        columns = stream.find(site.at)
        if columns is None:
            return x
        x = x.movedim(axis, 1)
        if x.shape[1] != stream.ids.shape[1]:
            raise Refused(
                f"{str(site)!r} has {x.shape[1]} positions for {stream.ids.shape[1]} tokens: keep it without '@'"
            )
        x = x[torch.arange(len(x), device=x.device)[:, None], columns.to(x.device)]
        return x.movedim(1, axis)

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


class Session:
    """Turns keeps and edits into handlers on taps for one run."""

    def __init__(
        self,
        anatomy: Anatomy,
        inputs: Inputs,
        keep: Iterable[Site | str] = (),
        edits: Sequence[Edit] = (),
        gradients: bool = False,
    ) -> None:
        anatomy.check()
        self.inputs, self.gradients = inputs, gradients
        wanted = [spot for k in keep for spot in spots(anatomy, k)]
        self.sites = [spot.site for spot in wanted]
        kept = {spot.tap: spot for spot in wanted}
        self.keeping = set(kept)
        self.writing: dict[Tap, list[Written]] = {}
        apart = [s for s in kept.values() if gradients and shows_one_reader(anatomy, s)]
        self.zeros = {s.tap: Zeros(s.site.whole) for s in apart}
        for w in placed(anatomy, [*edits, *self.zeros.values()]):
            for tap in w.taps:
                self.writing.setdefault(tap, []).append(w)
        self.kept: dict[Tap, Tensor] = {}
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
                self.kept[tap] = x.clone() if torch.is_grad_enabled() else x.detach().clone()
            return None if x is old else x

        return handler

    def check(self, wire: Wiretap) -> None:
        """An edit that never fired is an error, not silence."""
        for tap, writers in self.writing.items():
            if tap not in wire.met:
                site = str(writers[0].spot.site)
                raise SiteError(f"the edit on {site!r} never fired: the run did not pass through it")


def execute(
    anatomy: Anatomy,
    inputs: Inputs,
    keep: Iterable[Site | str] = (),
    edits: Sequence[Edit] = (),
    grad_of: Callable[[Run], Tensor] | None = None,
    forward: dict[str, Any] | None = None,
) -> Run:
    """One forward pass of the untouched module. `grad_of` maps the run to [batch]; its gradients are then kept too."""
    module = anatomy.module
    check_unconditional(edits)
    session = Session(anatomy, inputs, keep, edits, grad_of is not None)
    handlers = session.handlers()
    if grad_of is not None and not session.sites:
        raise InputError("grad_of= needs keep=: name the sites whose gradient is wanted")
    with torch.set_grad_enabled(grad_of is not None or torch.is_grad_enabled()):
        recomputed = module.training and getattr(module, "is_gradient_checkpointing", False)
        if handlers and torch.is_grad_enabled() and recomputed:
            raise Refused("a checkpointed forward is computed again outside the run: call model.module.eval() first")
        if handlers:
            with Wiretap(module, handlers, len(inputs)) as wire:
                output = module(**{**inputs.tensors, **(forward or {})})
            session.check(wire)
        else:
            output = module(**{**inputs.tensors, **(forward or {})})
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
    wanted = {tap: session.zeros[tap].added[0] if tap in session.zeros else x for tap, x in run.kept.items()}
    found = torch.autograd.grad(score.sum(), list(wanted.values()), allow_unused=True)
    run.gradients = {
        t: torch.zeros_like(x) if g is None else g for (t, x), g in zip(wanted.items(), found, strict=True)
    }
    run.kept = {tap: x.detach() for tap, x in run.kept.items()}
    run.metric = score.detach()
