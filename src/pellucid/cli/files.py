"""What verbs read and write: lines of JSON in, a result file with its page or JSON out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pellucid.errors import InputError

if TYPE_CHECKING:
    from pellucid.results import Result

Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Where to write: NAME.html for a page (and NAME.zip, the result), or NAME.zip."
    ),
]
RESULT = (".html", ".zip")  # how the name of what `told` writes may end
Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON and nothing else.")]


def rows(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The objects of a file, one a line, each with the fields `needed`. InputError names the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not set(needed) <= row.keys():
            raise InputError(f"{path}, line {number}: expected a JSON object with {', '.join(needed)}")
        found.append(row)
    if not found:
        raise InputError(f"{str(path)!r} has no lines")
    return found


def column(found: list[dict[str, Any]], name: str) -> list[Any] | None:
    """A field of all rows, None where none has it. InputError where only some have."""
    have = [row.get(name) is not None for row in found]
    if not any(have):
        return None
    if not all(have):
        raise InputError(
            f"row {have.index(False) + 1} has no {name!r} and others have: give it in every row, or in none"
        )
    return [row[name] for row in found]


def writable(output: Path | None, *suffixes: str) -> None:
    """InputError, before minutes of work and not after, where there can be no such file or its name ends otherwise."""
    if output is None:
        return
    if not output.parent.is_dir() or output.is_dir():
        raise InputError(f"cannot write {str(output)!r}: name a file in a directory that exists")
    if suffixes and output.suffix not in suffixes:
        raise InputError(f"cannot write {str(output)!r}: expected a name that ends in {' or '.join(suffixes)}")


def told(result: Result, output: Path | None, as_json: bool) -> None:
    """Write the result where asked, and say what was found: as JSON, or as a table a person reads."""
    if output is not None:
        result.save(output.with_suffix(".zip"))
        if output.suffix == ".html":
            result.save_html(output)
    if as_json:
        frame = json.loads(result.to_frame().to_json(orient="records"))
        about = {"kind": result.kind, "title": result.title, "attributes": result.data.attrs}
        typer.echo(json.dumps({**about, "rows": frame, "provenance": result.provenance.as_dict()}))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console = Console(width=200)
    console.print(result)
    if output is not None:
        typer.echo(f"wrote {output.absolute()}")
