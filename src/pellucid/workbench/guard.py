"""Who may talk to the workbench? Whoever holds the token, from the page this server gave out, and nobody else.

The server listens on loopback, but any web page a browser has open can send requests there, and a name that an
attacker owns can be made to point there (DNS rebinding). So each request, before any route sees it, must

    name this server in Host                   else a rebound name could read answers
    name this server in Origin, if it has one  else another page could send requests
    not be called cross-site by the browser    (Sec-Fetch-Site), the page itself excepted: a link may lead to it
    carry the token                            in X-Pellucid-Token or, for what a browser loads by itself, in the query
    be small                                   1 MB, 64 MB where documents are sent

and each answer says that it may run only this server's own scripts, be embedded nowhere, and be read by nobody else:
there are no CORS headers. The page takes the token out of the address bar; a cookie that other sites cannot send lets
it be reloaded, and opens nothing but the page and its scripts.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pellucid.workbench.replies import problem

MEGABYTE = 1 << 20
SMALL, LARGE = MEGABYTE, 64 * MEGABYTE
LARGE_PATHS = re.compile(r"/api/(workspaces/[^/]+|export/(html|notebook))")
SHELL = re.compile(r"/(static/[^/]+)?")  # what a browser loads by itself, without headers of ours
DOWNLOAD = re.compile(r"/api/export/|/api/workspaces/")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Door:
    """What requests are compared with: the token, and the names this server is reached by."""

    token: str = field(repr=False)
    port: int
    names: tuple[str, ...] = ()  # beside the loopback ones

    @property
    def hosts(self) -> set[str]:
        """
        >>> sorted(Door("t", 8000, ("10.0.0.5",)).hosts)
        ['10.0.0.5:8000', '127.0.0.1:8000', '[::1]:8000', 'localhost:8000']
        """
        names = ["localhost", "127.0.0.1", "[::1]", *(f"[{n}]" if ":" in n else n.lower() for n in self.names)]
        return {f"{name}:{self.port}" for name in names} | (set(names) if self.port == 80 else set())

    @property
    def cookie(self) -> str:
        return f"pellucid-{self.port}"

    def knows(self, given: str | None) -> bool:
        return given is not None and hmac.compare_digest(given.encode(), self.token.encode())

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Why a request is turned away; None for one that may pass."""
        headers, path = Headers(scope=scope), scope["path"]
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if len(headers.getlist("host")) != 1 or host not in self.hosts:
            return 421, "this server answers only under the address it was started with; open that one"
        if origin is not None and origin.lower() not in {f"http://{name}" for name in self.hosts}:
            return 403, "requests from other pages are refused; use the workbench's own page"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and path != "/":
            return 403, "requests from other sites are refused; use the workbench's own page"
        if not self._holds_token(scope, headers, path):
            return 403, "the token is missing or wrong; open the address that `pellucid workbench` printed"
        return None

    def _holds_token(self, scope: Scope, headers: Headers, path: str) -> bool:
        if self.knows(headers.get("x-pellucid-token")):
            return True
        shell = scope["method"] in ("GET", "HEAD") and SHELL.fullmatch(path) is not None
        if not shell and not (scope["method"] == "GET" and DOWNLOAD.match(path)):
            return False
        query = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        cookie = cookie_parser(headers.get("cookie", "")).get(self.cookie)
        return any(map(self.knows, query)) or (shell and self.knows(cookie))


class Guard:
    """The outermost layer: turns away what may not pass, reads the body within its limit, and marks every answer."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # lifespan; no route takes a web socket
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refused = self.door.refusal(scope)
        if refused is not None:
            await problem(*refused)(scope, receive, marked)
            return
        limit = LARGE if LARGE_PATHS.fullmatch(scope["path"]) else SMALL
        body = await whole_body(scope, receive, limit)
        if body is None:
            await problem(413, f"the request is larger than {limit // MEGABYTE} MB; send less")(scope, receive, marked)
            return
        await self.app(scope, replayed(body, receive), marked)


async def whole_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The body, or None as soon as it is known to be larger than `limit` bytes."""
    told = Headers(scope=scope).get("content-length", "")
    if told.isdigit() and int(told) > limit:
        return None
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message: dict[str, Any] = dict(await receive())
        if message["type"] == "http.disconnect":
            return b""
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > limit:
            return None
    return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A channel that gives the body at once, and then what the real one says (that the client has gone)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
