"""Which model, and how to open it? The options every verb shares."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pellucid.model import Model

Source = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a local directory or a .gguf file.")]
Open = Callable[[str], "Model"]


def _how(
    task: Annotated[
        Literal[
            "auto",
            "causal-lm",
            "masked-lm",
            "seq2seq-lm",
            "classification",
            "token-classification",
            "question-answering",
            "multiple-choice",
            "next-sentence",
            "base",
        ],
        typer.Option(help="The head to open it with."),
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit on the hub.")] = None,
    dtype: Annotated[str | None, typer.Option(help="As float32 or bfloat16; by default the checkpoint's own.")] = None,
    device: Annotated[str | None, typer.Option(help="As cpu, cuda or mps.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read weights that are not safetensors: they can run code.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")
    ] = False,
) -> None:
    """The options of `pellucid.load` that a command line has."""


HOW = inspect.signature(_how, eval_str=True).parameters


def opens_models(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb these options; what it is called with as `opened` opens a model by them."""
    own = inspect.signature(verb, eval_str=True)

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        how = {name: given.pop(name) for name in HOW}
        verb(**given, opened=functools.partial(_opened, how))

    kept = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own.parameters.values(), *HOW.values()) if p.name != "opened"]
    command.__signature__ = own.replace(parameters=kept)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in kept}
    return command


def _opened(how: dict[str, Any], source: str) -> Model:
    """The model, with a sign of life on the terminal while it loads."""
    from rich.console import Console

    import pellucid

    with Console(stderr=True).status(f"opening {source}"):
        model = pellucid.load(source, **how)
    for note in getattr(getattr(model, "loaded", None), "notes", ()):
        Console(stderr=True).print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    return model
