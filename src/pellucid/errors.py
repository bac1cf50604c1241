"""Errors a user meets. Each says what was given, what was expected and what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Real


class PellucidError(ValueError):
    """Base of every error pellucid raises on purpose; the command line prints it as one line and exits with 2."""


class LoadError(PellucidError):
    """A model could not be opened."""


class SiteError(PellucidError):
    """A site does not exist on this model, or its address cannot be parsed."""


class Refused(PellucidError):
    """The model has this site or feature, but a proof it rests on failed, so using it would give wrong numbers."""


class InputError(PellucidError):
    """A prompt, token, target or other argument is not usable."""


def at_least(least: float, **numbers: float) -> None:
    """InputError that names the first number which is smaller (or none).

    >>> at_least(1, steps=20, draws=0)
    Traceback (most recent call last):
    pellucid.errors.InputError: draws=0: expected at least 1
    """
    for name, value in numbers.items():
        if not isinstance(value, Real) or not value >= least:
            raise InputError(f"{name}={value!r}: expected at least {least}")


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
