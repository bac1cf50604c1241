"""The page itself: an empty frame and two scripts, which draw everything."""

from __future__ import annotations

import re
from importlib import resources
from urllib.parse import quote

from pellucid.errors import InputError
from pellucid.views.markup import Html, join, tag

NAME = re.compile(r"[a-z]+\.(js|css)")
TYPES = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
STYLE = """:root{color-scheme:light dark;--paper:#fbfaf7;--ink:#201e1b}
@media(prefers-color-scheme:dark){:root:not([data-theme=light]){--paper:#17191c;--ink:#e9e5dd}}
:root[data-theme=dark]{--paper:#17191c;--ink:#e9e5dd;color-scheme:dark}:root[data-theme=light]{color-scheme:light}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 ui-sans-serif,system-ui,sans-serif}"""


def page(token: str) -> str:
    """The HTML of the workbench. What is without scripts says so."""
    scripts = [
        tag("script", type="module", src=f"/static/{name}.js?token={quote(token)}") for name in ("views", "workbench")
    ]
    head = join(
        tag("meta", charset="utf-8"), tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"), tag("title", "pellucid workbench"),
        Html('<link rel="icon" href="data:,">'), tag("style", Html(STYLE)),
    )  # fmt: skip
    body = join(
        tag("div", id="workbench"),
        tag("noscript", "The workbench needs scripts; its own, from this machine."),
        *scripts,
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def static(name: str) -> tuple[bytes, str]:
    """A built file and its type. InputError for a name that is none of ours, or was not built."""
    file = resources.files("pellucid.views").joinpath("static", name) if NAME.fullmatch(name) else None
    if file is None or not file.is_file():
        raise InputError(f"there is no file {name[:80]!r}; if it is missing, run `npm ci && npm run build` in web/")
    return file.read_bytes(), TYPES[name.rsplit(".", 1)[1]]
