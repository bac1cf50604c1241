"""Values of a forward pass shown as they come, kept nowhere, and no further pass than the last of them needs.

What is read over a whole corpus is used at once: nothing is copied, and the blocks and the unembedding behind the last
site are not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Anatomy, Tap
from pellucid.anatomy.wiretap import Handler
from pellucid.engine.early import pass_until
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import locate
from pellucid.engine.run import Run
from pellucid.errors import SiteError

Seen = Callable[[Tensor], None]


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
