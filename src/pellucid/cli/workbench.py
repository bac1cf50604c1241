"""`pellucid workbench`: type a prompt, watch the model, change it, and see what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli import options
from pellucid.errors import InputError

Sources = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Hub ids, local directories or .gguf files, side by side.")
]


@options.opens_models
def workbench(
    models: Sources,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
    host: Annotated[str, typer.Option(help="The address to listen on; others than loopback are open to the network.")] = "127.0.0.1",
    name: Annotated[list[str] | None, typer.Option(help="A host name browsers may reach it by; may be repeated.")] = None,
    folder: Annotated[Path, typer.Option(help="Where workspaces are kept.")] = Path("workspaces"),
    monitor: Annotated[list[Path] | None, typer.Option(help="A monitor that may watch answers (a file of `pellucid monitor`); may be repeated.")] = None,
    vector: Annotated[list[Path] | None, typer.Option(help="A steering vector, .safetensors or .gguf; may be repeated.")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
    *,
    opened: options.Open,
) -> None:  # fmt: skip
    """Serve the workbench on this machine and open it in a browser."""
    try:
        from pellucid.workbench.chat import Files
        from pellucid.workbench.serving import is_loopback, serve
    except ModuleNotFoundError as error:
        raise InputError(f"the workbench needs {error.name}: pip install 'pellucid[workbench]'") from None
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot keep workspaces in {str(folder)!r}: it is no directory")
    if not is_loopback(host):
        typer.echo(
            f"warning: {host} is open to the network: whoever can reach it and learns the token can run these models and "
            "read the workspaces, and the connection is not encrypted",
            err=True,
        )
    for file in (*(monitor or ()), *(vector or ())):
        if not file.is_file():
            raise InputError(f"there is no file {str(file)!r}")
    files = Files(monitor or (), vector or ())
    serve([opened(source) for source in models], host, port, folder, name or [], browser, typer.echo, files)
