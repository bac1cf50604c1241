"""`pellucid show`: what is in a saved result?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli import files


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What result.save wrote, as result.zip.")],
    code: Annotated[bool, typer.Option("--code", help="Print the program that makes it again.")] = False,
    as_json: files.Json = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A page (.html) that shows it.")] = None,
) -> None:
    """Print a saved result, the program that makes it again, or a page that shows it."""
    files.writable(output, ".html")
    from pellucid.results import Result

    found = Result.load(file)
    if code:
        typer.echo(found.provenance.code(str(file)) or f"# {file} says no call that made it")
        return
    files.told(found, None, as_json)
    if output is not None:
        typer.echo(f"wrote {found.save_html(output).absolute()}")
