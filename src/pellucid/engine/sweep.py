"""A sweep is a query: score this input under each of these many sets of edits. The planner chooses how.

The ways to run variants, cheapest first, are the rungs of `pellucid.engine.rungs`; a sweep takes the first one that
reproduces plain runs on this model and serves these edits and this metric, and goes on with the next where a batch of
it does not agree with a plain run after all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import running
from pellucid.engine.checkpoint import Checkpoint, fingerprint
from pellucid.engine.edits import Edit, Scale
from pellucid.engine.inputs import Inputs
from pellucid.engine.packed import Variant
from pellucid.engine.pausing import progress, shared
from pellucid.engine.peak import free, predicted, said
from pellucid.engine.reading import Reads
from pellucid.engine.run import execute
from pellucid.engine.rungs import LADDER, Job, Rung, prepare
from pellucid.engine.trial import certified, deviation, told
from pellucid.errors import InputError, PellucidError, Refused, nearest

# Bytes a batch of variants may take beyond the model. On a CPU small batches that stay in the cache are fastest.
MEMORY = {"cpu": 40 << 20}
MEMORY_ELSEWHERE = 2 << 30
FEW = 4  # variants that the memory of a batch is told from
SHARED = 4  # times less where others wait for the model


def default_memory(anatomy: Anatomy) -> int:
    device = next((p.device.type for p in anatomy.module.parameters()), "cpu")
    return MEMORY.get(device, MEMORY_ELSEWHERE) // (SHARED if shared() else 1)


@dataclass(eq=False)
class Sweep:
    """Scores of every variant: `values` [variant, batch] (NaN where interrupted) and `clean` [batch]; a metric of several
    outputs adds them as a last dimension."""

    values: Tensor
    clean: Tensor
    plan: Plan

    @property
    def done(self) -> Tensor:
        """[variant] which were run."""
        return self.plan.done

    def __repr__(self) -> str:
        return f"<Sweep of {len(self.values)} variants, {int(self.done.sum())} done; {self.plan.rung.name}>"


@dataclass(frozen=True, eq=False)
class _Some:
    """Reads what a metric reads of a few of the prompts."""

    positions: tuple[int, ...] | None
    tokens: Tensor | None
    classes: bool
    name: str = "some"
    outputs: int | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        return logits


class Wrong(Exception):
    """A rung does not give what a plain run gives."""


class Where(Protocol):
    """Where the batches of a sweep are run: see `pellucid.workers`."""

    def run(self, plan: Plan, variants: Sequence[Variant]) -> Iterator[tuple[list[Variant], list[Tensor]]]:
        """Batches of these variants as they are done, with what the metric reads of each; Wrong where the rung is."""


_where: ContextVar[Where | None] = ContextVar("where", default=None)


@contextmanager
def on(where: Where | None) -> Iterator[None]:
    """Every sweep inside is run there: on `pl.Processes(4)`, say. None: here."""
    token = _where.set(where)
    try:
        yield
    finally:
        _where.reset(token)


def current() -> Where | None:
    """Where the block around this call says; None: here."""
    return _where.get()


def reader(where: Where | None) -> Any:
    """What runs prompts elsewhere, where `where`, or else the block around this call, says so (`pl.VLLM`); None: here."""
    found = where or current()
    if where is not None and not hasattr(where, "execute") and (hasattr(where, "spread") or not hasattr(where, "run")):
        raise InputError(
            f"on={where!r} shares out the pieces of longer work; one run or generation is done here, or by pl.VLLM"
        )
    return found if hasattr(found, "execute") else None


@dataclass(eq=False)
class Plan:
    """How a sweep will be executed. `explain()` says it in words; `run()` does it, and continues where it stopped."""

    job: Job
    variants: list[Variant]
    candidates: Sequence[Rung]  # cheapest first
    memory: int
    checkpoint: Checkpoint | None = None
    model: Any = None  # the model it is a sweep of, which other places must open
    values: Tensor = field(init=False)
    done: Tensor = field(init=False)
    read: Tensor = field(init=False)  # what the metric reads of the run without edits
    rung: Rung = field(init=False)
    _peaks: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    reasons: dict[str, str] = field(default_factory=dict)  # a rung's name -> why it cannot be used; "" if it can

    def __post_init__(self) -> None:
        wide = any(p.dtype == torch.float64 for p in self.job.anatomy.module.parameters())
        shape = (
            len(self.variants),
            len(self.job.inputs),
            *(() if self.metric.outputs is None else (self.metric.outputs,)),
        )
        self.values = torch.full(shape, float("nan"), dtype=torch.float64 if wide else torch.float32)
        self.done = torch.zeros(shape[0], dtype=torch.bool)
        self._choose()

    @property
    def metric(self) -> Reads:
        return self.job.metric

    def _choose(self) -> None:
        """Take the first rung that can be used; Refused where one was asked for that cannot."""
        trial, why = certified(self.job.anatomy), ""
        for rung in self.candidates:
            if rung.name not in self.reasons:
                why = rung.unfit(self.job, self.variants) or trial.settled(rung, self.job.inputs) or trial.refused(rung)
                self.reasons[rung.name] = why
            if not self.reasons[rung.name]:
                self.rung = rung
                break
        else:
            rung = self.candidates[-1]
            raise Refused(f"the executor {rung.name!r} does not serve this sweep: {self.reasons[rung.name]}")

    # ---- what it costs

    @property
    def cost(self) -> float:
        """Estimated cost in plain forward passes of the same inputs, by tokens and parameters touched."""
        return (1.0 if self._checked else 2.0) + sum(self.rung.cost(self.job, v) for v in self.variants)

    @property
    def peak(self) -> int:
        """About how many bytes beyond the weights it takes at once, on the rung that is chosen: the run without edits, what is held
        of it, and the largest batch. See `pellucid.engine.peak`."""
        if self.rung.name not in self._peaks:
            with running(self.job.anatomy.module):
                self._peaks[self.rung.name] = self._peak()
        return self._peaks[self.rung.name]

    def _peak(self) -> int:
        job, rung = self.job, self.rung
        ends = [p + 1 if p >= 0 else -p for p in job.metric.positions or ()]

        def few(inputs: Inputs) -> Job:
            tokens = job.metric.tokens
            reads = _Some(job.metric.positions, None if tokens is None else tokens[: len(inputs)], job.metric.classes)
            return Job(job.anatomy, inputs, reads, job.shapes)

        def clean(inputs: Inputs) -> Any:
            short = few(inputs)
            return (rung.clean(short), short.recording if rung.keeps else None)

        first = predicted(clean, job.inputs, least=max(ends, default=0))
        held = first.held if rung.keeps else 0.0
        if not self._checked:  # a plain run beside the first batch
            most = held + predicted(lambda inputs: execute(job.anatomy, inputs), job.inputs).most
            first = first._replace(most=max(first.most, most))
        chunk = max(self.chunks(self.variants), key=lambda chunk: sum(job.length - v.start for v in chunk))
        sites = [w.spot.site for v in chunk for w in v.writers]
        if not sites:
            return round(first.most)
        alike = Scale(replace(sites[0], at=None), 1.0)  # in the place of each

        def begun(inputs: Inputs) -> tuple[Job, list[Variant]]:
            short = few(inputs)
            _ = short.recording if rung.keeps else None
            return short, [prepare(job.anatomy, inputs, i, alike) for i in range(n)]

        n = min(len(chunk), FEW) if rung.together(chunk[0], chunk[-1]) else 1
        found = predicted(lambda given: rung.run(*given), job.inputs, least=max(ends, default=0), before=begun)
        own = found.most / n / job.length
        tokens = sum(job.length - v.start for v in chunk)
        return round(max(first.most, held + own * tokens))

    def check_fits(self) -> None:
        """Refused, with what would fit, where the peak is more than is free. Asked only where it might be."""
        device = next((p.device for p in self.job.anatomy.module.parameters()), torch.device("cpu"))
        there, prompts = free(device), len(self.job.inputs)
        if self._roughly < there / 4 or self.peak <= there:
            return
        fit = int(prompts * there / self.peak)
        less = f"at most {fit} of these {prompts} prompts at a time" if fit else "shorter prompts"
        raise Refused(
            f"this sweep takes about {said(self.peak)} at its peak, and {said(there)} are free on {device}: give {less}, or a smaller "
            f"memory= for its batches (now {said(self.memory)})"
        )

    @property
    def _roughly(self) -> float:
        """Bytes that it takes at most, by a rule of thumb."""
        tokens = len(self.job.inputs) * self.job.length
        blocks = len(self.job.stack.blocks)
        widest = 40 * self.job.stack.d_model * (blocks if self.rung.keeps else 2) + 12 * self.rung.vocabulary(self.job)
        return 4.0 * tokens * widest + max(self.memory, self.rung.room(self.job, self.variants[0]))

    def explain(self) -> str:
        """The plan in words, with its estimated cost beside running every variant from the start."""
        n, prompts = len(self.variants), len(self.job.inputs)
        why = "; ".join(f"not {rung}: {reason}" for rung, reason in self.reasons.items() if reason)
        lines = [
            f"{n} variants of {prompts} prompt{'s' * (prompts > 1)}, {self.job.length} tokens"
            + " each" * (prompts > 1),
            f"executor: {self.rung.name} ({why or 'equal to plain runs on this model'})",
            f"batches: {len(list(self.chunks(self.variants)))} within {self.memory / 2**20:.0f} MiB",
            f"cost: at most {self.cost:.1f} plain forward passes instead of {n}, by tokens computed",
            f"memory: about {said(self.peak)} beyond the weights at its peak",
            self.rung.note(self.job),
        ]
        return "\n".join(line for line in lines if line)

    # ---- doing it

    def run(self, on: Where | None = None) -> Sweep:
        """Execute what is not done yet, here or `on` workers. Interrupting (Ctrl-C) keeps finished batches on the plan and in
        the checkpoint."""
        where = on or _where.get()
        self.check_fits()
        with running(self.job.anatomy.module), progress[None](what="runs", total=len(self.variants)) as bar:
            self.read = self.rung.clean(self.job)
            clean = self.metric(self.read)
            self._resume(clean)
            bar.step(int(self.done.sum()))
            while not bool(self.done.all()):
                try:
                    todo = [v for v in self.variants if not self.done[v.index]]
                    for chunk, logits in self.here(todo) if where is None else where.run(self, todo):
                        which = [variant.index for variant in chunk]
                        self.values[which] = self._scored(logits).to(self.values)  # one wait
                        self.done[which] = True
                        if self.checkpoint is not None:
                            self.checkpoint.save(self.values, self.done, clean)
                        bar.step(len(chunk))
                except Wrong as error:
                    self.reasons[self.rung.name] = str(error)
                    self._choose()
        self.job.forget()
        return Sweep(self.values, clean.cpu(), self)  # where the values are

    def here(self, variants: Sequence[Variant]) -> Iterator[tuple[list[Variant], list[Tensor]]]:
        """Batches of variants, each with what the metric reads."""
        for chunk in self.chunks(variants):
            yield chunk, self._execute(chunk)

    def _execute(self, chunk: list[Variant]) -> list[Tensor]:
        return self.logits(chunk) if self._checked else self._run_and_check(chunk)

    def _scored(self, logits: Sequence[Tensor]) -> Tensor:
        """The metric of every variant of a batch."""
        together = getattr(self.metric, "each", None)  # one that knows how to take all at once
        made: Tensor = together(logits) if together else torch.stack([self.metric(read) for read in logits])
        return made

    def _resume(self, clean: Tensor) -> None:
        saved = self.checkpoint.load(clean) if self.checkpoint is not None else None
        if saved is not None:
            self.values, self.done = saved

    def settle(self) -> None:
        """Go on to the next rung until one agrees with a plain run on inputs of this size."""
        while not self._checked:
            try:
                self._run_and_check(next(self.chunks(self.variants))[:1])
            except Wrong as error:
                self.reasons[self.rung.name] = str(error)
                self._choose()

    def logits(self, chunk: list[Variant]) -> list[Tensor]:
        """What the metric reads of each variant of one of `chunks`, on the chosen rung."""
        return self.rung.run(self.job, chunk)

    def _run_and_check(self, chunk: list[Variant]) -> list[Tensor]:
        """The first batch of this size on this rung: one of its variants is run plainly beside it."""
        truth = self.job.plain(chunk[0])
        try:
            logits = self.logits(chunk)
            wrong = deviation(logits[0], truth, slack=10)
        except PellucidError:
            raise
        except Exception as error:
            wrong = f"failed on inputs of this size ({told(error)})"
        certified(self.job.anatomy).settle(self.rung, self.job.inputs, wrong)
        if wrong:
            raise Wrong(wrong)
        return logits

    @property
    def _checked(self) -> bool:
        return certified(self.job.anatomy).settled(self.rung, self.job.inputs) is not None

    def chunks(self, variants: Sequence[Variant]) -> Iterator[list[Variant]]:
        """Variants in batches within the memory budget, as the chosen rung runs them."""
        return self.rung.batches(self.job, variants, self.memory)


def plan_sweep(
    anatomy: Anatomy,
    inputs: Inputs,
    variants: Sequence[Edit | Sequence[Edit]],
    metric: Reads,
    memory: int | None = None,
    checkpoint: str | Path | None = None,
    rung: str | None = None,
    model: Any = None,
) -> Plan:
    """Choose the cheapest way that is known to be right for this model, these edits and this metric."""
    if not len(variants):
        raise InputError("a sweep needs at least one variant: give a list of edits (or of lists of edits)")
    ladder = [r for r in LADDER if rung in (None, r.name)]
    if not ladder:
        raise InputError(f"there is no executor {rung!r}{nearest(str(rung), [r.name for r in LADDER])}")
    prepared = [prepare(anatomy, inputs, i, v) for i, v in enumerate(variants)]
    kept = None
    if checkpoint is not None:
        edits = [[(str(w.spot.site), w.edit) for w in v.writers] for v in prepared]
        ids = [(s.ids, s.mask) for s in inputs.streams.values()]
        kept = Checkpoint(Path(checkpoint), fingerprint(edits, ids, metric))
    job = Job(anatomy, inputs, metric, lambda: certified(anatomy).shapes)
    return Plan(job, prepared, ladder, memory or default_memory(anatomy), kept, model)
