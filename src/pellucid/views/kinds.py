"""Which kinds of view are there, and which one shows a result?

One row for each. To add a kind: write its schema (a `schema.Shown`), what makes it from a result and what it says without
scripts, and add a row here; in web/src/kinds.ts a row says how it is drawn and what its table holds. Nothing else knows
how many kinds there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.views import drawing, forms, looking, maps, monitors, pages
from pellucid.views import schema as s
from pellucid.views.cells import Cells


@dataclass(frozen=True)
class Kind:
    """One kind of view.

    schema    its class; the class's name is what the page knows it by
    plain     columns, rows, and of how many these are the strongest: the view where no script may run
    draw      draws it on matplotlib axes, for a paper; the third argument is what is shown of several
    fits      whether this is the view of a result; None for what no result looks like (the map of a model)
    make      the view of a result that fits
    compare   several results, by name, in one view; None where that shows nothing
    """

    schema: type[s.Shown]
    plain: Callable[[Any], Cells]
    draw: Callable[[Any, Any, str | None], None]
    fits: Callable[[Result], bool] | None = None
    make: Callable[[Result], s.View] | None = None
    compare: Callable[[Mapping[str, Result]], s.View] | None = None

    @property
    def name(self) -> str:
        return str(self.schema.__struct_config__.tag)


# Results are shown by the first row they fit; every result fits the last.
KINDS = [
    Kind(s.Neuron, pages.plain_neuron, drawing.neuron, pages.is_neuron, pages.neuron),
    Kind(s.Lens, forms.plain_lens, drawing.lens, forms.is_lens, forms.lens, forms.lenses),
    Kind(
        s.Contributions, forms.plain_contributions, drawing.contributions, forms.is_contributions, forms.contributions
    ),
    Kind(s.Traces, monitors.plain_traces, drawing.traces, monitors.is_traces, monitors.traces),
    Kind(
        s.Attention,
        looking.plain_attention,
        drawing.attention,
        looking.is_attention,
        looking.attention,
        looking.attentions,
    ),
    Kind(s.Tokens, forms.plain_tokens, drawing.tokens, forms.is_tokens, forms.token_view, forms.tokens),
    Kind(s.Curves, forms.plain_curves, drawing.curves, forms.is_curves, forms.curves, forms.charts),
    Kind(s.Grid, forms.plain_grid, drawing.grid, forms.is_grid, forms.grid, forms.grids),
    Kind(s.Circuit, maps.plain_circuit, drawing.circuit),
    Kind(s.Anatomy, maps.plain_anatomy, drawing.anatomy),
    Kind(s.Table, forms.plain_table, drawing.table, lambda result: True, forms.table),
]


def view(result: Result) -> s.View:
    """The view of a result."""
    return next(kind.make(result) for kind in KINDS if kind.fits and kind.make and kind.fits(result))


def of(shown: s.View) -> Kind:
    return next(kind for kind in KINDS if kind.schema is type(shown))


def together(methods: Mapping[str, Result]) -> s.View:
    """Several results of one kind in one view. InputError where they are of different kinds, or of one that cannot."""
    kinds = {name: of(view(result)) for name, result in methods.items()}
    first = next(iter(kinds.values()))
    if first.compare is None or any(kind is not first for kind in kinds.values()):
        each = ", ".join(f"{name!r} {kind.name}" for name, kind in kinds.items())
        able = ", ".join(kind.name for kind in KINDS if kind.compare)
        raise InputError(f"these cannot stand in one view: {each}; what can, several of one kind, are {able}")
    return first.compare(methods)
