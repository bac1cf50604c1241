"""The command line: one module per verb, and one place that turns errors into a line and an exit code.

Exit codes: 0 done; 1 something unexpected; 2 the input cannot be used; 130 interrupted. With PELLUCID_DEBUG=1
errors come as tracebacks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from pellucid.cli.anatomy import anatomy
from pellucid.cli.benchmark import benchmark
from pellucid.cli.circuit import circuit
from pellucid.cli.doctor import doctor
from pellucid.cli.edit import edit
from pellucid.cli.lens import lens
from pellucid.cli.monitor import monitor
from pellucid.cli.probe import probe
from pellucid.cli.report import report
from pellucid.cli.show import show
from pellucid.cli.sweep import sweep
from pellucid.cli.workbench import workbench
from pellucid.errors import PellucidError

app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
for verb in (anatomy, benchmark, circuit, doctor, edit, lens, probe, report, show, sweep, workbench):
    app.command()(verb)
app.add_typer(monitor, name="monitor")


@app.callback(invoke_without_command=True)
def pellucid(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    """Open any transformer: see what it is made of and how it comes to its answer."""
    if version:
        import pellucid

        typer.echo(f"pellucid {pellucid.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit; whatever goes wrong is one line on standard error.

    >>> main(["--version"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    try:
        code = app(args=arguments, prog_name="pellucid", standalone_mode=False) or 0
    except Exception as error:
        if os.environ.get("PELLUCID_DEBUG"):
            raise
        line, code = _explain(error)
        print("pellucid:", " ".join(line.split()), file=sys.stderr)
    sys.exit(code)


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, PellucidError):
        return str(error), 2
    if hasattr(error, "format_message"):  # a usage error of typer's, whose base class moved between versions
        return f"{error.format_message()} See pellucid --help.", 2
    return f"{type(error).__name__}: {error} (unexpected: PELLUCID_DEBUG=1 shows where it comes from)", 1
