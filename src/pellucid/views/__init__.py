"""Views: one interactive picture for every result, in a notebook, in a file, in the report and in the workbench."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pellucid.views.documents import attention as attention
    from pellucid.views.documents import circuit as circuit
    from pellucid.views.documents import compare as compare
    from pellucid.views.documents import document as document
    from pellucid.views.hosts import output as output
    from pellucid.views.hosts import save_html as save_html
    from pellucid.views.plots import plot as plot
    from pellucid.views.schema import Document as Document
    from pellucid.views.widgets import widget as widget

_HOME = {
    "document": ("documents", "document"),
    "compare": ("documents", "compare"),
    "output": ("hosts", "output"),
    "save_html": ("hosts", "save_html"),
    "Document": ("schema", "Document"),
    "plot": ("plots", "plot"),
    "attention": ("documents", "attention"),
    "circuit": ("documents", "circuit"),
    "widget": ("widgets", "widget"),
}
__all__ = ["Document", "attention", "circuit", "compare", "document", "output", "plot", "save_html", "widget"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOME:
        module, own = _HOME[name]
        return getattr(importlib.import_module(f"pellucid.views.{module}"), own)
    if name == "question":  # what the code of a report names
        return importlib.import_module("pellucid.views.question")
    raise AttributeError(f"module 'pellucid.views' has no attribute {name!r}")
