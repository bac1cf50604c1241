"""Starting the workbench: a free port on loopback, a token nobody can guess, and the browser."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.workbench.app import create
from pellucid.workbench.chat import Files
from pellucid.workbench.guard import Door
from pellucid.workbench.hub import Hub


def is_loopback(host: str) -> bool:
    """
    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. InputError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(128)  # who comes before the server is up waits
    except OSError as error:
        made.close()
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port"
        ) from None
    return made


def serve(
    models: Sequence[Model], host: str, port: int, folder: Path, names: Sequence[str], browser: bool, say: Callable[[str], None],
    files: Files | None = None,
) -> None:  # fmt: skip
    """Serve until interrupted. `names`: further host names the server is reached by; `say` prints a line; `files`: monitors and vectors."""
    hub = Hub(models, files)  # what is wrong with a file is said before anything listens
    listening = bound(host, port)
    port = listening.getsockname()[1]
    own = () if is_loopback(host) or host in ("0.0.0.0", "::") else (host,)
    door = Door(secrets.token_urlsafe(24), port, (*own, *names))
    shown = names[0] if names else host if host not in ("0.0.0.0", "::") else "127.0.0.1"
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/?token={door.token}"
    say(f"workbench: {address}")
    say("Whoever has this address can use it. Ctrl-C ends it.")
    if browser:
        webbrowser.open(address)
    # No access log: addresses hold the token.
    config = uvicorn.Config(
        create(hub, door, folder), log_level="warning", access_log=False, server_header=False, ws="none"
    )
    uvicorn.Server(config).run(sockets=[listening])
