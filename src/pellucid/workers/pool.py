"""The batches of a sweep over several workers.

    with pl.on(pl.Processes(2)):                    # everything that sweeps
        pl.causal.patching(model, clean, corrupted, over="layers.*.resid_pre@*", metric=metric)
    model.sweep(prompt, variants, metric, on=pl.Devices("cuda:0", "cuda:1"))

The plan is made here, as ever: its rung, its batches, its checkpoint. Workers open the model themselves (the same files: the
digest is compared), run without edits what is run here (compared too), hold the first batch of every size against a plain run,
and send back the logits that the metric reads. The dearest batches go first, each to whoever is free, so that all end together;
the batch of a worker that dies is given to its successor, at most `TRIES` times. The batches, and so the numbers to the last bit, are those
of this process, whatever the number of workers.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import transformers
from torch import Tensor

from pellucid import errors
from pellucid.engine.packed import Variant
from pellucid.engine.sweep import Plan, Wrong
from pellucid.engine.trial import deviation
from pellucid.errors import InputError, PellucidError, Refused, at_least
from pellucid.workers import job
from pellucid.workers.lanes import Died, Lane, ProcessLane, Reply

TRIES = 3

Batch = list[Variant]


class Here:
    """This process."""

    def run(self, plan: Plan, variants: Sequence[Variant]) -> Iterator[tuple[Batch, list[Tensor]]]:
        return plan.here(variants)

    def __repr__(self) -> str:
        return "pl.Here()"


class Pool:
    """Workers that stay: a model is opened once by each. `close()` ends them, as the end of a `with` block or of the program does.

    `seconds` are those of CPU that they took, by what they did: "open" a model, "begin" a job, "run" its batches.
    """

    def __init__(self, lanes: Sequence[Lane], devices: Sequence[str | None], threads: int) -> None:
        self.lanes, self.devices, self.threads = list(lanes), list(devices), threads
        self.seconds: Counter[str] = Counter()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for lane in self.lanes:
            lane.stop()

    def run(self, plan: Plan, variants: Sequence[Variant]) -> Iterator[tuple[Batch, list[Tensor]]]:
        """Batches as they are done. Refused for what cannot travel; the error of a worker is raised here."""
        if plan.model is None:
            raise Refused("this sweep was planned without its model: plan it with model.plan")
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            recipe = job.recipe(plan.model, folder)
            job.write(plan, folder / "job.safetensors")
            task = _Task(self, plan, recipe, folder)
            with ThreadPoolExecutor(len(self.lanes)) as threads:
                dearest = sorted(
                    plan.chunks(variants), key=lambda batch: -sum(plan.rung.cost(plan.job, v) for v in batch)
                )
                yield from self._spread(threads, task, dearest)

    def _spread(
        self, threads: ThreadPoolExecutor, task: _Task, batches: list[Batch]
    ) -> Iterator[tuple[Batch, list[Tensor]]]:
        free, tries = list(range(len(self.lanes))), dict.fromkeys(range(len(batches)), 0)
        open_: dict[Future[list[Tensor]], tuple[int, int]] = {}
        left = list(tries)
        try:
            while left or open_:
                while left and free:
                    lane, which = free.pop(0), left.pop(0)
                    open_[threads.submit(task.run, lane, batches[which])] = lane, which
                done, _ = wait(open_, return_when=FIRST_COMPLETED)
                for future in done:
                    lane, which = open_.pop(future)
                    free.append(lane)
                    try:
                        logits = future.result()
                    except Died as error:
                        tries[which] += 1
                        if tries[which] == TRIES:
                            said = f": {error}" if str(error) else ""
                            raise PellucidError(
                                f"a worker died {TRIES} times over the same batch{said}. What was done before is kept; give it "
                                "less at a time (memory=), or look at what it needs"
                            ) from error
                        left.insert(0, which)
                        continue
                    yield batches[which], logits
        finally:  # interrupted, or an error: whoever is still at it would answer nobody
            for lane, _ in open_.values():
                self.lanes[lane].stop()


class _Task:
    """A job as the workers are given it."""

    def __init__(self, pool: Pool, plan: Plan, recipe: dict[str, Any], folder: Path) -> None:
        self.pool, self.plan, self.recipe, self.folder = pool, plan, recipe, folder
        self.name = uuid4().hex
        self.clean = plan.read.detach().cpu()

    def run(self, number: int, batch: Batch) -> list[Tensor]:
        """What a worker reads of the variants of one batch."""
        if self.pool.lanes[number].at != self.name:
            self._begin(number)
        _, found = self._ask(number, do="run", variants=[v.index for v in batch])
        return list(found["read"])

    def _begin(self, number: int) -> None:
        device, threads = self.pool.devices[number], self.pool.threads
        said, _ = self._ask(number, do="open", recipe=self.recipe, device=device, threads=threads)
        for name, ours in (("transformers", transformers.__version__), ("torch", torch.__version__)):
            if said[name] != ours:
                raise InputError(
                    f"a worker has {name} {said[name]}, and here it is {ours}: install the same everywhere"
                )
        _, found = self._ask(number, do="begin", rung=self.plan.rung.name)
        if wrong := deviation(found["clean"], self.clean, slack=10):
            raise InputError(
                f"a worker's run without edits {wrong.replace('plain runs', 'the one here')}: what is different there?"
            )
        self.pool.lanes[number].at = self.name

    def _ask(self, number: int, **request: Any) -> Reply:
        about, tensors = self.pool.lanes[number].ask({**request, "job": self.name}, self.folder)
        if "wrong" in about:
            raise Wrong(about["wrong"])
        if "error" in about:
            kind = getattr(errors, about["kind"], PellucidError)
            raise kind(f"a worker could not go on: {about['error']}")
        self.pool.seconds[request["do"]] += about["seconds"]
        return about, tensors


class Processes(Pool):
    """`n` processes of this machine, which share its cores.

    >>> Processes(2)
    pl.Processes(2)
    """

    def __init__(self, n: int) -> None:
        at_least(1, n=n)
        super().__init__([ProcessLane() for _ in range(n)], [None] * n, max(1, torch.get_num_threads() // n))

    def __repr__(self) -> str:
        return f"pl.Processes({len(self.lanes)})"


class Devices(Pool):
    """One process and one copy of the model on each of these devices.

    >>> Devices("cuda:0", "cuda:1")
    pl.Devices('cuda:0', 'cuda:1')
    """

    def __init__(self, *names: str) -> None:
        if not names:
            raise InputError("which devices? name some, such as pl.Devices('cuda:0', 'cuda:1')")
        threads = max(1, (os.cpu_count() or 1) // len(names))
        super().__init__([ProcessLane() for _ in names], names, threads)

    def __repr__(self) -> str:
        return f"pl.Devices({', '.join(map(repr, self.devices))})"
