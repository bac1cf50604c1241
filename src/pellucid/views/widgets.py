"""How does a notebook hear what its reader selects? A widget whose selection lives in the kernel as well.

    chosen = widget(result)
    chosen                      # in a cell of its own: the view
    chosen.component            # in a later cell: what was clicked, such as "layers.5.attn.heads.9"
    chosen.component = "..."    # selects it in the view

A result shows itself without this; only the way back into Python needs the extra `pellucid[notebook]` (anywidget). A
widget is nothing without its kernel, so its cell also holds the plain view, which the living widget takes the place of.
"""

from __future__ import annotations

import importlib
import uuid
from functools import cache
from typing import Any

from pellucid.errors import InputError
from pellucid.views.documents import document
from pellucid.views.hosts import bundle, output
from pellucid.views.markup import Html, tag
from pellucid.views.schema import Document


def widget(thing: Any) -> Any:
    """A widget of anything that has a view; `component` (a site or "") and `position` (-1 for none) follow the selection.

    InputError where anywidget is not installed.

    >>> chosen = widget(pl.lenses.logit_lens(model, prompt))  # needs anywidget  # doctest: +SKIP
    """
    return _kind()(document=document(thing).json(), instead=uuid.uuid4().hex)


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
        instead = traitlets.Unicode().tag(sync=True)  # names the plain view in its cell

        def _ipython_display_(self) -> None:
            """The view as every result shows itself, and the widget, which hides it as long as it lives."""
            display = importlib.import_module("IPython.display").display
            shown = Document.read(self.document)
            instead = tag("div", Html(output(shown)), data_pellucid_instead=self.instead)
            display({"text/html": instead, "text/plain": repr(shown)}, raw=True)
            data, metadata = super()._repr_mimebundle_()
            display({**data, "text/plain": repr(shown)}, metadata=metadata, raw=True)

    return View
