"""How many plain forwards does this cost? Process CPU time, beside a plain forward measured all along."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

_END = object()


@dataclass(frozen=True)
class Timing:
    """CPU time in plain forwards: the median repetition; quartiles over pieces (each times their number)."""

    cost: float
    low: float
    high: float
    repetitions: int
    plain_ms: float


def measure(
    work: Callable[[], Iterator[Any]],
    plain: Callable[[], Any],
    repetitions: int,
    seconds: float,
    between: int,
) -> tuple[Timing, list[Any]]:
    """Time all pieces that `work` yields, `repetitions` times or until `seconds` of CPU time are over.

    `plain` runs `between` times before and after each piece, so that a machine that slows down slows both
    alike. The first piece is run once beforehand, untimed. Returns the pieces of the last repetition too.
    """
    plain(), next(work())
    gc.collect()
    gc.freeze()
    costs: list[float] = []
    estimates: list[float] = []
    plains: list[float] = []
    started = time.process_time()
    while not costs or (len(costs) < repetitions and time.process_time() - started < seconds):
        steps, pieces, spent = work(), [], []
        beside = [[cpu(plain)[0] for _ in range(between)]]
        while True:
            took, piece = cpu(lambda steps=steps: next(steps, _END))
            if piece is _END:
                break
            spent.append(took)
            pieces.append(piece)
            beside.append([cpu(plain)[0] for _ in range(between)])
        here = [t for times in beside for t in times]
        costs.append(sum(spent) / median(here))
        around = [median(a + b) for a, b in pairwise(beside)]
        estimates += [len(spent) * t / p for t, p in zip(spent, around, strict=True)]
        plains += here
    low, _, high = quantiles(estimates, n=4) if len(estimates) > 1 else estimates * 3
    return Timing(median(costs), low, high, len(costs), 1e3 * median(plains)), pieces


def cpu(function: Callable[[], Any]) -> tuple[float, Any]:
    """Process CPU seconds, and what was returned."""
    start = time.process_time()
    value = function()
    return time.process_time() - start, value
