"""Which part of a long prompt is shown? A stretch of tokens that ends near where the answer is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pellucid.views.markup import Html, tag

WIDEST = 64
T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """Positions `start` to `stop` of `length`.

    >>> Window.of("abc", 2).selector
    >>> Window.of("x" * 100, 99).selector
    slice(36, 100, None)
    >>> Window.of("x" * 100, 80).positions[0]
    20
    """

    start: int
    stop: int
    length: int

    @classmethod
    def of(cls, tokens: Sequence[str], answer: int) -> Window:
        stop = min(len(tokens), max(answer + 4, WIDEST))
        return cls(max(0, stop - WIDEST), stop, len(tokens))

    @property
    def positions(self) -> list[int]:
        return list(range(self.start, self.stop))

    @property
    def selector(self) -> slice | None:
        return None if self.stop - self.start == self.length else slice(self.start, self.stop)

    def cut(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.start : self.stop]

    def note(self, length: int) -> Html | None:
        if self.selector is None:
            return None
        return tag("p", f"Shown are tokens {self.start} to {self.stop - 1} of {length}.", class_="note")
