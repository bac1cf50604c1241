"""Where does a view live? In a notebook's output, in a file of its own, in a report: always with all it needs.

A view in HTML is an element that carries its document as JSON and, as long as no script runs, a plain table (in a notebook, whose
scripts do not run when it is opened again before it is trusted, under a picture, where matplotlib is installed):

    <div data-pellucid><script type="application/json">{...}</script> ...fallback... </div>

static/views.js brings every such element of a page to life. A file holds the script once. A notebook's outputs stand
alone (any may be deleted, moved, or shown in a frame of its own), so each carries the script, packed; the first that runs
loads it, and all later ones find it there.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import warnings
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.views.documents import document
from pellucid.views.markup import Html, escaped, join, tag
from pellucid.views.plain import plain
from pellucid.views.schema import Document

SHOWN = 50  # prompts of one result, one beneath another
STILLS = 4  # of these with a picture, which takes .2 s to draw

# Jupyter evaluates scripts of an output anew whenever it is shown; the module is loaded once, and asked to look again.
LOADER = """(()=>{const g=globalThis;if(g.pellucid)return g.pellucid.scan();if(g.pellucidLoads)return;g.pellucidLoads=1;
const packed=Uint8Array.from(atob("%s"),c=>c.charCodeAt(0));
new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text().then(text=>{
const script=document.createElement("script");script.type="module";script.textContent=text;document.head.append(script)})})()"""


@cache
def bundle() -> str:
    """The views as one ES module. InputError where they were not built."""
    try:
        return resources.files("pellucid.views").joinpath("static", "views.js").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            "the views are not built: run `npm ci && npm run build` in web/, or install a release"
        ) from None


def element(shown: Document, still: Html | str = "") -> Html:
    """The element a view lives in; without scripts it is a title and a short table, below `still`."""
    body = shown.json()
    return tag("div", Html(f'<script type="application/json">{body}</script>'), still, plain(shown), data_pellucid=True)


# ---- notebooks


@cache
def _loader() -> str:
    return LOADER % base64.b64encode(gzip.compress(bundle().encode(), 9, mtime=0)).decode()


def output(thing: Any) -> str:
    """HTML for a notebook's output: lives without a kernel and without a network."""
    shown = [document(each) for each in _apart(thing)]
    still = [_still(each) for each in shown[:STILLS]] + [""] * (len(shown) - STILLS)
    return join(*map(element, shown, still), Html(f"<script>{_loader()}</script>"))


def _still(shown: Document) -> Html | str:
    """The view as a picture; nothing where matplotlib is missing, or the view has none. Jupyter lets an image's data through to an untrusted page."""
    if find_spec("matplotlib") is None:
        return ""
    from matplotlib.figure import Figure  # not pyplot's, which a notebook would show once more

    from pellucid.views import drawing, plots

    figure, file = Figure(figsize=drawing.size(shown.data), layout="constrained"), io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of signs that the font has not: the table below has them
        try:
            plots.plot(shown, figure.subplots())
        except InputError:
            return ""
        figure.savefig(file, format="png", dpi=96)
    picture = base64.b64encode(file.getvalue()).decode()
    return tag("p", tag("img", src=f"data:image/png;base64,{picture}", alt=shown.title))


def _apart(thing: Any) -> list[Any]:
    """A result whose prompts have tokens of their own as one result for each: they share no axis a view could have."""
    several = isinstance(thing, Result) and {"prompt", "n_position", "n_player"} & set(thing.data.coords)
    own = several and any("prompt" in thing.data[name].dims for name in ("token", "text") if name in thing.data.coords)
    return thing.prompts[:SHOWN] if own else [thing]


# ---- files

STYLE = """:root{color-scheme:light dark;--paper:#fbfaf7;--ink:#201e1b;--soft:#67625a;--rule:#e2ded5}
@media(prefers-color-scheme:dark){:root:not([data-theme=light]){--paper:#17191c;--ink:#e9e5dd;--soft:#a39d92;--rule:#34383d}}
:root[data-theme=dark]{--paper:#17191c;--ink:#e9e5dd;--soft:#a39d92;--rule:#34383d;color-scheme:dark}:root[data-theme=light]{color-scheme:light}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 ui-sans-serif,system-ui,sans-serif}
main{max-width:76rem;margin:0 auto;padding:2rem 1.25rem 4rem}main>*{margin-bottom:2.5rem}
header{display:flex;justify-content:space-between;align-items:baseline;gap:1rem;flex-wrap:wrap;border-bottom:1px solid var(--rule);padding-bottom:.8rem}
h1{font:400 1.5rem/1.35 Palatino,"Palatino Linotype",Georgia,serif;margin:0;overflow-wrap:anywhere}
button{font:inherit;font-size:.8125rem;color:var(--soft);background:none;border:1px solid var(--rule);border-radius:5px;padding:.2rem .6rem;cursor:pointer}
footer{color:var(--soft);font-size:.8125rem}@media(max-width:40rem){main{padding:1.2rem .9rem 3rem}}@media print{header button{display:none}}"""


def policy(*scripts: str) -> Html:
    """What a page may do: run these scripts, style itself, show pictures it made. No request to anywhere."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    rule = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {hashes}; base-uri 'none'; form-action 'none'"
    return Html(f'<meta http-equiv="Content-Security-Policy" content="{escaped(rule)}">')


def theme_button() -> Html:
    return tag("button", "Light or dark", type="button", data_pellucid_theme=True, hidden=True)


def page(*things: Any, title: str = "") -> str:
    """A whole HTML page of views that follow one another's selection."""
    shown = [document(each) for thing in things for each in _apart(thing)]
    if not shown:
        raise InputError("a page needs at least one result to show")
    script = Html(bundle())
    title = title or shown[0].title
    head = join(
        tag("meta", charset="utf-8"), policy(script), tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content="pellucid"), tag("title", title), tag("style", Html(STYLE)),
    )  # fmt: skip
    body = join(
        tag("main", tag("header", tag("h1", title), theme_button()), [element(each) for each in shown], tag("footer", "Made with pellucid.")),
        tag("script", script, type="module"),
    )  # fmt: skip
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def save_html(path: str | Path, *things: Any, title: str = "") -> Path:
    """Write one file that shows `things` anywhere, without a network. InputError where it cannot be written.

    >>> save_html("lens.html", pl.lenses.logit_lens(model, prompt), attributions)
    PosixPath('lens.html')
    """
    try:
        Path(path).write_text(page(*things, title=title), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
    return Path(path)
