"""One HTML file that needs nothing else: the frame of a report, with its styles and the views inside.

The page asks no network for anything, and its content security policy forbids it to; only the one script whose hash
the policy names can run, whatever a prompt contains. Everything said in words stands in the page itself and is there
without scripts, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

import msgspec

from pellucid.views import source
from pellucid.views.hosts import bundle, element, policy, theme_button
from pellucid.views.markup import Child, Html, details, join, tag
from pellucid.views.schema import Code, Document, Origin

if TYPE_CHECKING:
    from pellucid.results import Result


@dataclass(frozen=True)
class Section:
    """One question of a report: how to read the answer, the views, what can mislead in it, and how to make it again.

    `finding` is the sentence it adds to the findings; `results` say where it comes from and, unless `python` does, how it is
    made again.
    """

    id: str
    name: str  # in the contents
    title: str
    lead: Child
    figure: Child = ""
    views: tuple[Document, ...] = ()
    care: Child = ""
    python: str = ""
    shell: str | None = None
    finding: str = ""
    verdict: str = ""  # how far the finding can be trusted, by its control; empty where it has none
    results: tuple[Result, ...] = field(default=(), repr=False)

    def html(self) -> Html:
        care = tag("p", tag("b", "Mind: "), self.care, class_="care") if self.care else None
        python = self.program
        made = details("Make it yourself", code(python), code(self.shell)) if python and not self.views else None
        return tag("section", tag("h2", self.title, id=f"{self.id}-title"), tag("p", self.lead), self.figure,
                   [element(self._sourced(v)) for v in self.views], care, made, id=self.id, aria_labelledby=f"{self.id}-title")  # fmt: skip

    @property
    def program(self) -> str:
        return self.python or source.code(*(result.provenance for result in self.results)).python

    def _sourced(self, view: Document) -> Document:
        """The view with the section's code and the provenance of its result."""
        known = view.provenance != Origin() or not self.results
        made = view.provenance if known else source.origin(self.results[0].provenance)
        return msgspec.structs.replace(view, code=Code(python=self.program, shell=self.shell or ""), provenance=made)


def missing(id: str, name: str, title: str, why: str) -> Section:
    """A section that this model cannot have, with the reason."""
    return Section(id, name, title, tag("span", f"Not available here: {why}.", class_="missing"))


def code(text: str | None) -> Html | None:
    return tag("div", tag("pre", text, tabindex=0), class_="code") if text else None


def page(title: str, header: Child, sections: list[Section], footer: Child) -> str:
    """The whole document."""
    script = Html(bundle())
    contents = tag(
        "nav", tag("ol", [tag("li", tag("a", s.name, href=f"#{s.id}")) for s in sections]), theme_button(), aria_label="Contents"
    )  # fmt: skip
    head = join(
        tag("meta", charset="utf-8"),
        policy(script),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content="pellucid"),
        tag("title", title),
        tag(
            "style",
            Html(resources.files("pellucid.views").joinpath("static", "report.css").read_text(encoding="utf-8")),
        ),
    )
    body = join(
        tag("a", "Skip to the findings", href="#main", class_="skip"),
        tag("div", contents, tag("header", header), tag("main", [s.html() for s in sections], id="main"), tag("footer", footer), class_="page"),
        tag("script", script, type="module"),
    )  # fmt: skip
    return f'<!doctype html>\n<html lang="en" id="top"><head>{head}</head>\n<body>{body}</body></html>\n'
