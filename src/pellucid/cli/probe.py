"""`pellucid probe`: from which layer on can a property of the text be read, and does that say anything?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pellucid.cli import files, options


@options.opens_models
def probe(
    model: options.Source,
    data: Annotated[Path, typer.Argument(metavar="TEXTS", help="Lines of JSON: text and label (text, or a number).")],
    sites: Annotated[str | None, typer.Option(help="Where to read; by default after every layer.")] = None,
    pool: Annotated[
        Literal["mean", "first", "last"], typer.Option(help="How a text's tokens become one vector.")
    ] = "mean",
    seed: Annotated[int, typer.Option(help="Of the split, the random twin and the interval.")] = 0,
    as_json: files.Json = False,
    output: files.Output = None,
    *,
    opened: options.Open,
) -> None:
    """Fit probes on every layer, judged on held-out texts, beside the same probes of a model with random weights."""
    files.writable(output, *files.RESULT)
    rows = files.rows(data, "text", "label")
    subject = opened(model)
    from pellucid.probing import Examples, Protocol, Spans, beside_random
    from pellucid.probing import probe as plain

    examples = Examples(Spans.whole(row["text"] for row in rows), [row["label"] for row in rows], name=data.stem)
    protocol = Protocol(seed=seed)
    technique = plain if examples.numeric else beside_random
    files.told(technique(subject, examples, sites=sites, pool=pool, protocol=protocol), output, as_json)
