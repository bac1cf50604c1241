"""Where can long work be interrupted? Between two passes it asks whoever shares the model with it.

A host that shares a model among several askers (the workbench) listens while it runs something long; elsewhere a pause
costs nothing and does nothing. The listener may let others run first, or raise to end the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """How far the work is, in whatever it counts (None where it does not know), and whether the model is `busy`: in the
    middle of something that others must not meet, so that the work can end here, but nothing else can run."""

    done: int | None = None
    total: int | None = None
    busy: bool = False


_listener: ContextVar[Callable[[Moment], None] | None] = ContextVar("listener", default=None)


@contextmanager
def sharing(listener: Callable[[Moment], None] | None) -> Iterator[None]:
    """`listener` hears of every pause of what runs inside, in the same thread.

    >>> with sharing(print):
    ...     pause(3, 10)
    Moment(done=3, total=10, busy=False)
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def shared() -> bool:
    """Whether somebody waits for pauses, so that what runs between two of them should be short."""
    return _listener.get() is not None


def pause(done: int | None = None, total: int | None = None, busy: bool = False) -> None:
    """Called between two passes of long work."""
    listener = _listener.get()
    if listener is not None:
        listener(Moment(done, total, busy))
