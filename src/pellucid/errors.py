"""Errors a user meets. Each says what was given, what was expected and what to do instead."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from operator import index
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

P = ParamSpec("P")
R = TypeVar("R")
LONGEST = 600  # characters of a message: what was given may be a page, the advice behind it must stay in sight


class PellucidError(ValueError):
    """Base of every error pellucid raises on purpose; the command line prints it as one line and exits with 2.

    Messages quote what was given: here, once for all, it is made fit to read: one line, not too long, numpy's numbers
    and strings as Python has them, no addresses in memory.

    >>> print(PellucidError(f"draws={object()!r}:\\nexpected a number"))
    draws=<object>: expected a number
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*((readable(args[0]), *args[1:]) if args and isinstance(args[0], str) else args))


_QUOTED = re.compile(r"np\.\w+\(((?:'[^']*'|\"[^\"]*\"|[^'\"()\[\]])*)\)")
_PLACE = re.compile(r"( object)? at 0x[0-9a-f]+")
_CLASS = re.compile(r"<class '([^']*)'>")


def readable(message: str) -> str:
    """A message in one line, without what Python shows of an object but a person cannot use.

    >>> import numpy as np
    >>> readable(f"layer {np.int64(7)!r} of {None.__class__.__name__}")
    'layer 7 of None'
    """
    text = _CLASS.sub(r"\1", _PLACE.sub("", _QUOTED.sub(r"\1", message))).replace("NoneType", "None")
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[5 - LONGEST // 2 :]}"


class LoadError(PellucidError):
    """A model could not be opened."""


class SiteError(PellucidError):
    """A site does not exist on this model, or its address cannot be parsed."""


class Refused(PellucidError):
    """The model has this site or feature, but a proof it rests on failed, so using it would give wrong numbers."""


class InputError(PellucidError):
    """A prompt, token, target or other argument is not usable."""


def among(value: Any, kinds: Any) -> bool:
    """Is a value one of the words of a Literal? An array is none, and cannot be asked with `in`.

    >>> import numpy as np
    >>> from typing import Literal
    >>> among("l1", Literal["l1", "l2"]), among(np.ones(2), Literal["l1", "l2"]), among(["l1"], Literal["l1", "l2"])
    (True, False, False)
    """
    return isinstance(value, str) and value in get_args(kinds)


def one_of(value: Any, kinds: Any, said: str) -> None:
    """InputError, which begins with what is `said` of the value, for one that is not `among` the words of a Literal.

    >>> from typing import Literal
    >>> one_of("l3", Literal["l1", "l2"], "norm=")
    Traceback (most recent call last):
    pellucid.errors.InputError: norm='l3': expected one of l1, l2
    """
    if not among(value, kinds):
        raise InputError(f"{said}{value!r}: expected one of {', '.join(get_args(kinds))}")


def at_least(least: float, **numbers: float) -> None:
    """InputError that names the first number which is smaller (or none).

    >>> at_least(1, steps=20, draws=0)
    Traceback (most recent call last):
    pellucid.errors.InputError: draws=0: expected at least 1
    """
    for name, value in numbers.items():
        if not isinstance(value, Real) or not value >= least:
            raise InputError(f"{name}={value!r}: expected at least {least}")


def _axes(value: Any) -> int:
    return int(getattr(value, "ndim", 0))


def _whole(value: Any) -> Any:
    if isinstance(value, bool | float | str) or not hasattr(value, "__index__"):
        return None
    return index(value) if isinstance(value, Integral) or not _axes(value) else None


def _number(value: Any) -> Any:
    if isinstance(value, bool | str) or not hasattr(value, "__float__") or _axes(value):
        return None
    return value if not math.isnan(float(value)) else None


# What a plain annotation asks for: in words, and a value as its own kind (None: it is none). Texts are not among them:
# where an annotation says `str`, ids or several are often welcome too.
PLAIN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
    "bool": ("True or False", lambda value: bool(value) if type(value).__name__ in ("bool", "bool_") else None),
    "None": ("None", lambda value: None),
    "Model": ("a model, as pellucid.load opens it", lambda value: value if hasattr(value, "anatomy") else None),
}


SINGLE = {str: "one text", int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}


def plain(annotations: Mapping[str, str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments whose annotation is made of plain kinds (`int`, `float | None`), each as its own kind.

    InputError for one of another kind: `draws="3"`, `seed=2.5`, a NaN where a number is asked for.

    >>> plain({"draws": "int", "target": "Any"}, {"draws": 3, "target": "x"})
    {'draws': 3}
    >>> plain({"draws": "int | None"}, {"draws": "3"})
    Traceback (most recent call last):
    pellucid.errors.InputError: draws='3': expected a whole number or None
    """
    fitting: dict[str, Any] = {}
    for name, value in arguments.items():
        kinds = [kind.strip() for kind in str(annotations.get(name, "")).split("|")]
        if not all(kind in PLAIN for kind in kinds) or (value is None and "None" in kinds):
            continue
        found = [PLAIN[kind][1](value) for kind in kinds]
        fitting[name] = next((each for each in found if each is not None), None)
        if fitting[name] is None:
            raise InputError(f"{name}={value!r}: expected {' or '.join(PLAIN[kind][0] for kind in kinds)}")
        if name == "seed" and not 0 <= fitting[name] < 2**63:  # what every generator of random numbers takes
            raise InputError(f"seed={value!r}: expected a whole number from 0 to 2**63 - 1")
    return fitting


def single(function: Callable[..., Any], annotations: Mapping[str, str], arguments: Mapping[str, Any]) -> None:
    """InputError for an array, list, set or mapping where a function's annotations ask for one word, text or number.

    An array cannot be compared with a word, and a list cannot be looked up: the errors would be Python's.

    >>> def half(of: str | None = None, several: "str | list[str]" = "a"): ...
    >>> single(half, {"of": "str | None", "several": "str | list[str]"}, {"of": ["a"], "several": ["a"]})
    Traceback (most recent call last):
    pellucid.errors.InputError: of=['a']: expected one text or None
    """
    for name, value in arguments.items():
        if not _axes(value) and not isinstance(value, list | dict | set):
            continue
        try:
            kinds = eval(annotations.get(name, "Any"), getattr(function, "__globals__", {}))
        except (NameError, TypeError, AttributeError, SyntaxError):  # a name for type checkers alone
            continue
        kinds = get_args(kinds) if isinstance(kinds, UnionType) or get_origin(kinds) is Union else (kinds,)
        if not all(kind in SINGLE or get_origin(kind) is Literal for kind in kinds):
            continue
        words = [" or ".join(map(repr, get_args(k))) if get_origin(k) is Literal else SINGLE[k] for k in kinds]
        raise InputError(f"{name}={value!r:.80}: expected {' or '.join(words)}")


def fitted(
    function: Callable[..., Any], annotations: Mapping[str, str], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """What `plain` and `single` say of a call: its plain arguments, each as its own kind."""
    made = plain(annotations, arguments)
    single(function, annotations, arguments)
    return made


def listed(name: str, value: Any, expected: str) -> list[Any]:
    """The items of a value of which several are expected; InputError where it has none.

    >>> listed("queries", 3.5, "positions")
    Traceback (most recent call last):
    pellucid.errors.InputError: queries=3.5: expected positions
    """
    try:
        return list(value)
    except TypeError:
        raise InputError(f"{name}={value!r}: expected {expected}") from None


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose options of plain kinds are checked before it runs; see `fitted`."""
    signature = inspect.signature(function)
    annotations = {name: each.annotation for name, each in signature.parameters.items()}

    @functools.wraps(function)
    def asked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update(fitted(function, annotations, bound.arguments))
        return function(*bound.args, **bound.kwargs)

    return asked


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """A hint naming the known names closest to `name`.

    >>> nearest("resid_prE", ["resid_pre", "mlp.out"])
    "; did you mean 'resid_pre'?"
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(repr(k) for k in known[:12])
    return f"; known: {shown}" if known else ""
