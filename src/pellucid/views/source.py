"""Where does a view come from, and what makes it again? A result's provenance, as text and as a Python program."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from pellucid.results import Provenance
from pellucid.views.schema import Code, Fact, Origin

METHODS = (
    "lenses",
    "attribution",
    "attention",
    "causal",
    "circuits",
    "neurons",
    "probing",
    "surgery",
    "tuning",
    "safety",
)


def origin(made: Provenance) -> Origin:
    about = {k: v for k, v in made.as_dict().items() if k not in ("call", "opened", "free")}
    facts = [Fact(name=k, value=_written(v)) for k, v in about.items() if v not in (None, "", {}, []) and k != "method"]
    return Origin(line=made.line(), facts=(Fact(name="method", value=made.method), *facts))


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v!r}" for k, v in value.items() if v is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def code(made: Provenance) -> Code:
    """The call that makes it again, as far as its arguments can be written down; what cannot is said in a comment."""
    if made.call:
        return Code(python=f"{made.code()}\nresult.show()")
    home = _home(made.method)
    if home is None or not made.model:
        return Code()
    inputs = (
        made.inputs
        if isinstance(made.inputs, dict) and {"clean", "corrupted"} <= set(made.inputs)
        else {"": made.inputs}
    )
    texts = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in inputs.values()]
    written, left = [], []
    for name, value in made.arguments.items():
        if name == "metric" or (isinstance(value, str) and value.endswith("]") and "[" in value):
            left.append(f"{name}: {value}")
        elif value is not None:
            written.append(f"{name}={value!r}")
    if made.seed is not None:
        written.append(f"seed={made.seed}")
    opened = ["import pellucid as pl", "", f"model = pl.load({made.model!r})"]
    if made.method[0].isupper():  # what is fitted first
        return Code(python="\n".join([*opened, f"fitted = pl.{home}.{made.method}({', '.join(written)}).fit(...)  # to what you gave"]))  # fmt: skip
    call = ", ".join(["model", *map(repr, texts), *written, *(["metric=metric"] if "metric" in made.arguments else [])])
    lines = [*opened, *(f"# {each}: as you gave it" for each in left)]
    return Code(python="\n".join([*lines, f"result = pl.{home}.{made.method}({call})", "result.show()"]))


@cache
def _home(method: str) -> str | None:
    """The package that offers a method, found by its name without importing all of them."""
    for package in sorted(METHODS, key=lambda p: f"pellucid.{p}" not in sys.modules):
        start = resources.files("pellucid").joinpath(package, "__init__.py")
        if start.is_file() and re.search(rf"\b{re.escape(method)}\b", start.read_text(encoding="utf-8")):
            return package
    return None
