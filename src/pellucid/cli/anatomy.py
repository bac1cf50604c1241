"""`pellucid anatomy`: what is this model made of, and which parts of the map are proven?"""

from __future__ import annotations

from typing import Annotated

import typer

from pellucid.cli import options


def anatomy(
    model: options.Source,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the tree.")] = False,
    task: options.Task = "auto",
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Print a model's parts, the proof of each with its error, and what is refused and why."""
    found = options.opened(
        model,
        task=task,
        revision=revision,
        dtype=dtype,
        device=device,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    ).anatomy
    if json:
        typer.echo(found.to_json())
        return
    from rich.console import Console

    console = Console()
    console.print(found.tree(), soft_wrap=not console.is_terminal)  # a file or a pipe has no width
