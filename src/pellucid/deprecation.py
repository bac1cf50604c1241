"""How does a public name leave? It goes on working, says what to use instead, and is gone at a named version.

A minor version (0.x before 1.0, 1.x after) may announce; the next minor version before 1.0, the next major one
after, may take away. Whoever runs with `-W error::DeprecationWarning` learns of it in their own tests.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def deprecated(since: str, gone: str, use: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A callable that is to leave: it warns at the caller's line, once a line.

    >>> @deprecated(since="0.2", gone="0.3", use="lenses.logit_lens")
    ... def lens(x): return x
    >>> lens(1)  # DeprecationWarning: lens leaves in pellucid 0.3 (said since 0.2): use lenses.logit_lens
    1
    """

    def wrapped(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def warned(*args: P.args, **kwargs: P.kwargs) -> R:
            told = f"{function.__name__} leaves in pellucid {gone} (said since {since}): use {use}"
            warnings.warn(told, DeprecationWarning, stacklevel=2)
            return function(*args, **kwargs)

        return warned

    return wrapped


def renamed(since: str, gone: str, **names: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Keyword arguments under a new name, `old="new"`: the old one goes on working; both at once is a TypeError.

    >>> @renamed(since="0.2", gone="0.3", n="draws")
    ... def sampled(draws): return draws
    >>> sampled(n=3)  # DeprecationWarning: sampled(n=) is draws= now; n= leaves in pellucid 0.3 (said since 0.2)
    3
    """

    def wrapped(function: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(function)
        def warned(*args: object, **kwargs: object) -> R:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__name__} takes {new}= or its old name {old}=, not both")
                told = (
                    f"{function.__name__}({old}=) is {new}= now; {old}= leaves in pellucid {gone} (said since {since})"
                )
                warnings.warn(told, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return warned

    return wrapped
