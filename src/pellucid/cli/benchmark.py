"""`pellucid benchmark`: which attribution method can be trusted on this model?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pellucid.cli import files, options

if TYPE_CHECKING:
    from rich.table import Table

    from pellucid.results import Result


@options.opens_models
def benchmark(
    model: options.Source,
    data: Annotated[
        Path,
        typer.Option(
            help="Lines of JSON with text and, where known, target or label, against, rationale, counterfactual; or a "
            "directory of a saved data set."
        ),
    ],
    methods: Annotated[str | None, typer.Option(help="Names with commas; by default all.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Names with commas; by default all but those that cost more.")
    ] = None,
    players: Annotated[str, typer.Option(help="What is taken away at once: token, word or sentence.")] = "token",
    replacement: Annotated[
        str | None,
        typer.Option(
            help="What an absent token is: mask, pad, mean, zero, remove, a token, or resample (tokens of the texts)."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first examples only.")] = None,
    rows: Annotated[
        Path | None, typer.Option(help="A file that keeps what is done, to go on from. By default beside the output.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("benchmark.html"),
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    *,
    opened: options.Open,
) -> None:
    """Run attribution methods over texts, measure them, and say which to prefer on this model and why.

    If it is interrupted, the same command goes on where it stopped.
    """
    files.writable(output)
    from pellucid.attribution.evaluation.compare import compare
    from pellucid.attribution.evaluation.data import read_examples
    from pellucid.attribution.evaluation.page import page

    examples = read_examples(data, limit)
    subject = opened(model)
    found = compare(
        subject,
        examples,
        methods=_names(methods),
        metrics=_names(metrics),
        players=players,
        replacement=replacement,
        reference=[example.text for example in examples] if replacement == "resample" else None,
        checkpoint=rows or output.with_suffix(".jsonl"),
        seed=seed,
    )
    output.write_text(page(found), encoding="utf-8")
    found.save(output.with_suffix(".zip"))
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console = Console(width=400)
    console.print(_table(found))
    typer.echo(found.data.attrs["sentence"])
    typer.echo(f"wrote {output.absolute()}")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _table(found: Result) -> Table:
    """Methods from the most faithful to the least: means (the page has all intervals), and the cost."""
    from rich.table import Table

    table = Table(title=found.title, title_justify="left", box=None, header_style="bold")
    table.add_column("method")
    names = found.metric.values.tolist()
    for name, better in zip(names, found.better.values, strict=True):
        table.add_column(f"{name} {'↑' if better == 'more' else '↓'}", justify="right")
    table.add_column("forward passes", justify="right")
    column = names.index("faithfulness")
    for i in sorted(range(found.value.shape[0]), key=lambda i: -float(found.value[i, column])):
        cells = [f"{v:.3g}" for v in found.value.values[i]]
        cells[column] += f" [{float(found.low[i, column]):.3g}, {float(found.high[i, column]):.3g}]"
        table.add_row(str(found.technique.values[i]), *cells, f"{float(found.cost[i]):.0f}")
    return table
