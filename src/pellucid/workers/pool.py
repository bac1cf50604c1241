"""The pieces of an errand over several workers: the batches of a sweep, the shards of a corpus ...

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
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
from pellucid.workers.errand import Errand
from pellucid.workers.lanes import Died, Lane, ProcessLane, Reply

TRIES = 3
AHEAD = 3  # pieces for each worker, that are given out before the first of them is done

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
        dearest = sorted(plan.chunks(variants), key=lambda batch: -sum(plan.rung.cost(plan.job, v) for v in batch))
        for number, _, found in self.spread(job.sweep(plan), [[v.index for v in batch] for batch in dearest]):
            yield dearest[number], list(found["read"])

    def spread(
        self, errand: Errand, pieces: Iterable[Any], ahead: bool = False
    ) -> Iterator[tuple[int, Any, dict[str, Tensor]]]:
        """The number of each piece, the piece, and what a worker found, as they are done; with `ahead` no worker goes further ahead
        of the slowest than a few pieces. See `pellucid.workers.errand.done`, which has them in order.
        """
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            recipe = job.recipe(errand.model, folder)
            job.write(errand, folder / job.FILE)
            task = _Task(self, errand.here, recipe, folder)
            with ThreadPoolExecutor(len(self.lanes)) as threads:
                yield from self._spread(threads, task, iter(pieces), AHEAD * len(self.lanes) if ahead else sys.maxsize)

    def _spread(
        self, threads: ThreadPoolExecutor, task: _Task, pieces: Iterator[Any], window: int
    ) -> Iterator[tuple[int, Any, dict[str, Tensor]]]:
        free, tries = list(range(len(self.lanes))), Counter[int]()
        open_: dict[Future[dict[str, Tensor]], tuple[int, int]] = {}
        held: dict[int, Any] = {}  # pieces that are not done
        again: list[int] = []
        given, ended = 0, False
        try:
            while True:
                while free and (again or (not ended and given - min(held, default=given) < window)):
                    if again:
                        which = again.pop(0)
                    else:
                        which = given
                        try:
                            held[which] = next(pieces)
                        except StopIteration:
                            ended = True
                            continue
                        given += 1
                    lane = free.pop(0)
                    open_[threads.submit(task.run, lane, held[which])] = lane, which
                if not open_:
                    break
                done, _ = wait(open_, return_when=FIRST_COMPLETED)
                for future in done:
                    lane, which = open_.pop(future)
                    free.append(lane)
                    try:
                        found = future.result()
                    except Died as error:
                        tries[which] += 1
                        if tries[which] == TRIES:
                            said = f": {error}" if str(error) else ""
                            raise PellucidError(
                                f"a worker died {TRIES} times over the same batch{said}. What was done before is kept; give it "
                                "less at a time (memory=), or look at what it needs"
                            ) from error
                        again.insert(0, which)
                        continue
                    yield which, held.pop(which), found
        finally:  # interrupted, or an error: whoever is still at it would answer nobody
            for lane, _ in open_.values():
                self.lanes[lane].stop()


class _Task:
    """An errand as the workers are given it."""

    def __init__(self, pool: Pool, here: dict[str, Tensor], recipe: dict[str, Any], folder: Path) -> None:
        self.pool, self.here, self.recipe, self.folder = pool, here, recipe, folder
        self.name = uuid4().hex

    def run(self, number: int, piece: Any) -> dict[str, Tensor]:
        """What a worker finds in one piece."""
        if self.pool.lanes[number].at != self.name:
            self._begin(number)
        _, found = self._ask(number, do="run", piece=piece)
        return found

    def _begin(self, number: int) -> None:
        device, threads = self.pool.devices[number], self.pool.threads
        said, _ = self._ask(number, do="open", recipe=self.recipe, device=device, threads=threads)
        for name, ours in (("transformers", transformers.__version__), ("torch", torch.__version__)):
            if said[name] != ours:
                raise InputError(
                    f"a worker has {name} {said[name]}, and here it is {ours}: install the same everywhere"
                )
        _, found = self._ask(number, do="begin", device=device)
        for name, ours in self.here.items():
            if wrong := deviation(found[name].cpu(), ours.cpu(), slack=10):
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
