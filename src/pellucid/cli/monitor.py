"""`pellucid monitor fit | calibrate | watch`: stop it when it starts to ..., with a threshold that promises something.

Conversations are lines of JSON: `prompt` (a text, or `messages`), and where they are there `reply` (else the model answers),
`label` (true where it should fire) and `source`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pellucid.cli import files, options
from pellucid.errors import InputError

if TYPE_CHECKING:
    from pellucid.results import Result

monitor = typer.Typer(
    help="Fit a monitor, set its threshold on benign conversations, and let it watch.", no_args_is_help=True
)
Data = Annotated[Path, typer.Option(help="Lines of JSON: prompt or messages; reply, label and source where known.")]
File = Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer, where there is no reply.")]


def read(data: Path) -> list[dict[str, Any]]:
    """The conversations of a file. InputError with the number of a line that is none."""
    found = files.rows(data)
    for number, row in enumerate(found, 1):
        if not {"messages", "prompt"} & row.keys():
            raise InputError(f"conversation {number} of {str(data)!r} has neither prompt nor messages")
        row["prompt"] = row["messages"] if "messages" in row else row["prompt"]
    return found


def columns(rows: list[dict[str, Any]], labelled: bool = False) -> dict[str, Any]:
    """What the functions take of these conversations."""
    replies = [row.get("reply") for row in rows]
    if any(r is None for r in replies) and not all(r is None for r in replies):
        raise InputError("some conversations have a reply and some have none: split the file")
    lacking = next(
        (i for i, row in enumerate(rows, 1) if labelled and not isinstance(row.get("label"), bool | int)), None
    )
    if lacking is not None:
        raise InputError(
            f"conversation {lacking} has no label: expected true where the monitor should fire, false elsewhere"
        )
    made: dict[str, Any] = {
        "prompts": [row["prompt"] for row in rows],
        "replies": None if replies[0] is None else replies,
    }
    return made | ({"labels": [bool(row["label"]) for row in rows]} if labelled else {})


@monitor.command()
@options.opens_models
def fit(
    model: options.Source,
    data: Data,
    site: Annotated[str, typer.Option(help="Where it reads, as layers.14.resid_post.")],
    reads: Annotated[Literal["answer", "prompt", "exchange"], typer.Option(help="Which tokens.")] = "answer",
    name: Annotated[str, typer.Option(help="What it is called.")] = "monitor",
    max_new_tokens: Tokens = 40,
    output: File = Path("monitor.safetensors"),
    *,
    opened: options.Open,
) -> None:
    """Fit a monitor to labelled conversations. It has no threshold yet: calibrate it on others."""
    files.writable(output)
    given = columns(read(data), labelled=True)
    from pellucid import safety

    subject = opened(model)
    made = safety.fit_monitor(subject, given.pop("prompts"), given.pop("labels"), site=site, reads=reads, name=name, max_new_tokens=max_new_tokens, **given)  # fmt: skip
    made.tie(subject).save(output)
    if made.fitted is not None:
        typer.echo(made.fitted.title)
    typer.echo(f"wrote {output.absolute()}; it has no threshold yet: pellucid monitor calibrate")


@monitor.command()
@options.opens_models
def calibrate(
    model: options.Source,
    file: Annotated[Path, typer.Argument(metavar="MONITOR", help="A file that fit wrote.")],
    data: Data,
    alarms: Annotated[float, typer.Option(help="The share of benign conversations that may set it off.")] = 0.05,
    promise: Annotated[Literal["average", "confidence"], typer.Option(help="How that is meant.")] = "average",
    then: Annotated[Literal["stop", "say", "record"], typer.Option(help="What it does.")] = "stop",
    text: Annotated[str, typer.Option(help="What is said, with --then say.")] = "I am not sure.",
    max_new_tokens: Tokens = 40,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="By default the monitor's own file.")] = None,
    *,
    opened: options.Open,
) -> None:
    """Set the threshold on benign conversations (those labelled true are left out), and say what it promises."""
    files.writable(output or file)
    benign = [row for row in read(data) if not row.get("label")]
    if not benign:
        raise InputError(f"all conversations of {str(data)!r} are labelled true: a threshold is set on benign ones")
    given = columns(benign)
    import dataclasses

    from pellucid import safety
    from pellucid.engine.steps import Say, Stop

    subject = opened(model)
    loaded = safety.load_monitor(subject, file)
    does = {"stop": Stop(), "say": Say(text), "record": None}[then]
    loaded = dataclasses.replace(loaded, then=does)
    made = safety.calibrate(subject, loaded, given.pop("prompts"), alarms=alarms, promise=promise, max_new_tokens=max_new_tokens, **given)  # fmt: skip
    made.save(output or file)
    typer.echo(f"{made.name} fires above {made.threshold}")
    typer.echo(f"wrote {(output or file).absolute()}")


@monitor.command()
@options.opens_models
def watch(
    model: options.Source,
    file: Annotated[Path, typer.Argument(metavar="MONITOR", help="A file that calibrate wrote.")],
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="Answer this under the monitor.")] = None,
    data: Annotated[Path | None, typer.Option(help="Or measure it on these labelled conversations.")] = None,
    max_new_tokens: Tokens = 40,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="An HTML file with the view.")] = None,
    *,
    opened: options.Open,
) -> None:
    """Answer a prompt under a monitor, or measure it on labelled conversations."""
    if (prompt is None) == (data is None):
        raise InputError("give a prompt to answer, or --data with labelled conversations")
    if output is not None:
        files.writable(output)
    rows = None if data is None else read(data)
    given = None if rows is None else columns(rows, labelled=True)
    from pellucid import safety

    subject = opened(model)
    loaded = safety.load_monitor(subject, file)
    found: Result
    if rows is None or given is None:
        from pellucid.engine.given import Chat

        asked = (
            Chat([{"role": "user", "content": prompt}]) if getattr(subject.tokenizer, "chat_template", None) else prompt
        )
        made = subject.generate(asked, max_new_tokens=max_new_tokens, monitors=loaded)
        found = made.firings
        typer.echo(str(found.shown.values[0]))
        typer.echo(f"- {found.title}" + (f" ({made.because[0]})" if made.because[0] else ""))
    else:
        sources = [str(row.get("source", "all")) for row in rows]
        found = safety.evaluate(subject, loaded, given.pop("prompts"), given.pop("labels"), sources=sources, max_new_tokens=max_new_tokens, **given)  # fmt: skip
        typer.echo(found.title)
        for i, source in enumerate(found.source.values.tolist()):
            ends = {
                k: tuple(float(found[f"{k}{e}"][i]) for e in ("", "_low", "_high", "_n")) for k in ("alarms", "recall")
            }
            said = [f"{k} {v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}] of {v[3]:.0f}" for k, v in ends.items()]
            typer.echo(f"- {source}: {', '.join(said)}")
    if output is not None:
        found.save_html(output)
        typer.echo(f"wrote {output.absolute()}")
