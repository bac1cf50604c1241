"""One HTML file that needs nothing else: the frame of a report, with its styles and its script inside.

The page asks no network for anything, and its content security policy forbids it to; only the one script whose hash
the policy names can run, whatever a prompt contains.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

from pellucid.views import palette
from pellucid.views.figures import details
from pellucid.views.markup import Child, Html, escaped, join, tag

if TYPE_CHECKING:
    from pellucid.results import Result


@dataclass(frozen=True)
class Section:
    """One question of a report: how to read the answer, the figure, what can mislead in it, and how to make it again.

    `finding` is the sentence it adds to the findings; `results` are kept for the provenance.
    """

    id: str
    name: str  # in the contents
    title: str
    lead: Child
    figure: Child = ""
    care: Child = ""
    python: str = ""
    shell: str | None = None
    finding: str = ""
    results: tuple[Result, ...] = field(default=(), repr=False)

    def html(self) -> Html:
        care = tag("p", tag("b", "Mind: "), self.care, class_="care") if self.care else None
        made = details("Make it yourself", code(self.python), code(self.shell)) if self.python else None
        return tag("section", tag("h2", self.title, id=f"{self.id}-title"), tag("p", self.lead), self.figure, care, made,
                   id=self.id, aria_labelledby=f"{self.id}-title")  # fmt: skip


def missing(id: str, name: str, title: str, why: str) -> Section:
    """A section that this model cannot have, with the reason."""
    return Section(id, name, title, tag("span", f"Not available here: {why}.", class_="missing"))


def code(text: str | None) -> Html | None:
    return tag("div", tag("pre", text, tabindex=0), class_="code") if text else None


def page(title: str, header: Child, sections: list[Section], footer: Child) -> str:
    """The whole document."""
    script = Html(_static("report.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    contents = tag(
        "nav", tag("ol", [tag("li", tag("a", s.name, href=f"#{s.id}")) for s in sections]), aria_label="Contents"
    )
    head = join(
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{escaped(policy)}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content="pellucid"),
        tag("title", title),
        tag("style", Html(styles())),
    )
    body = join(
        tag("a", "Skip to the findings", href="#main", class_="skip"),
        tag("div", contents, tag("header", header), tag("main", [s.html() for s in sections], id="main"), tag("footer", footer), class_="page"),
        tag("div", id="tip", role="status", hidden=True),
        tag("script", script),
    )  # fmt: skip
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def styles() -> str:
    """The style sheet, and both themes of the colour scales."""
    dark = "".join(palette.styles("dark"))
    return "".join([_static("report.css"), *palette.styles("light"), f"@media (prefers-color-scheme:dark){{{dark}}}"])


def _static(name: str) -> str:
    return resources.files("pellucid.views").joinpath("static", name).read_text(encoding="utf-8")
