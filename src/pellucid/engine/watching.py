"""Forward passes that end at the last site that is wanted: what comes after is not computed.

`run_until` keeps values as a run does. What is read over a whole corpus is used at once: `watch` shows values as they come
and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import running, uncached
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import locate
from pellucid.engine.run import Put, Run, Session
from pellucid.engine.writing import check_unconditional
from pellucid.errors import SiteError

Seen = Callable[[Tensor], None]


class _Enough(BaseException):
    """Everything wanted has been met; it never leaves this file. No Exception: a family's own code must not catch it."""


def run_until(
    anatomy: Anatomy,
    inputs: Inputs,
    keep: Iterable[Site | str],
    edits: Sequence[Edit] = (),
    grad: bool = False,
    put: Put | None = None,
) -> Run:
    """A run (without gradients unless asked) that kept some sites, made its edits, and stopped there; it has no logits."""
    check_unconditional(edits)
    session = Session(anatomy, inputs, keep, edits, put=put)
    session.check_met(pass_until(anatomy, inputs, session.handlers(), grad=grad))
    run = Run(anatomy, inputs, None, session.kept, session.sites)
    run.edits = tuple(edits)
    return run


def pass_until(
    anatomy: Anatomy, inputs: Inputs, handlers: Mapping[Tap, Handler], *, whole: bool = False, grad: bool = False
) -> set[Tap]:
    """Run until every handler has been called, without gradients unless asked; gives the taps that were met.

    The pass goes to its end where it is to be `whole`, or where modules are moved between devices by hooks that must.
    """
    met: set[Tap] = set()
    whole = whole or any(hasattr(module, "_hf_hook") for module in anatomy.module.modules())

    def heard(tap: Tap, handler: Handler) -> Handler:
        def handle(x: Tensor) -> Tensor | None:
            new = handler(x)
            met.add(tap)
            if not whole and len(met) == len(handlers):
                raise _Enough
            return new

        return handle

    wrapped = {tap: heard(tap, handler) for tap, handler in handlers.items()}
    with (
        running(anatomy.module),
        torch.set_grad_enabled(grad),
        Wiretap(anatomy.module, wrapped, len(inputs)),
        suppress(_Enough),
    ):
        anatomy.module(**{**uncached(anatomy.module), **inputs.tensors})
    return met


def watch(anatomy: Anatomy, inputs: Inputs, seen: Mapping[Site, Seen], *, whole: bool = False) -> None:
    """Run the inputs and call each concrete site's function with its values [batch, position, ...] (padding included).

    The values are the model's own tensors: read them, do not keep or change them. The pass ends with the last site, unless
    it is to be `whole`. SiteError where the pass does not come to a site.
    """
    sites: dict[Tap, list[Site]] = {}
    for site in seen:
        sites.setdefault(locate(anatomy, site).tap, []).append(site)

    def handler(tap: Tap) -> Handler:
        def show(x: Tensor) -> None:
            run = Run(anatomy, inputs, None, {tap: x}, sites[tap])
            for site in sites[tap]:
                seen[site](run.everywhere(site)[0])

        return show

    met = pass_until(anatomy, inputs, {tap: handler(tap) for tap in sites}, whole=whole)
    missed = next((each[0] for tap, each in sites.items() if tap not in met), None)
    if missed is not None:
        raise SiteError(f"the run did not pass through {str(missed)!r}, so there is nothing to see")


def together(functions: Mapping[str, Seen], sites: Mapping[str, Site]) -> dict[Site, Seen]:
    """Named functions as `watch` takes them: one for each site, which several may look at."""

    def at(site: Site) -> Seen:
        mine = [functions[name] for name, own in sites.items() if own == site]

        def call(values: Tensor) -> None:
            for function in mine:
                function(values)

        return call

    return {site: at(site) for site in sites.values()}
