"""When is a row of token scores a case? A rule turns them into one statistic, token by token.

    max          m_t = max(m_{t-1}, s_t)
    mean         the mean of s_1 ... s_t
    first        s_1
    ema(a)       e_t = a s_t + (1 - a) e_{t-1},  e_1 = s_1: one odd token is not enough, and an old one is forgotten
    k_of(k, n)   the k-th largest of the last n scores: above a threshold when k of the last n are

A monitor fires when its statistic is above its threshold at any token, so the score of a conversation is the largest
statistic in it. That is what thresholds are set on: they promise something about conversations, not tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pellucid.errors import InputError, among, at_least

Kind = Literal["max", "mean", "first", "ema", "k_of"]


@dataclass(frozen=True)
class Rule:
    """A rule over tokens: `kind`, with the `weight` of the newest score in "ema", and `k` of the `last` in "k_of".

    >>> Rule("ema", weight=0.5).follow({}, np.array([[1.0, 3.0]]), np.array([[True, True]]))
    array([[1., 2.]])
    """

    kind: Kind = "max"
    weight: float = 0.3
    k: int = 1
    last: int = 1

    def __post_init__(self) -> None:
        if not among(self.kind, Kind):
            raise InputError(
                f"no rule {self.kind!r}: expected 'max', 'mean', 'first', safety.ema(.3) or safety.k_of(2, 5)"
            )
        at_least(1, k=self.k, last=self.last)
        if not 0 < self.weight <= 1 or self.k > self.last:
            raise InputError(
                f"{self}: expected a weight above 0 and at most 1, and k at most the number of the last tokens"
            )

    @classmethod
    def of(cls, given: Rule | str) -> Rule:
        """A rule as it is, or by its name."""
        if isinstance(given, Rule):
            return given
        if given in ("ema", "k_of"):
            raise InputError(f"the rule {given!r} has a number of its own: write safety.{given}(...)")
        return cls(given)  # type: ignore[arg-type]

    def follow(self, state: dict[str, Any], scores: np.ndarray, on: np.ndarray) -> np.ndarray:
        """[row, position] the statistic after each new position, NaN before a row has any; `on` says which positions
        count, `state` is what earlier calls left."""
        found = np.full(scores.shape, np.nan)
        now = state.setdefault("now", np.full(len(scores), np.nan))
        for t in range(scores.shape[1]):
            if on[:, t].any():
                now = state["now"] = np.where(on[:, t], self._next(state, now, scores[:, t], on[:, t]), now)
            found[:, t] = now
        return found

    def _next(self, state: dict[str, Any], now: np.ndarray, s: np.ndarray, on: np.ndarray) -> np.ndarray:
        fresh = np.isnan(now)
        if self.kind == "max":
            return np.fmax(now, s)
        if self.kind == "first":
            return np.where(fresh, s, now)
        if self.kind == "ema":
            return np.where(fresh, s, self.weight * s + (1 - self.weight) * now)
        if self.kind == "mean":
            n = state["n"] = state.get("n", np.zeros(len(s))) + on
            return np.where(fresh, s, now + (s - now) / np.maximum(n, 1))
        kept = state.get("kept", np.full((len(s), self.last), -np.inf))
        kept = state["kept"] = np.where(on[:, None], np.concatenate([kept[:, 1:], s[:, None]], 1), kept)
        return np.asarray(np.sort(kept, 1)[:, -self.k])


def ema(weight: float = 0.3) -> Rule:
    """The exponential average of the scores, the newest with this weight.

    >>> ema(0.3)
    Rule(kind='ema', weight=0.3, k=1, last=1)
    """
    return Rule("ema", weight=weight)


def k_of(k: int, last: int) -> Rule:
    """`k` of the `last` tokens above the threshold.

    >>> k_of(2, 5).last
    5
    """
    return Rule("k_of", k=k, last=last)
