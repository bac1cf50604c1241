"""Where does a view come from, and what makes it again? A result's provenance, as text and as a Python program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

from pellucid.results import Provenance
from pellucid.views.schema import Code, Fact, Origin

PROGRAM = ("call", "opened", "free")  # what `code` shows


def origin(made: Provenance) -> Origin:
    about = {k: v for k, v in made.as_dict().items() if k not in PROGRAM}
    facts = [Fact(name=k, value=_written(v)) for k, v in about.items() if v not in (None, "", {}, []) and k != "method"]
    return Origin(line=made.line(), facts=(Fact(name="method", value=made.method), *facts))


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v!r}" for k, v in value.items() if v is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def code(*made: Provenance, show: str = "result.show()") -> Code:
    """The calls that were recorded, one after another in one program; nothing where none was.

    >>> two = [Provenance("f", opened="pl.load('a')", call=f"pl.lenses.f(model, {i})") for i in (1, 2)]
    >>> print(code(*two).python.split("\\n\\n")[1])
    model = pl.load('a')
    result = pl.lenses.f(model, 1)
    result.show()
    result = pl.lenses.f(model, 2)
    result.show()
    """
    calls = list(dict.fromkeys(each.call for each in made if each.call))
    if not calls:
        return Code()
    free, given = ({**reduce(or_, (dict(getattr(each, name)) for each in made))} for name in ("free", "given"))
    whole = replace(made[0], call=f"\n{show}\nresult = ".join(calls), free=free, given=given)
    return Code(python=f"{whole.code()}\n{show}")
