"""`pellucid anatomy`: what is this model made of, and which parts of the map are proven?"""

from __future__ import annotations

from typing import Annotated

import typer

from pellucid.cli import options


@options.opens_models
def anatomy(
    model: options.Source,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the tree.")] = False,
    *,
    opened: options.Open,
) -> None:
    """Print a model's parts, the proof of each with its error, and what is refused and why."""
    found = opened(model).anatomy
    if json:
        typer.echo(found.to_json())
        return
    from rich.console import Console

    console = Console()
    console.print(found.tree(), soft_wrap=not console.is_terminal)  # a file or a pipe has no width
