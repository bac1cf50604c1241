"""How does a notebook hear what its reader selects? A widget whose selection lives in the kernel as well.

    chosen = widget(result)
    chosen                      # in a cell of its own: the view
    chosen.component            # in a later cell: what was clicked, such as "layers.5.attn.heads.9"
    chosen.component = "..."    # selects it in the view

A result shows itself without this; only the way back into Python needs the extra `pellucid[notebook]` (anywidget).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pellucid.errors import InputError
from pellucid.views.documents import document
from pellucid.views.hosts import bundle


def widget(thing: Any) -> Any:
    """A widget of anything that has a view; `component` (a site or "") and `position` (-1 for none) follow the selection.

    InputError where anywidget is not installed.

    >>> chosen = widget(pl.lenses.logit_lens(model, prompt))    # doctest: +SKIP
    """
    return _kind()(document=document(thing).json())


@cache
def _kind() -> Any:
    try:
        import anywidget
        import traitlets
    except ImportError:
        raise InputError("the widget needs anywidget: pip install 'pellucid[notebook]'") from None

    class View(anywidget.AnyWidget):
        _esm = bundle()
        document = traitlets.Unicode().tag(sync=True)
        component = traitlets.Unicode("").tag(sync=True)
        position = traitlets.Int(-1).tag(sync=True)

    return View
