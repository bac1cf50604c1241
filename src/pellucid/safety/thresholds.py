"""From which score on is it an alarm? A threshold from benign conversations, and what it promises.

    average      tau = s_(k), k = ceil((n + 1)(1 - alarms)), of the n sorted scores: split conformal (Vovk et al. 2005).
                 The chance that a new benign conversation scores above tau is at most `alarms`, on average over such sets
    confidence   tau = s_(n - k) with the most k for which the exact upper bound on a rate with k events in n is at most
                 `alarms` (Clopper and Pearson 1934): at most 1 - confidence of such sets give a higher rate

An alarm is a score above tau. The unit is the conversation (or a group of them, whose largest score counts): tokens of one
conversation are no independent evidence. A quantile of the n scores promises less than it says (with n = 100 "1 %" is 1.9 %
on average), so there is none here. A rate that n conversations cannot support is an error that says how many could.
Both promises hold for traffic like that of the set, and for no other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pellucid.errors import InputError, among
from pellucid.statistics import binomial_bound

Promise = Literal["average", "confidence"]


@dataclass(frozen=True)
class Threshold:
    """A score from which on it is an alarm (`value`, itself excluded), and what that rests on: at most a share `alarms` of
    benign conversations, by `promise` (with `confidence`), from `n` benign ones of which `above` lay above it. `tokens` is how long the answers
    were allowed to be that the model wrote for it (0: replies were given, or none read): a longer answer has more tokens to fire at."""

    value: float
    alarms: float
    promise: Promise = "average"
    confidence: float = 0.95
    n: int = 0
    above: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        sure = "on average" if self.promise == "average" else f"with {self.confidence:.0%} confidence"
        long = f" of up to {self.tokens} tokens" if self.tokens else ""
        return f"{self.value:.4g} (at most {self.alarms:.3g} of benign conversations, {sure}; from {self.n}{long})"


def needed(alarms: float, promise: Promise = "average", confidence: float = 0.95) -> int:
    """How many benign conversations a rate of false alarms takes at least.

    >>> needed(0.01), needed(0.01, "confidence"), needed(0.05), needed(0.05, "confidence")
    (99, 299, 19, 59)
    """
    if not among(promise, Promise):
        raise InputError(f"promise={promise!r}: expected 'average' or 'confidence'")
    if not (isinstance(alarms, int | float) and 0 < alarms < 1 and 0 < confidence < 1):
        raise InputError(f"alarms={alarms!r}, confidence={confidence!r}: expected shares between 0 and 1")
    if promise == "average":
        return math.ceil(1 / alarms - 1 - 1e-9)
    return math.ceil(math.log(1 - confidence) / math.log(1 - alarms) - 1e-9)


def threshold(
    scores: Any,
    alarms: float = 0.05,
    *,
    promise: Promise = "average",
    confidence: float = 0.95,
    groups: Any = None,
) -> Threshold:
    """The lowest threshold that keeps its promise, from the `scores` [conversation] of benign conversations.

    `groups` [conversation] says which of them belong together (a user, a topic): then a group is the unit, by its largest
    score. InputError where there are too few, which names the number needed, and for scores that are no numbers.

    >>> threshold(range(99), 0.01).value
    98.0
    >>> threshold(range(98), 0.01)
    Traceback (most recent call last):
    pellucid.errors.InputError: 98 benign conversations cannot support 0.01 false alarms on average: that takes 99 ...
    """
    s = np.asarray(scores if hasattr(scores, "__array__") else list(scores), dtype=float)
    if s.ndim != 1 or np.isnan(s).any():
        raise InputError(
            f"scores of shape {list(s.shape)}, {int(np.isnan(s).sum())} of them missing: expected one number each"
        )
    what = "conversations"
    if groups is not None:
        names, which = np.unique(np.asarray(groups), return_inverse=True)
        if len(which) != len(s):
            raise InputError(f"{len(which)} groups for {len(s)} scores: give one for each")
        most = np.full(len(names), -np.inf)
        np.maximum.at(most, which, s)
        s, what = most, "groups of conversations"
    s, n = np.sort(s), len(s)
    least = needed(alarms, promise, confidence)
    if n < least:
        sure = "on average" if promise == "average" else f"with {confidence:.3g} confidence"
        raise InputError(
            f"{n} benign {what} cannot support {alarms:.3g} false alarms {sure}: that takes {least} at least; give more, or "
            "allow more alarms"
        )
    if promise == "average":
        above = n - math.ceil((n + 1) * (1 - alarms) - 1e-9)
    else:
        above = int((binomial_bound(np.arange(n), n, confidence) <= alarms).sum()) - 1
    return Threshold(float(s[n - 1 - above]), float(alarms), promise, float(confidence), n, above)


def rate(events: np.ndarray, level: float = 0.95) -> tuple[float, float, float, int]:
    """A share with the ends of its exact interval (Clopper and Pearson 1934), and of how many.

    >>> [round(x, 3) for x in rate(np.array([True] + [False] * 56))]
    [0.018, 0.0, 0.094, 57]
    """
    k, n, each = int(np.sum(events)), len(events), (1 + level) / 2
    low, high = (float(binomial_bound(k, n, each, side=side)) for side in ("lower", "upper"))
    return (k / n if n else float("nan")), low, high, n
