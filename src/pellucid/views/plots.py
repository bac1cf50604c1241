"""How does a view look in a paper? On matplotlib axes: labelled, in vectors, for every kind of eye.

A paper's figure in three lines:

    import matplotlib.pyplot as plt
    pl.causal.ablation(model, prompt, metric=metric).plot()
    plt.savefig("heads.pdf")

Needs `pip install 'pellucid[plot]'`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pellucid.errors import InputError
from pellucid.views import drawing, kinds
from pellucid.views.documents import document

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(thing: Any, ax: Axes | None = None, *, choice: str | None = None) -> Axes:
    """Draw what a view shows (a result, a circuit, a model, a document) on matplotlib axes, which are returned.

    `ax` is drawn on if given, else a figure of fitting size is made. `choice` names the one shown where the view has
    several: a plane of a grid, a method of a text, a reading of a lens, a head as "layer.head". InputError where matplotlib
    is missing, a choice is unknown, or the result is a table without numbers.

    >>> import xarray as xr
    >>> from pellucid.results import Result
    >>> effect = xr.DataArray([[0.5, -2.0]], dims=("layer", "head"), name="effect")
    >>> plot(Result(effect, kind="ablation", title="Heads")).get_title(loc="left")
    'Heads'
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("plots are drawn by matplotlib: pip install 'pellucid[plot]'") from None
    shown = document(thing)
    kind = kinds.of(shown.data)
    if ax is None:
        ax = plt.subplots(figsize=drawing.size(shown.data), layout="constrained")[1]
    ax.set_title(shown.title, loc="left", fontsize=10, color=drawing.INK, wrap=True)
    ax.tick_params(labelsize=8, color=drawing.SOFT, labelcolor=drawing.INK, length=2)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    before = set(ax.figure.axes)
    kind.draw(shown.data, ax, choice)
    for each in (ax, *(set(ax.figure.axes) - before)):
        _literal(each)
    return ax


def _literal(ax: Axes) -> None:
    """Dollar signs are those of prompts and tokens, and begin no formula; powers on a logarithmic axis are matplotlib's own."""
    from matplotlib.text import Text

    powers = {
        label
        for axis in (ax.xaxis, ax.yaxis)
        if axis.get_scale() == "log"
        for label in axis.get_ticklabels(which="both")
    }
    for text in set(ax.findobj(Text)) - powers:
        if text.get_wrap():  # whose width matplotlib takes as a formula's, whatever `parse_math` says
            text.set_text(text.get_text().replace("$", r"\$"))
        else:
            text.set_parse_math(False)
