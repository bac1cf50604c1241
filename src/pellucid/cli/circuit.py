"""`pellucid circuit`: which parts, talking to which, make the answer, and how far to trust that?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from pellucid.cli import files, options
from pellucid.errors import InputError


@options.opens_models
def circuit(
    model: options.Source,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="PAIRS",
            help="Lines of JSON: prompt, counterfactual, target, against; texts of equal length in tokens.",
        ),
    ],
    method: Annotated[
        Literal["eap", "eap-ig-inputs", "eap-ig-activations"], typer.Option(help="How edges are scored.")
    ] = "eap-ig-inputs",
    faithful: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The smallest circuit that brings back this share.")
    ] = 0.9,
    held_out: Annotated[float, typer.Option(min=0.1, max=0.9, help="The share of pairs kept for judging.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    as_json: files.Json = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A page (.html); the circuit and its judgement stand beside it as .circuit.zip and .zip.",
        ),
    ] = Path("circuit.html"),
    *,
    opened: options.Open,
) -> None:
    """Score every edge, take the smallest circuit that is faithful enough, and judge it on pairs it was not found on."""
    files.writable(output, *files.RESULT)
    rows = files.rows(data, "prompt", "counterfactual", "target", "against")
    cut = round(len(rows) * (1 - held_out))
    if not 0 < cut < len(rows):
        raise InputError(
            f"{len(rows)} pairs are too few to find a circuit on some and judge it on others: give at least 2"
        )
    subject = opened(model)
    from pellucid import circuits
    from pellucid.tasks import Prompts
    from pellucid.views.hosts import save_html

    clean, corrupted, right, wrong = (
        [row[n] for row in rows] for n in ("prompt", "counterfactual", "target", "against")
    )
    pairs = Prompts.from_pairs(clean, corrupted, right, wrong, subject.tokenizer, name=data.stem)
    known, unseen = pairs[:cut], pairs[cut:]
    scores = circuits.edge_attribution(subject, known, how="resample", method=method, seed=seed)
    curve = circuits.faithfulness_curve(subject, scores, known, how="resample", seed=seed)
    reached = [float(size) for size, f in zip(curve["size"].values, curve.sized.values, strict=True) if f >= faithful]
    if not reached:
        raise InputError(
            f"no circuit of up to {float(curve['size'].values[-1]):.0%} of the edges brings back {faithful:.0%}: ask for less with --faithful"
        )
    tried = (scores.circuit(fraction=size).pruned() for size in reached)
    found = next(
        (each for each in tried if len(each)), circuits.Circuit.whole(scores.graph)
    )  # pruned to nothing: no way through
    verdict = circuits.judge(subject, found, unseen, how="resample", seed=seed)
    found.save(output.with_suffix(".circuit.zip"))
    verdict.save(output.with_suffix(".zip"))
    if output.suffix == ".html":
        save_html(output, found, verdict, curve)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "edges": found.edges,
                    "heads": found.heads,
                    "verdict": json.loads(verdict.to_frame().to_json(orient="records")),
                }
            )
        )
        return
    typer.echo(f"{found}; found on {len(known)} pairs, judged on {len(unseen)} others")
    files.told(verdict, None, False)
    typer.echo(f"wrote {output.absolute()}")
