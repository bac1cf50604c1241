"""`pellucid edit`: rewrite facts, and keep what was changed in a small file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pellucid.cli import files, options
from pellucid.errors import InputError


@options.opens_models
def edit(
    model: options.Source,
    facts: Annotated[Path, typer.Argument(metavar="FACTS", help="Lines of JSON: prompt, subject, new, true, ...")],
    texts: Annotated[
        Path | None, typer.Option(help="Lines of ordinary text, for the second moment of the keys.")
    ] = None,
    moments: Annotated[Path | None, typer.Option(help="Where that second moment is kept: read if it is there.")] = None,
    how: Annotated[Literal["rome", "memit", "emmet", "alphaedit"], typer.Option(help="The method.")] = "memit",
    layers: Annotated[str | None, typer.Option(help="As 6 or 3-6; found by tracing if not given.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of text to read at most.")] = 50_000,
    ridge: Annotated[float, typer.Option(help="Added to the second moment, a share of its mean diagonal.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The random seed.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The change file to write.")] = Path(
        "change.safetensors"
    ),
    *,
    opened: options.Open,
) -> None:
    """Rewrite facts of a model and write the change to a file, which pl.load(MODEL).changed(FILE) takes."""
    if not output.parent.is_dir():
        raise InputError(f"cannot write {str(output)!r}: there is no directory {str(output.parent)!r}")
    if texts is None and (moments is None or not moments.exists()):
        raise InputError("give ordinary text by --texts (a file of lines), or a second moment kept by --moments")
    rows = files.rows(facts, "prompt", "subject", "new")
    span = _layers(layers)
    subject = opened(model)
    from pellucid.surgery import KeyCovariance, scoreboard
    from pellucid.surgery import edit as edited_by
    from pellucid.surgery.editing import layers_for as found
    from pellucid.surgery.keys import facts_of

    if span is None:
        _, span = found(subject, facts_of(rows), how, None, seed)
    if texts is not None:
        covariance = KeyCovariance(layers=span, ridge=ridge).fit(subject, texts, tokens=tokens, checkpoint=moments)
    else:
        assert moments is not None
        covariance = KeyCovariance.load(moments)
    made = edited_by(subject, rows, how, covariance=covariance, layers=span, seed=seed)
    made.save(output)
    score = scoreboard(made, None, controls=("without C",), seed=seed)
    table: Any = score.data["value"].to_pandas()
    table = table.dropna(how="all")
    if as_json:
        wrote = {"file": str(output.absolute()), "layers": made.layers, "title": score.title}
        typer.echo(json.dumps({**wrote, "scores": json.loads(table.to_json(orient="index"))}))
        return
    typer.echo(f"wrote {output.absolute()}")
    typer.echo(made.result.title)
    typer.echo(score.title)
    typer.echo(table.round(3).to_string(na_rep=""))


def _layers(given: str | None) -> list[int] | None:
    if given is None:
        return None
    first, dash, last = given.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
        raise InputError(f"--layers {given}: expected a number or a span of layers, such as 6 or 3-6")
    return list(range(int(first), int(last or first) + 1))
