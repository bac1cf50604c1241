"""Writes the pages of the API reference: every public name of every folder, from its docstring and annotations.

A docstring is prose with `code` in single backticks, indented lines that are meant as they stand (formulas, tables), and
examples behind `>>>`. Sphinx reads the second as quotations, so they are made literal blocks on the way.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

FOLDERS = {
    "attribution": "Attribution", "attribution.evaluation": "Attribution: how far to trust it", "attention": "Attention",
    "causal": "Causal intervention", "circuits": "Circuits", "lenses": "Lenses", "neurons": "Neurons",
    "neurons.dictionaries": "Dictionaries", "probing": "Probing", "surgery": "Surgery", "safety": "Safety", "tuning": "Tuning",
    "tasks": "Tasks", "metrics": "Metrics", "controls": "Controls", "changed": "Changed models", "corpus": "Corpora",
    "store": "Stored activations", "results": "Results", "views": "Views", "workers": "Where sweeps run", "errors": "Errors",
}  # fmt: skip


def names(module: Any) -> list[str]:
    """What the module offers: its `__all__`, what it loads on first use, or what is defined in it."""
    listed = getattr(module, "__all__", None) or [*getattr(module, "_HOME", ()), *getattr(module, "_MODULES", ())]
    if not listed:
        listed = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    return sorted(n for n in listed if not n.startswith("_"))


def entry(address: str, thing: Any, known: dict[Any, str] | None = None) -> str:
    """The directive that documents one public name; of a class that stands under another name already, where."""
    if inspect.isclass(thing):
        first = address if known is None else known.setdefault(thing, address)
        if first != address:
            return f"`{address.removeprefix('pellucid.')}` is :class:`{first}`.\n"
        return f".. autoclass:: {address}\n   :members:\n"
    if inspect.isfunction(thing):
        return f".. autofunction:: {address}\n"
    return ""


def page(folder: str, title: str, known: dict[Any, str] | None = None) -> str:
    module = importlib.import_module(f"pellucid.{folder}")
    found = [entry(f"pellucid.{folder}.{name}", getattr(module, name), known) for name in names(module)]
    head = f"{title}\n{'=' * len(title)}\n\n.. currentmodule:: pellucid.{folder}\n"
    opening = (inspect.getdoc(module) or "").splitlines()
    literal(None, "module", folder, module, None, opening)
    return "\n".join([head, *opening, "", *filter(None, found)])


def top() -> str:
    """The names one uses at once: `pl.load`, edits, models, runs."""
    import pellucid

    found = [
        entry(f"pellucid.{name}", getattr(pellucid, name))
        for name in sorted(pellucid._HOME)
        if pellucid._HOME[name] != "workers"
    ]
    title = "The model, its sites and edits"
    return "\n".join([title, "=" * len(title), "", *filter(None, found)])


def write(app: Any) -> None:
    """One page for each folder, written where what it says has changed."""
    into = Path(app.srcdir) / "reference"
    into.mkdir(exist_ok=True)
    known: dict[Any, str] = {}  # classes, by where they were documented first
    pages = {
        "model": top(),
        **{folder.replace(".", "_"): page(folder, title, known) for folder, title in FOLDERS.items()},
    }
    listed = "\n   ".join(pages)
    title = "Reference"
    pages["index"] = f"{title}\n{'=' * len(title)}\n\n.. toctree::\n   :maxdepth: 1\n\n   {listed}\n"
    for name, text in pages.items():
        file = into / f"{name}.rst"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def literal(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Prose as prose (its bars, stars and final underscores are no markup), indented lines as they stand."""
    made: list[str] = []
    inside = example = False
    for line in lines:
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        indented = line.startswith("    ") and bool(line.strip())
        if indented and not inside and not example:
            made += ["::", ""] if not made or not made[-1].strip() else ["", "::", ""]
            inside = True
        elif line.strip() and not indented:
            if inside and made[-1].strip():
                made.append("")
            inside = False
        made.append(line if inside or example else escaped(line))
    lines[:] = made


def escaped(line: str) -> str:
    """
    >>> escaped("|r - p| is `a|b`, losses_ and *args")
    '\\\\|r - p\\\\| is `a|b`, losses\\\\_ and \\\\*args'
    """
    parts = line.split("`")
    prose = [re.sub(r"([|*]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
    joined = [re.sub(r"^(?=[\w(])", r"\\ ", part) for part in prose[1:]]  # code may touch a word: its end needs a sign
    parts[::2] = [*prose[:1], *joined]
    return "`".join(parts)


def setup(app: Any) -> dict[str, Any]:
    app.connect("builder-inited", write)
    app.connect("autodoc-process-docstring", literal)
    return {"parallel_read_safe": True}
