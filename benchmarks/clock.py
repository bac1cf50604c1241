"""What does this cost in plain passes? Process CPU time, each piece of work between two plain passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple


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
