"""How to write HTML that cannot be broken by what it shows?

Text is escaped, always; only `Html` is taken as it is, and only `tag` and `join` make it.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Markup: no longer to be escaped."""

    __slots__ = ()


VOID = {"meta", "br", "hr", "img"}
Child = Any  # text, Html, a number, None (nothing), or an iterable of them


def join(*children: Child) -> Html:
    """Children one after the other, text escaped.

    >>> join("a < b", [tag("b", "&"), None], 3)
    'a &lt; b<b>&amp;</b>3'
    """
    return Html("".join(_piece(child) for child in children))


def _piece(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return escaped(child)
    if isinstance(child, Iterable):
        return join(*child)
    return escaped(str(child))


def escaped(text: str) -> str:
    """`text` for content and attributes; what UTF-8 or HTML cannot hold becomes a question mark or a sign."""
    text = text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
    return html.escape(text, quote=True)


def tag(name: str, /, *children: Child, **attributes: Any) -> Html:
    """An element. `class_` is `class`, `data_tip` is `data-tip`; None and False leave an attribute out.

    >>> tag("p", "1 < 2", class_="note", hidden=True, id=None)
    '<p class="note" hidden>1 &lt; 2</p>'
    """
    given = ((key.strip("_").replace("_", "-"), value) for key, value in attributes.items())
    written = [
        f" {key}" if value is True else f' {key}="{escaped(str(value))}"'
        for key, value in given
        if value is not None and value is not False
    ]
    start = f"<{name}{''.join(written)}>"
    return Html(start) if name in VOID and not children else Html(f"{start}{join(*children)}</{name}>")


# ---- tokens and numbers, as people can read them

SPACES = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\u3000": "⬚"}


def visible(token: str) -> str:
    """A token with what cannot be seen made visible: outer spaces, line ends, control and format characters.

    >>> visible(" Paris"), visible("\\n  "), visible("a\\u202eb"), visible("")
    ('␣Paris', '⏎␣␣', 'a\\\\u202eb', '∅')
    """
    start, end = len(token) - len(token.lstrip()), len(token.rstrip())
    shown = [
        (SPACES.get(c) if not start <= i < end or c != " " else None) or _printable(c) for i, c in enumerate(token)
    ]
    return "".join(shown) or "∅"


def _printable(c: str) -> str:
    if c == " " or unicodedata.category(c)[0] not in "CZ":
        return c
    return c.encode("unicode_escape").decode()


def token(text: str) -> Html:
    """A token set apart from the prose around it, its outer spaces as quiet signs."""
    shown = visible(text)
    body = shown.strip("␣")
    lead = len(shown) - len(shown.lstrip("␣")) if body else len(shown)
    return tag("bdi", _quiet(lead), body, _quiet(len(shown) - lead - len(body)), class_="token")


def _quiet(n: int) -> Html | None:
    return tag("i", "␣" * n, class_="sp") if n else None


def quoted(text: str) -> str:
    """A token inside a sentence: “Paris”, without the space it starts with."""
    return f"“{visible(text.strip() or text)}”"


def number(x: float, digits: int = 2, sign: bool = False) -> str:
    """
    >>> number(-0.251), number(3, sign=True), number(-0.001)
    ('−0.25', '+3.00', '0.00')
    """
    text = f"{x:{'+' if sign else ''}.{digits}f}"
    if not text.strip("+-0."):
        return text.lstrip("+-")
    return text.replace("-", "−")


def percent(p: float) -> str:
    """
    >>> percent(0.702), percent(0.0312), percent(0.0002), percent(0.9996), percent(1.0)
    ('70%', '3.1%', '<0.1%', '>99.9%', '100%')
    """
    if p >= 1:
        return "100%"
    if p < 0.001:
        return "<0.1%" if p > 0 else "0%"
    if 0.9995 <= p < 1:
        return ">99.9%"
    return f"{100 * p:.0f}%" if p >= 0.0995 and round(100 * p) < 100 else f"{100 * p:.1f}%"


# ---- figures that need no script


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
