"""What does a view say where no script may run: in a notebook that is not trusted, on a code host, in a mail?

Its strongest numbers as a short table. All of it is in the page before any script is; the view takes its place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pellucid.views import kinds
from pellucid.views.markup import Html, join, tag
from pellucid.views.schema import Document


def plain(shown: Document) -> Html:
    """Title, how to read it, and the strongest numbers."""
    columns, rows, of = kinds.of(shown.data).plain(shown.data)
    head = tag("tr", [tag("th", c) for c in columns])
    body = [tag("tr", [tag("td", _text(cell)) for cell in row]) for row in rows]
    some = f"The strongest {len(rows)} of {of}. " if of > len(rows) else ""
    return join(
        tag("strong", shown.title), tag("p", shown.lead) if shown.lead else None,
        tag("table", tag("thead", head), tag("tbody", body)) if rows else None,
        tag("p", f"{some}Scripts are off here: where they may run (a trusted notebook, a browser), this is an interactive view."),
    )  # fmt: skip


def _text(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float | np.floating) else str(cell)
