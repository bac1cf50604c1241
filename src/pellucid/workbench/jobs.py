"""Work that takes longer: it goes on when the page is reloaded, says how far it is, and can be cancelled.

Jobs belong to the server. Each runs in its model's worker, batch by batch, and lets whoever types go first.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import msgspec

from pellucid.causal import ablation
from pellucid.circuits import edge_attribution, faithfulness_curve
from pellucid.engine.pausing import Moment
from pellucid.errors import InputError, PellucidError, nearest
from pellucid.views.documents import document
from pellucid.views.question import Question
from pellucid.views.schema import Document
from pellucid.workbench import finder
from pellucid.workbench.hub import Hub
from pellucid.workbench.messages import Job, JobKind, JobRequest, JobState
from pellucid.workbench.panels import patched, posed
from pellucid.workbench.worker import JOB, Superseded, Task, Worker

log = logging.getLogger("pellucid.workbench")
KEPT = 60  # jobs; the oldest finished ones are forgotten
UNFINISHED = 20
TITLES: dict[JobKind, str] = {
    "head_ablation": "Switching off each head",
    "patching": "Patching from the second prompt",
    "circuit": "Finding the circuit",
    "neuron_ablation": "Switching off the strongest neurons",
}


@dataclass(eq=False)
class Entry:
    """A job as the server knows it."""

    id: str
    asked: JobRequest
    model: str
    worker: Worker
    task: Task
    state: JobState = "queued"
    done: int = 0
    total: int | None = None
    error: str = ""
    document: Document | None = None
    started: float = 0.0
    ended: float = 0.0

    def told(self, moment: Moment) -> None:
        """A pause of its own: how far it is, or one pass more."""
        self.done, self.total = (self.done + 1, None) if moment.done is None else (moment.done, moment.total)

    def job(self, whole: bool = False) -> Job:
        seconds = (self.ended or time.time()) - self.started if self.started else 0.0
        return Job(
            id=self.id, kind=self.asked.kind, title=TITLES[self.asked.kind], model=self.model, prompt=self.asked.prompt, state=self.state,
            done=self.done, total=self.total, error=self.error, seconds=seconds, document=self.document if whole else None,
        )  # fmt: skip


class Jobs:
    """All jobs of a server."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def start(self, asked: JobRequest) -> str:
        """Queue a job and return its id. InputError for an unknown model, or where too many wait."""
        opened = self.hub.of(asked.model)
        id = secrets.token_hex(6)
        task = Task(JOB, asked.tab, lambda waited: self._run(entry))
        entry = Entry(id, asked, opened.card.name, opened.worker, task)
        task.told = entry.told
        with self._lock:
            if sum(each.state in ("queued", "running") for each in self._entries.values()) >= UNFINISHED:
                raise InputError(f"{UNFINISHED} jobs are waiting already; cancel one, or wait")
            self._entries[id] = entry
            over = len(self._entries) - KEPT
            finished = [e.id for e in self._entries.values() if e.state not in ("queued", "running")]
            for old in finished[: max(0, over)]:
                del self._entries[old]
        opened.worker.submit(task).add_done_callback(lambda future: self._ended(entry, future))
        return id

    def listed(self) -> list[Job]:
        """The newest first, without their documents."""
        with self._lock:
            return [entry.job() for entry in reversed(self._entries.values())]

    def one(self, id: str) -> Job:
        return self._of(id).job(whole=True)

    def remove(self, id: str) -> None:
        """Cancel a job that waits or runs; forget one that is over."""
        entry = self._of(id)
        if entry.state in ("queued", "running"):
            entry.worker.drop(entry.task)
            return
        with self._lock:
            self._entries.pop(id, None)

    def _of(self, id: str) -> Entry:
        with self._lock:
            if id not in self._entries:
                raise InputError(f"there is no job {id[:80]!r}; it may have been removed")
            return self._entries[id]

    # ---- in the worker's thread

    def _run(self, entry: Entry) -> Document:
        entry.state, entry.started = "running", time.time()
        asked = entry.asked
        question, note = posed(
            self.hub.of(asked.model).model,
            asked.prompt,
            asked.other,
            asked.kind == "patching",
            asked.answer,
            asked.word,
        )
        made = WORK[asked.kind](question, asked.options)
        return msgspec.structs.replace(made, care=" ".join(filter(None, (made.care, note))))

    def _ended(self, entry: Entry, future: Future[Any]) -> None:
        error, entry.ended = future.exception(), time.time()
        if error is None:
            entry.document, entry.total = future.result(), entry.total or max(1, entry.done)
            entry.done, entry.state = entry.total, "done"
        elif isinstance(error, Superseded):
            entry.state = "cancelled"
        else:
            if not isinstance(error, PellucidError):
                log.error("job %s failed", entry.id, exc_info=error)
                error = RuntimeError(
                    f"something unexpected went wrong ({type(error).__name__}); the terminal of the workbench has the details"
                )
            entry.error, entry.state = " ".join(str(error).split()), "failed"


# ---- what jobs do


def head_ablation(question: Question, options: dict[str, Any]) -> Document:
    """`how`: zero or mean (over the prompt's tokens)."""
    how = _one_of(options, "how", "zero", ("zero", "mean"))
    over = f"{question.model.anatomy.stacks[-1].prefix}layers.*.attn.heads.*{question.at}"
    found = ablation(question.model, question.inputs, over=over, how=how, metric=question.metric)  # type: ignore[arg-type]
    care = f"Change of the {question.metric_name}. Other heads can make up for one that is off, which does not show."
    return document(found, care=care)


def patching(question: Question, options: dict[str, Any]) -> Document:
    """`over`: resid, attention, mlp (layer by token) or heads."""
    return patched(question, options)


def neuron_ablation(question: Question, options: dict[str, Any]) -> Document:
    """The `top` neurons by `sort` (effect or activation), each switched off alone; `how`: zero or mean."""
    how = _one_of(options, "how", "zero", ("zero", "mean"))
    sort = _one_of(options, "sort", "effect", ("effect", "activation"))
    top = _count(options, "top", 50, 1000)
    rows, _, _ = finder.neurons(question, finder.Wanted(sort, options.get("layer"), None, top))
    over = [row.component for row in rows]
    found = ablation(question.model, question.inputs, over=over, how=how, metric=question.metric)  # type: ignore[arg-type]
    care = f"Change of the {question.metric_name}; the neurons are the first by {sort} on this prompt, so they are no random sample."
    return document(found, care=care)


def circuit(question: Question, options: dict[str, Any]) -> Document:
    """The `edges` strongest by EAP-IG in `steps` steps, switched off by the second prompt's messages, or to zero."""
    steps, edges = _count(options, "steps", 5, 64), _count(options, "edges", 100, 2000)
    other = question.counterfactual
    how: Any = "zero" if other is None else "resample"
    reference = None if other is None else [other]
    model, inputs, metric = question.model, question.inputs, question.metric
    scores = edge_attribution(model, inputs, metric, how=how, reference=reference, method="eap-ig-inputs", steps=steps)
    n = min(edges, len(scores.graph))
    judged = faithfulness_curve(
        model, scores, inputs, metric, how=how, reference=reference, sizes=[n / len(scores.graph)]
    )
    care = (
        f"Run alone, these edges give {float(judged['sized'][0]):.0%} of the answer (0 is no edges, 100% all), as many "
        f"random ones {float(judged['random'][0]):.0%}. Found and judged on this one prompt, everything else switched off "
        + ("to zero." if other is None else "to the second prompt's values.")
    )
    return document(scores.circuit(n), care=care)


WORK: dict[JobKind, Callable[[Question, dict[str, Any]], Document]] = {
    "head_ablation": head_ablation, "patching": patching, "circuit": circuit, "neuron_ablation": neuron_ablation,
}  # fmt: skip


def _one_of(options: dict[str, Any], name: str, default: str, known: tuple[str, ...]) -> str:
    value = options.get(name, default)
    if value not in known:
        raise InputError(f"{name}={value!r} is not known{nearest(str(value), known)}")
    return str(value)


def _count(options: dict[str, Any], name: str, default: int, most: int) -> int:
    value = options.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise InputError(f"{name}={value!r}: expected a number from 1 to {most}")
    return value
