"""`pellucid lens`: what would the model say after each layer?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli import files, options


@options.opens_models
def lens(
    model: options.Source,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to read.")],
    target: Annotated[
        list[str] | None, typer.Option(help="A word to follow through the layers; may be repeated.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Guesses kept of each cell.")] = 5,
    tuned: Annotated[Path | None, typer.Option(help="A tuned lens that TunedLens.save wrote.")] = None,
    as_json: files.Json = False,
    output: files.Output = None,
    *,
    opened: options.Open,
) -> None:
    """Read the residual stream after each layer as words, with rank, KL and entropy."""
    files.writable(output, *files.RESULT)
    subject = opened(model)
    from pellucid.lenses import TunedLens, logit_lens

    through = None if tuned is None else TunedLens.load(tuned)
    if through is not None:
        through.check(subject)
    files.told(logit_lens(subject, prompt, top=top, targets=target, through=through), output, as_json)
