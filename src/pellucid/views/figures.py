"""The plain figures of a report: bars and tables in HTML, which need no script."""

from __future__ import annotations

from collections.abc import Sequence

from pellucid.views.markup import Child, Html, tag


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
