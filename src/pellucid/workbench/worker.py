"""Who gets the model next? One thread for each model runs one task at a time, in turns that are fair to all tabs.

Three levels: what follows the typing (LIVE) goes before panels (VIEW), panels before jobs (JOB). Within a level tabs take
turns, however much one of them asks for. A task that is running pauses between its passes (`pellucid.engine.pausing`),
and whatever stands on a higher level runs in that pause, so that typing waits for one batch of a job at most. A task
with a key takes the place of an older one with the same key: the older one ends at its next pause, unanswered.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from pellucid.engine.pausing import Moment, sharing
from pellucid.errors import InputError

LIVE, VIEW, JOB = range(3)
WAITING = 64  # tasks of one tab on one level


class Superseded(Exception):
    """A newer request has taken this one's place."""


class Dropped(BaseException):
    """Ends a task at a pause. No `Exception`: methods that try things must not take it for a failure of their own."""


@dataclass(eq=False)
class Task:
    """Something to do with the model; `work` is told how long it has waited, in seconds."""

    level: int
    tab: str
    work: Callable[[float], Any]
    key: Hashable = None
    told: Callable[[Moment], None] | None = None  # hears of its progress
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)
    dropped: bool = False


class Worker:
    """The turns of one model."""

    def __init__(self, name: str = "model") -> None:
        self._queues: list[OrderedDict[str, deque[Task]]] = [OrderedDict() for _ in (LIVE, VIEW, JOB)]
        self._ready = threading.Condition()
        self._running: list[Task] = []  # innermost last
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=f"pellucid {name}", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> Future[Any]:
        """Queue a task. InputError where its tab has too much waiting."""
        with self._ready:
            if self._closed:
                raise InputError("the workbench is closing")
            if task.key is not None:
                for older in self._known():
                    if older.key == task.key and older.level == task.level:
                        self.drop(older)
            queue = self._queues[task.level].setdefault(task.tab, deque())
            waiting = [each for each in queue if not each.dropped]
            if len(waiting) >= WAITING:
                raise InputError(f"this tab has {WAITING} requests waiting already; wait for some of them")
            queue.clear()
            queue.extend([*waiting, task])
            self._ready.notify()
        return task.future

    def drop(self, task: Task) -> None:
        """End a task: at once if it waits, at its next pause if it runs. Its future then says Superseded."""
        with self._ready:
            task.dropped = True
            if task not in self._running and not task.future.done():
                task.future.set_exception(Superseded())

    def close(self) -> None:
        """End what runs at its next pause, and forget what waits."""
        with self._ready:
            self._closed = True
            for task in self._known():
                self.drop(task)
            self._ready.notify()
        self._thread.join(timeout=10)

    def _known(self) -> list[Task]:
        return [*self._running, *(task for level in self._queues for queue in level.values() for task in queue)]

    # ---- the thread

    def _loop(self) -> None:
        while True:
            with self._ready:
                while not self._closed and not any(self._queues):
                    self._ready.wait()
                if self._closed:
                    return
            task = self._next(below=JOB + 1)
            if task is not None:
                self._do(task)

    def _next(self, below: int) -> Task | None:
        """The next task of a level before `below`; its tab goes to the end of the line."""
        with self._ready:
            for level in self._queues[:below]:
                while level:
                    tab, queue = next(iter(level.items()))
                    task = queue.popleft()
                    if queue:
                        level.move_to_end(tab)
                    else:
                        del level[tab]
                    if not task.dropped:
                        self._running.append(task)
                        return task
        return None

    def _do(self, task: Task) -> None:
        def paused(moment: Moment) -> None:
            if task.told is not None:
                task.told(moment)
            while not moment.busy and not task.dropped:
                other = self._next(below=task.level)
                if other is None:
                    break
                self._do(other)
            if task.dropped:
                raise Dropped

        try:
            with torch.enable_grad(), sharing(paused):  # a task may run in another's pause, which may run without
                made = task.work(time.perf_counter() - task.since)
            self._finish(task, made, None)
        except Dropped:
            self._finish(task, None, Superseded())
        except BaseException as error:
            self._finish(task, None, error)

    def _finish(self, task: Task, made: Any, error: BaseException | None) -> None:
        with self._ready:
            self._running.remove(task)
        if task.dropped:
            error = Superseded()
        if error is None:
            task.future.set_result(made)
        else:
            task.future.set_exception(error)
