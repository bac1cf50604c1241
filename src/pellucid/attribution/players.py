"""To what is credit given? Tokens, words, sentences, or spans the caller names.

A player is a set of token positions that are present or absent together. Additive attributions of tokens are summed
over a player; in a game a player is one move. Tokens that are fixed (special ones, padding) belong to none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pellucid.attribution.case import Case
from pellucid.errors import InputError, nearest

WORD = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]")
SENTENCE = re.compile(r"[^.!?\n]*(?:[.!?]+[\"'”’)]*|\n+|$)")
UNITS = ("token", "word", "sentence")


@dataclass(frozen=True)
class Players:
    """Who plays: `labels` and the token positions (`members`) of each player; `unit` says what they are."""

    unit: str
    labels: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, case: Case, units: str | Sequence[str | tuple[int, int]] = "token") -> Players:
        """The players of a case. `units` is "token", "word" (a word with its subwords, a punctuation mark),
        "sentence", or a list of spans: texts as they stand in the prompt (all their occurrences together) or
        [first, stop) token positions; what no span names is always present.

        InputError for an unknown unit, a text that is not in the prompt, or spans that overlap.
        """
        if isinstance(units, str) and units not in UNITS:
            raise InputError(
                f"unknown players {units!r}: expected {', '.join(UNITS)} or a list of spans{nearest(units, UNITS)}"
            )
        free = [i for i in range(len(case.tokens)) if not case.fixed[i]]
        if not free:
            raise InputError(f"the prompt has no tokens to give credit to, only special ones: {_shown(case)}")
        if units == "token":
            return cls("token", tuple(case.tokens[i] for i in free), tuple((i,) for i in free))
        if isinstance(units, str):
            return cls._cut(case, units, free)
        return cls._spans(case, units, set(free))

    @classmethod
    def _cut(cls, case: Case, unit: str, free: list[int]) -> Players:
        """By a pattern over the text between fixed tokens: a token goes where its first letter is."""
        members: list[list[int]] = []
        for run in _runs(case, free):
            text, starts = _text(case, run)
            ends = [m.end() for m in (WORD if unit == "word" else SENTENCE).finditer(text) if m.group().strip()]
            groups: dict[int, list[int]] = {}
            for i, start in zip(run, starts, strict=True):
                groups.setdefault(next((n for n, end in enumerate(ends) if start < end), len(ends)), []).append(i)
            members += groups.values()
        labels = tuple("".join(case.tokens[i] for i in group).strip() or " " for group in members)
        return cls(unit, labels, tuple(map(tuple, members)))

    @classmethod
    def _spans(cls, case: Case, spans: Sequence[str | tuple[int, int]], free: set[int]) -> Players:
        members = [_find(case, span) if isinstance(span, str) else tuple(range(*span)) for span in spans]
        taken = [i for group in members for i in group]
        if len(set(taken)) < len(taken):
            twice = next(i for i in taken if taken.count(i) > 1)
            raise InputError(f"the spans overlap: two of them have the token {case.tokens[twice]!r}")
        for span, group in zip(spans, members, strict=True):
            if not group or not free.issuperset(group):
                raise InputError(f"the span {span!r} has no tokens of the text, which are {_shown(case)}")
        return cls("span", tuple("".join(case.tokens[i] for i in g).strip() for g in members), tuple(members))

    def labelled(self, case: Case, values: Any) -> tuple[np.ndarray, tuple[str, ...] | None]:
        """Values [..., player] and the players' labels as a result shows them: for tokens [..., position], with nothing
        for those that are fixed, and no labels of their own."""
        values = np.asarray(values)
        if self.unit != "token":
            return values, self.labels
        spread = np.zeros((*values.shape[:-1], len(case.tokens)), values.dtype)
        spread[..., [i for (i,) in self.members]] = values
        return spread, None

    def pooled(self, case: Case, values: Any) -> tuple[np.ndarray, tuple[str, ...] | None]:
        """Additive values [..., position] summed over each player, and labels, as `labelled`; tokens stay as they are."""
        values = np.asarray(values)
        return (values, None) if self.unit == "token" else (self.pool(values), self.labels)

    def pool(self, values: np.ndarray) -> np.ndarray:
        """Sums over each player: [..., position] to [..., player]."""
        return np.stack([values[..., list(group)].sum(-1) for group in self.members], -1)


def _runs(case: Case, free: list[int]) -> list[list[int]]:
    """Free positions in stretches not parted by a fixed token or the end of a stream."""
    borders = set(np.cumsum(case.lengths).tolist())
    runs: list[list[int]] = []
    for i in free:
        if runs and runs[-1][-1] == i - 1 and i not in borders:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _text(case: Case, run: list[int]) -> tuple[str, list[int]]:
    """The text of a stretch, and where the first letter of every token stands in it."""
    text, starts = "", []
    for i in run:
        token = case.tokens[i]
        starts.append(len(text) + min(len(token) - len(token.lstrip()), max(0, len(token) - 1)))
        text += token
    return text, starts


def _find(case: Case, span: str) -> tuple[int, ...]:
    """Positions of every occurrence of a text."""
    text, owner = "", []
    for i, token in enumerate(case.tokens):
        text += token
        owner += [i] * len(token)
    wanted = span.strip()
    found = [m.span() for m in re.finditer(re.escape(wanted), text)] if wanted else []
    if not found:
        raise InputError(f"the span {span!r} is not in the prompt; its tokens are {_shown(case)}")
    return tuple(dict.fromkeys(i for a, b in found for i in owner[a:b]))


def _shown(case: Case) -> str:
    return " ".join(map(repr, case.tokens))
