"""Where can long work be interrupted? Between two passes it asks whoever shares the model with it.

A host that shares a model among several askers (the workbench) listens while it runs something long; elsewhere a pause
costs nothing and does nothing. The listener may let others run first, or raise to end the work. A `progress` bar is such a
place before each of its steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


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


# ---- bars

DELAY = 1.0  # seconds before a bar is shown

_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars inside."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def _watched() -> bool:
    """Whether somebody looks: a terminal, or a notebook's kernel."""
    return not _silent.get() and (sys.stderr.isatty() or "ipykernel" in sys.modules)


class progress(Generic[T]):
    """Shows how far long work is, after a second of it, and pauses before each step: iterated, or stepped by hand.

    >>> sum(progress([1, 2, 3], "numbers added"))
    6
    >>> with progress(what="runs", total=10) as bar:
    ...     bar.step(4, loss=0.5)
    """

    def __init__(self, items: Iterable[T] = (), what: str = "", total: int | None = None, done: int = 0) -> None:
        self.items, self.done = items, done
        self.total = total if total is not None else len(items) if isinstance(items, Sized) else None
        self.bar = tqdm(desc=what, total=self.total, initial=done, delay=DELAY, leave=False, disable=not _watched())

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self.items:
                pause(self.done, self.total)
                yield item
                self._moved(1)

    def step(self, n: int = 1, **said: float) -> None:
        """`n` more are done; a pause follows if that is not all. `said` are numbers to show beside the bar."""
        self._moved(n, **said)
        if self.total is None or self.done < self.total:
            pause(self.done, self.total)

    def say(self, **numbers: float) -> None:
        """Numbers to show beside the bar."""
        if not self.bar.disable:
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in numbers.items()}, refresh=False)

    def _moved(self, n: int, **said: float) -> None:
        self.done += n
        self.bar.update(n)
        if said:
            self.say(**said)

    def __enter__(self) -> progress[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
