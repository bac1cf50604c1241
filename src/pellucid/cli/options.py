"""Which model, and how to open it? The arguments every verb shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pellucid.model import Model

Source = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a local directory or a .gguf file.")]
Task = Annotated[
    Literal["auto", "causal-lm", "masked-lm", "seq2seq-lm", "classification", "base"],
    typer.Option(help="The head to open it with."),
]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit on the hub.")]
Dtype = Annotated[str | None, typer.Option(help="As float32 or bfloat16; by default the checkpoint's own.")]
Device = Annotated[str | None, typer.Option(help="As cpu, cuda or mps.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read weights that are not safetensors: they can run code.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")]


def opened(source: str, **how: Any) -> Model:
    """The model, with a sign of life on the terminal while it loads."""
    from rich.console import Console

    import pellucid

    with Console(stderr=True).status(f"opening {source}"):
        return pellucid.load(source, **how)
