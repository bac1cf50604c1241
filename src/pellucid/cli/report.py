"""`pellucid report`: how does this model come to its answer? One HTML file that works offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli import options
from pellucid.errors import InputError


@options.opens_models
def report(
    model: options.Source,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to explain.")],
    second: Annotated[str | None, typer.Option(help="The second text, of a model that reads pairs.")] = None,
    counterfactual: Annotated[str | None, typer.Option(help="A prompt with another answer, to patch from.")] = None,
    target: Annotated[str | None, typer.Option(help="The answer to explain; by default the model's own.")] = None,
    word: Annotated[str | None, typer.Option(help="The word to explain the label of (token classifiers).")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("report.html"),
    *,
    opened: options.Open,
) -> None:
    """Trace a prompt through the model and write what was found to an HTML file."""
    if not output.parent.is_dir():  # said before minutes of work, not after
        raise InputError(f"cannot write {str(output)!r}: there is no directory {str(output.parent)!r}")
    if output.is_dir():
        raise InputError(f"cannot write {str(output)!r}: it is a directory")
    subject = opened(model)
    from pellucid.engine.given import Pair
    from pellucid.views.report import build

    found = build(
        subject,
        prompt if second is None else Pair(prompt, second),
        counterfactual=counterfactual,
        target=target,
        word=word,
    )
    output.write_text(found.html, encoding="utf-8")
    typer.echo(f"wrote {output.absolute()}")
    for finding in found.findings:
        typer.echo(f"- {finding}")
