"""What does a view say where no script may run: in a notebook that is not trusted, on a code host, in a mail?

Its strongest numbers as a short table. All of it is in the page before any script is; the view takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pellucid.views import schema as s
from pellucid.views.markup import Html, join, tag, visible
from pellucid.views.schema import Document

ROWS = 8
Cells = tuple[Sequence[str], Sequence[Sequence[Any]], int]  # columns, rows, and of how many these are the strongest


def plain(shown: Document) -> Html:
    """Title, how to read it, and the strongest numbers."""
    columns, rows, of = _cells(shown.data)
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


def _strongest(values: np.ndarray) -> list[tuple[int, ...]]:
    """Indices of the largest in size, the largest first; missing ones never."""
    size = np.nan_to_num(np.abs(values.astype(float)), nan=-1.0)
    flat = np.argsort(-size, axis=None, kind="stable")[:ROWS]
    return [at for at in zip(*(i.tolist() for i in np.unravel_index(flat, values.shape)), strict=True) if size[at] >= 0]


def _cells(data: s.View) -> Cells:
    make: Any = globals()[f"_{type(data).__name__.lower()}"]
    found: Cells = make(data)
    return found


def _tokens(data: s.Tokens) -> Cells:
    tracks = [t.values.array() for t in data.tracks]
    rows = [(p, visible(data.tokens[p]), *(float(t[p]) for t in tracks)) for (p,) in sorted(_strongest(tracks[0]))]
    return ("", "token", *(t.name for t in data.tracks)), rows, len(data.tokens)


def _attention(data: s.Attention) -> Cells:
    stack = data.stacks[0]
    head, last = stack.heads[stack.first], len(stack.queries) - 1
    weights = np.zeros(len(stack.keys))
    if stack.pattern is not None:
        weights = stack.pattern.array()[stack.first, last]
    elif stack.rows is not None:
        counts = stack.rows.counts.array().ravel()
        row = stack.first * len(stack.queries) + last
        kept = slice(int(counts[:row].sum()), int(counts[: row + 1].sum()))
        weights[stack.rows.keys.array()[kept]] = stack.rows.weights.array()[kept]
    rows = [(f"{head.layer}.{head.head}", visible(stack.queries[last]), visible(stack.keys[k]), float(weights[k])) for (k,) in _strongest(weights)]  # fmt: skip
    return ("head", "from", "to", "attention"), rows, len(stack.heads) * len(stack.queries) * len(stack.keys)


def _lens(data: s.Lens) -> Cells:
    reading, last = data.readings[0], len(data.tokens) - 1
    top, p = reading.top.array(), reading.probability.array()
    layers = sorted(set(np.linspace(0, len(data.layers) - 1, ROWS).round().astype(int).tolist()))
    rows = [(data.layers[i], visible(data.tokens[last]), visible(data.words[top[i, last, 0]]), float(p[i, last, 0])) for i in layers]  # fmt: skip
    return ("layer", "after", "best guess", "probability"), rows, len(rows)


def _contributions(data: s.Contributions) -> Cells:
    values = data.values.array()
    return ("part", data.unit), [(data.names[i], float(values[i])) for (i,) in _strongest(values)], len(values)


def _grid(data: s.Grid) -> Cells:
    plane = data.planes[0]
    values = plane.values.array()
    rows = [(data.rows.labels[i], visible(data.columns.labels[j]), float(values[i, j])) for i, j in _strongest(values)]
    return (data.rows.name, data.columns.name, f"{data.unit}, {plane.name}"), rows, values.size


def _circuit(data: s.Circuit) -> Cells:
    sources, targets, scores = data.sources.array(), data.targets.array(), data.scores.array()
    rows = [(data.nodes[sources[e]].label, data.nodes[targets[e]].label, data.ports[e], float(scores[e])) for (e,) in _strongest(scores)]  # fmt: skip
    return ("from", "to", "port", "score"), rows, len(scores)


def _curves(data: s.Curves) -> Cells:
    def at(line: s.Line, i: int) -> tuple[str, float]:
        x = line.x.array()[i]
        return data.x.labels[int(x)] if data.x.labels else f"{x:.4g}", float(line.y.array()[i])

    rows = [(line.name, *at(line, 0), *at(line, -1)) for line in data.lines[:ROWS] if line.x.shape[0]]
    return ("curve", f"first {data.x.name}", data.y.name, f"last {data.x.name}", data.y.name), rows, len(rows)


def _neuron(data: s.Neuron) -> Cells:
    rows: list[Sequence[Any]] = []
    for context in data.contexts[:ROWS]:
        values = context.values.array()
        at = int(np.nanargmax(np.abs(values)))
        rows.append(("".join(context.tokens[max(0, at - 8) : at]), visible(context.tokens[at]), float(values[at])))
    return ("text before", "token", "activation"), rows, len(data.contexts)


def _traces(data: s.Traces) -> Cells:
    values = data.values.array()
    rows = [(data.rows.labels[i], visible(data.tokens[j]), float(values[i, j])) for i, j in _strongest(values)]
    return (data.rows.name, "token", data.unit or "value"), rows, values.size


def _anatomy(data: s.Anatomy) -> Cells:
    said = {True: "holds", False: "fails", None: "does not apply"}
    return ("proof", "claim", ""), [(p.name, p.claim, said[p.holds]) for p in data.proofs], len(data.proofs)


def _table(data: s.Table) -> Cells:
    columns = [_column(c) for c in data.columns]
    n = min(map(len, columns), default=0)
    return [c.name for c in data.columns], [[c[i] for c in columns] for i in range(n)], n


def _column(column: s.Column) -> list[Any]:
    if column.numbers is not None:
        return [float(x) for x in column.numbers.array().ravel()[:ROWS]]
    return [visible(text) if column.tokens else text for text in (column.texts or ())[:ROWS]]
