"""The figures of a report: grids of numbers, coloured tokens, bars, curves, tables. Plain HTML and SVG.

Grids are real tables with headings, so that a screen reader reads them; static/report.js adds arrow keys and the
small window that says more about a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pellucid.views.markup import Child, Html, join, number, tag, token
from pellucid.views.palette import STEPS, amount_class, signed_class

Scale = Literal["amount", "signed"]


@dataclass(frozen=True)
class Axis:
    """One side of a grid: its name, and for each row or column a label and perhaps a second, smaller one."""

    name: str
    labels: Sequence[Child]
    below: Sequence[Child] = ()
    marked: Sequence[int] = ()

    def heading(self, i: int, scope: str) -> Html:
        small = tag("small", self.below[i]) if len(self.below) else None
        return tag("th", self.labels[i], small, scope=scope, class_="mark" if i in self.marked else None)


def token_axis(tokens: Sequence[str], positions: Sequence[int], marked: Sequence[int] = ()) -> Axis:
    """Tokens over their positions; those at the positions `marked` stand out."""
    return Axis(
        "token", [token(t) for t in tokens], list(positions), [positions.index(p) for p in marked if p in positions]
    )


def colour(value: float, scale: Scale, full: float) -> str:
    return amount_class(value, full) if scale == "amount" else signed_class(value, full)


def grid(
    values: np.ndarray,
    rows: Axis,
    columns: Axis,
    *,
    label: str,
    name: str,
    scale: Scale,
    full: float = 1.0,
    texts: np.ndarray | None = None,
    tips: Sequence[Sequence[str]] | None = None,
    marked: np.ndarray | None = None,
) -> Html:
    """A table [row, column] whose cells are coloured by `values`, with the legend of its colours.

    Cells show their number, or `texts`. `name` says what the numbers are, `label` what the figure is. `tips` are the
    lines shown about a cell beside its headings; `marked` cells are outlined.
    """
    head = tag("tr", tag("th", rows.name, scope="col"), [columns.heading(j, "col") for j in range(len(columns.labels))])
    body = []
    for i, row in enumerate(values):
        cells = []
        for j, value in enumerate(row):
            kind = colour(float(value), scale, full) + (" mark" if marked is not None and marked[i, j] else "")
            text = _short(float(value), full) if texts is None else token(str(texts[i, j]))
            cells.append(tag("td", text, class_=kind or None, data_tip=tips[i][j] if tips is not None else None))
        body.append(tag("tr", rows.heading(i, "row"), cells))
    wide = "texts" if texts is not None else "numbers"
    table = tag(
        "table", tag("thead", head), tag("tbody", body),
        class_=f"grid {wide}", role="grid", aria_label=label, data_name=name, data_columns=columns.name, style=f"--columns:{values.shape[1]}",
    )  # fmt: skip
    return join(tag("div", table, class_="scroll"), legend(name, scale, full))


def _short(value: float, full: float) -> str:
    """As few digits as tell cells apart; nothing for what rounds to zero, so that the eye finds the rest."""
    if not np.isfinite(value):
        return ""
    text = number(value, 0 if full >= 100 else 1 if full >= 10 else 2)
    return "·" if not text.strip("0.") else text.replace("0.", ".", 1) if text.lstrip("−").startswith("0.") else text


def legend(name: str, scale: Scale, full: float) -> Html:
    """A bar of the scale's colours between its ends."""
    ends = (0.0, full) if scale == "amount" else (-full, full)
    steps = [tag("i", class_=colour(v, scale, full)) for v in np.linspace(*ends, STEPS + 1)]
    low, high = (number(end, 1, sign=scale == "signed") for end in ends)
    return tag("p", name, " ", tag("span", low), tag("span", steps, class_="ramp"), tag("span", high), class_="legend")


def coloured_tokens(tokens: Sequence[str], values: np.ndarray, full: float) -> Html:
    """A text whose tokens carry a signed number each, by colour and in figures."""
    items = [
        tag("li", token(t), tag("small", number(float(v), sign=True)), class_=signed_class(float(v), full))
        for t, v in zip(tokens, values, strict=True)
    ]
    return tag("ol", items, class_="tokens")


def bars(rows: Sequence[tuple[Child, float, str]], full: float = 1.0) -> Html:
    """Amounts as horizontal bars: what, how much, and how much in words."""
    lines = [
        tag("tr", tag("th", what, scope="row"), tag("td", tag("i", style=f"width:{100 * min(1.0, v / full):.1f}%"), class_="bar"),
            tag("td", said, class_="num"))
        for what, v, said in rows
    ]  # fmt: skip
    return tag("table", tag("tbody", lines), class_="bars")


def table(columns: Sequence[str], rows: Sequence[Sequence[Child]]) -> Html:
    """A plain table; the first column heads its row. Columns without names have no heading."""
    head = tag("thead", tag("tr", [tag("th", c, scope="col") for c in columns])) if any(columns) else None
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", c) for c in row[1:]]) for row in rows]
    return tag("div", tag("table", head, tag("tbody", body), class_="plain"), class_="scroll")


def details(summary: str, *children: Child) -> Html:
    return tag("details", tag("summary", summary), children)


# ---- drawn figures: their units are pixels at full width; narrow screens scroll

WIDTH, LEFT, RIGHT = 760, 54, 8


def _x(i: float, n: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / n


def _text(x: float, y: float, *words: Child, anchor: str = "middle", **more: str) -> Html:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, **more)


def _layers_axis(labels: Sequence[str], y: float) -> list[Html]:
    """As many labels as have room beside one another."""
    shown, free = [], 0.0
    for i, label in enumerate(labels):
        x, half = _x(i, len(labels)), 3.5 * len(label) + 5
        if x - half >= free:
            shown.append(_text(x, y, label))
            free = x + half
    return shown


def _drawing(height: int, label: str, *children: Child) -> Html:
    svg = tag("svg", children, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label, class_="drawing")
    return tag("div", svg, class_="scroll")


@dataclass(frozen=True)
class Curve:
    name: Child
    values: Sequence[float]
    kind: str  # CSS class


LEAST = 1e-6  # what a curve of probabilities can still show


def curves(labels: Sequence[str], lines: Sequence[Curve], *, label: str) -> Html:
    """Probabilities along the layers, on a logarithmic scale."""
    top, bottom = 14, 190
    marks = [10.0**-i for i in range(7)]

    def y(p: float) -> float:
        return top + (bottom - top) * np.log10(max(p, LEAST)) / np.log10(LEAST)

    rules = [
        join(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y(m):.1f}", y2=f"{y(m):.1f}"),
             _text(LEFT - 8, y(m) + 4, f"{100 * m:g}%" if i < 6 else "less", anchor="end"))
        for i, m in enumerate(marks)
    ]  # fmt: skip
    drawn = []
    for line in lines:
        points = [(_x(i, len(labels)), y(v)) for i, v in enumerate(line.values)]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        drawn.append(tag("path", d=path, class_=f"curve {line.kind}"))
        drawn += [tag("circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r=2.4, class_=line.kind) for px, py in points]
    key = tag("p", [tag("span", tag("i", class_=line.kind), line.name) for line in lines], class_="key")
    axis = [*_layers_axis(labels, bottom + 18), _text((LEFT + WIDTH) / 2, bottom + 36, "layer")]
    return join(_drawing(bottom + 42, label, tag("g", rules, class_="rules"), axis, drawn), key)


def columns(labels: Sequence[str], panels: Sequence[tuple[str, Sequence[float]]], *, label: str) -> Html:
    """Signed numbers along the layers, one panel of bars above the other, all on one scale."""
    numbers = [v for _, values in panels for v in values if np.isfinite(v)]
    high, low = max([*numbers, 0.0]), min([*numbers, 0.0])
    scale = 100 / max(high - low, 1e-9)
    step, width = 100 + 46, (WIDTH - LEFT - RIGHT) / len(labels) * 0.72
    children: list[Child] = []
    for n, (name, values) in enumerate(panels):
        top = 24 + n * step
        zero = top + high * scale
        children.append(
            tag("g", tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{zero:.1f}", y2=f"{zero:.1f}"), class_="rules")
        )
        children.append(_text(LEFT, top - 10, name, anchor="start", class_="name"))
        ends = [v for v in (high, low) if abs(v) * scale > 12]
        children += [_text(LEFT - 8, zero - v * scale + 4, number(v, 1, sign=True), anchor="end") for v in (*ends, 0.0)]
        for i, v in enumerate(values):
            if np.isfinite(v):
                said = tag("title", f"{name}, layer {labels[i]}: {number(v, sign=True)}")
                x, y, height = _x(i, len(labels)) - width / 2, zero - max(v, 0.0) * scale, abs(v) * scale
                children.append(
                    tag("rect", said, x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", class_="up" if v > 0 else "down")
                )  # fmt: skip
    height = len(panels) * step
    axis = [*_layers_axis(labels, height + 2), _text((LEFT + WIDTH) / 2, height + 20, "layer")]
    return _drawing(height + 26, label, children, axis)
