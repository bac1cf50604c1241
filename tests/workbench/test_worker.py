"""Whoever types goes first, tabs take turns, and what is outdated ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from pellucid.engine.pausing import Moment, pause
from pellucid.errors import InputError
from pellucid.workbench.worker import JOB, LIVE, VIEW, WAITING, Superseded, Task, Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("test")
    yield made
    made.close()


class Held:
    """Keeps a worker busy until it is let go."""

    def __init__(self, worker: Worker, level: int = LIVE) -> None:
        self.begun, self.gate = threading.Event(), threading.Event()
        self.future = worker.submit(Task(level, "holder", self._work))
        assert self.begun.wait(10)

    def _work(self, waited: float) -> None:
        self.begun.set()
        assert self.gate.wait(10)


def test_levels_come_in_their_order_and_tabs_take_turns_within_one(worker: Worker) -> None:
    order: list[str] = []
    held = Held(worker)
    names = ["job", "view 1", "view 2", "view 3", "other view", "live"]
    places = [(JOB, "a"), (VIEW, "a"), (VIEW, "a"), (VIEW, "a"), (VIEW, "b"), (LIVE, "a")]
    futures = [
        worker.submit(Task(level, tab, lambda _, name=name: order.append(name)))
        for name, (level, tab) in zip(names, places, strict=True)
    ]
    held.gate.set()
    for future in futures:
        future.result(10)
    assert order == ["live", "view 1", "other view", "view 2", "view 3", "job"]


def test_typing_runs_between_two_batches_of_a_job(worker: Worker) -> None:
    steps: list[str] = []
    between, go_on = threading.Event(), threading.Event()

    def long(_: float) -> str:
        for i in range(3):
            with torch.no_grad():
                pause(i, 3)
            steps.append(f"batch {i}")
            if i == 0:
                between.set()
                assert go_on.wait(10)
        return "done"

    job = worker.submit(Task(JOB, "a", long))
    assert between.wait(10)
    typed = worker.submit(Task(LIVE, "b", lambda _: steps.append(f"typed, gradients {torch.is_grad_enabled()}")))
    later = worker.submit(Task(JOB, "b", lambda _: steps.append("second job")))
    go_on.set()
    typed.result(10)
    assert (job.result(10), later.result(10)) == ("done", None)
    assert steps == ["batch 0", "typed, gradients True", "batch 1", "batch 2", "second job"]


def test_nothing_runs_in_a_pause_in_the_middle_of_a_pass(worker: Worker) -> None:
    steps: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def generating(_: float) -> None:
        begun.set()
        assert go_on.wait(10)
        pause(busy=True)
        steps.append("token")

    job = worker.submit(Task(JOB, "a", generating))
    assert begun.wait(10)
    typed = worker.submit(Task(LIVE, "a", lambda _: steps.append("typed")))
    go_on.set()
    job.result(10), typed.result(10)
    assert steps == ["token", "typed"]


def test_a_newer_request_ends_the_older_one_waiting_or_running(worker: Worker) -> None:
    begun, go_on, steps = threading.Event(), threading.Event(), []

    def slow(_: float) -> str:
        begun.set()
        assert go_on.wait(10)
        try:
            pause(busy=True)
        except Exception:  # a method's own handling must not swallow it
            steps.append("swallowed")
        steps.append("went on")
        return "old"

    running = worker.submit(Task(LIVE, "t", slow, key=("t", "a")))
    assert begun.wait(10)
    waiting = worker.submit(Task(LIVE, "t", lambda _: "middle", key=("t", "a")))
    other_pane = worker.submit(Task(LIVE, "t", lambda _: "other", key=("t", "b")))
    newest = worker.submit(Task(LIVE, "t", lambda _: "new", key=("t", "a")))
    with pytest.raises(Superseded):
        waiting.result(10)
    go_on.set()
    with pytest.raises(Superseded):
        running.result(10)
    assert (newest.result(10), other_pane.result(10), steps) == ("new", "other", [])


def test_an_outdated_answer_is_not_given_even_if_its_work_never_paused(worker: Worker) -> None:
    held = Held(worker)
    task = Task(LIVE, "t", lambda _: worker.drop(task))
    future = worker.submit(task)
    held.gate.set()
    with pytest.raises(Superseded):
        future.result(10)


def test_progress_is_told_and_an_error_is_the_answer(worker: Worker) -> None:
    told: list[Moment] = []

    def failing(_: float) -> None:
        pause(1, 4)
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        worker.submit(Task(JOB, "t", failing, told=told.append)).result(10)
    assert told == [Moment(1, 4)]
    assert worker.submit(Task(LIVE, "t", lambda _: "alive")).result(10) == "alive"


def test_one_tab_cannot_fill_the_line(worker: Worker) -> None:
    held = Held(worker)
    for _ in range(WAITING):
        worker.submit(Task(VIEW, "greedy", lambda _: None))
    with pytest.raises(InputError, match="waiting already"):
        worker.submit(Task(VIEW, "greedy", lambda _: None))
    other = worker.submit(Task(VIEW, "modest", lambda _: "served"))
    held.gate.set()
    assert other.result(10) == "served"


def test_closing_ends_what_waits_and_takes_nothing_more() -> None:
    worker = Worker("closing")
    held = Held(worker)
    waiting = worker.submit(Task(JOB, "t", lambda _: None))
    threading.Timer(0.05, held.gate.set).start()
    worker.close()
    with pytest.raises(Superseded):
        waiting.result(10)
    with pytest.raises(InputError, match="closing"):
        worker.submit(Task(LIVE, "t", lambda _: None))
