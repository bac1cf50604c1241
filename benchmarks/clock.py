"""What does this cost in plain passes? Process CPU time, each piece of work between two plain passes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile


class Cost(NamedTuple):
    """In plain passes: the median repetition, the cheapest and the dearest."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:6.2f} [{self.lowest:.2f}, {self.highest:.2f}]"


def cpu(work: Callable[[], Any]) -> float:
    """Seconds of CPU."""
    start = time.process_time()
    work()
    return time.process_time() - start


def beside(plain: Callable[[], Any], work: Callable[[], Any], repetitions: int) -> Cost:
    """What `work` costs in plain passes measured just before and after it; both are run once before that."""
    plain(), work()
    ratios = []
    for _ in range(repetitions):
        before = cpu(plain)
        spent = cpu(work)
        ratios.append(spent / ((before + cpu(plain)) / 2))
    return Cost(statistics.median(ratios), min(ratios), max(ratios))


def allocated(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of CPU memory at the peak of `work`, and what it returned still holds, both above what was there."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        made = work()
        gc.collect()
    steps = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = peak = 0
    for step in sorted((s for s in steps if s.name() == "[memory]"), key=lambda s: s.start_ns()):
        now += step.nbytes()
        peak = max(peak, now)
    del made
    return peak, now
