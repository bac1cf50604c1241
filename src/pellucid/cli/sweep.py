"""`pellucid sweep`: which parts does the answer need? Every part switched off in turn, over a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pellucid.cli import files, options


@options.opens_models
def sweep(
    model: options.Source,
    data: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help="Lines of JSON: prompt, target and, where known, against.")
    ],
    over: Annotated[
        str, typer.Option(help="What is switched off, one at a time: a pattern of sites.")
    ] = "layers.*.attn.heads.*",
    how: Annotated[Literal["zero", "mean", "resample"], typer.Option(help="What a part is replaced by.")] = "zero",
    checkpoint: Annotated[Path | None, typer.Option(help="A file that keeps what is done, to go on from.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    as_json: files.Json = False,
    output: files.Output = None,
    *,
    opened: options.Open,
) -> None:
    """Ablate every site that a pattern names, one at a time: the change of the answer, its interval and its p."""
    files.writable(output, *files.RESULT)
    rows = files.rows(data, "prompt", "target")
    against = files.column(rows, "against")
    subject = opened(model)
    from pellucid.causal import ablation
    from pellucid.metrics import logit, logit_difference

    targets = [row["target"] for row in rows]
    metric = logit(targets) if against is None else logit_difference(targets, against)
    prompts = [row["prompt"] for row in rows]
    found = ablation(subject, prompts, over=over, how=how, metric=metric, seed=seed, checkpoint=checkpoint)
    files.told(found, output, as_json)
