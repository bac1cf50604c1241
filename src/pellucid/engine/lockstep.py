"""Calls that take turns, so that what they ask of a model is answered together.

A technique is written for one prompt: it asks the model, looks at the answer, asks again. For many prompts, `in_step` starts
every call in a thread of its own and lets exactly one run at a time, each up to its next question (`asked`); then all open
questions of a kind are answered at once, in shared batches, by the thread that called. So no technique says anything
about batches, and what a call finds does not depend on its neighbours but for rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, copy_context
from typing import Any, Generic, TypeVar

import torch

from pellucid.engine.pausing import progress, quiet, sharing

T = TypeVar("T")
Answering = Callable[[list[Any]], list[Any]]
ABREAST = 64  # calls that are open at the same time

_own: ContextVar[_Call[Any] | None] = ContextVar("call", default=None)


class _Dropped(BaseException):
    """Unwinds a call whose neighbour failed."""


class _Call(Generic[T]):
    """One call in a thread of its own, which runs only while its owner waits in `resume`."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.call, self.dropped = call, False
        self.made: T | None = None
        self.error: BaseException | None = None
        self.question: tuple[Answering, Any, bool] | None = None  # who answers, what, and whether gradients are on
        self.answer: Any = None
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._grad = torch.is_grad_enabled()
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), daemon=True)

    def _run(self) -> None:
        self._turn.acquire()
        _own.set(self)
        try:
            # whoever listens to pauses, and the bar, belong to the thread that called
            with torch.set_grad_enabled(self._grad), quiet(), sharing(None):
                if not self.dropped:
                    self.made = self.call()
        except BaseException as error:  # handed to the caller
            self.error = error
        self._back.release()

    def resume(self) -> bool:
        """Run on to the next question; False at the end. Raises what the call raised."""
        if self._thread.ident is None:
            self._thread.start()
        self.question = None
        self._turn.release()
        self._back.acquire()
        if self.error is not None:
            raise self.error
        return self.question is not None

    def drop(self) -> None:
        """Unwind it, where it is not over."""
        if self._thread.is_alive():
            self.dropped = True
            self._turn.release()
            self._thread.join()

    def ask(self, answering: Answering, item: Any) -> Any:
        self.question = (answering, item, torch.is_grad_enabled())
        self._back.release()
        self._turn.acquire()
        if self.dropped:
            raise _Dropped
        answer, self.answer = self.answer, None
        return answer


def asked(answering: Answering, item: Any) -> Any:
    """`answering([item])[0]`; within `in_step` the items of all calls that ask the same are answered together."""
    call = _own.get()
    return answering([item])[0] if call is None else call.ask(answering, item)


def in_company() -> bool:
    """Whether this is one of several calls in step, so that what it asks is answered with what others ask."""
    return _own.get() is not None


def in_step(calls: Sequence[Callable[[], T]], what: str = "prompts") -> list[T]:
    """What each of `calls` returns. The first error ends them all; a note on it says whose it was."""
    if len(calls) < 2 or _own.get() is not None:
        return [call() for call in calls]
    every = [_Call(call) for call in calls]
    waiting, live = list(reversed(every)), list[_Call[T]]()
    with progress[None](what=what, total=len(calls)) as bar:
        try:
            while waiting or live:
                while waiting and len(live) < ABREAST:
                    live.append(waiting.pop())
                going = [call for call in live if _resumed(call, every)]
                bar.step(len(live) - len(going))
                live = going
                for call, answer in zip(live, _answers(live), strict=True):
                    call.answer = answer
        finally:
            for call in every:
                call.drop()
    return [call.made for call in every]  # type: ignore[misc]


def _resumed(call: _Call[Any], every: Sequence[_Call[Any]]) -> bool:
    try:
        return call.resume()
    except Exception as error:
        error.add_note(f"(of prompt {every.index(call)}, counted from 0, of {len(every)})")
        raise


def _answers(calls: Sequence[_Call[Any]]) -> Iterator[Any]:
    """The answers to the open questions, those of one kind in one go."""
    kinds: dict[tuple[Answering, bool], list[int]] = {}
    for i, call in enumerate(calls):
        assert call.question is not None
        kinds.setdefault((call.question[0], call.question[2]), []).append(i)
    found: dict[int, Any] = {}
    for (answering, grad), members in kinds.items():
        items = [calls[i].question[1] for i in members]  # type: ignore[index]
        with torch.set_grad_enabled(grad):
            found |= dict(zip(members, answering(items), strict=True))
    return (found[i] for i in range(len(calls)))
