"""To what is credit given? Tokens, words, sentences, or spans the caller names.

A player is a set of token positions that are present or absent together. Additive attributions of tokens are summed
over a player; in a game a player is one move. Tokens that are fixed (special ones, padding) belong to none. Players are cut
in the text as it was typed, and mapped to tokens by the characters each stands for (`pellucid.engine.text_map`).
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pellucid.attribution.case import Case
from pellucid.engine.text_map import joined, occurrences
from pellucid.errors import InputError, nearest

UNITS = ("token", "word", "sentence")
INNER = "'’-"  # joins two letters to one word, as "." and "," do two digits
ENDS, STOPS, CLOSING = (
    ".!?…।॥",
    "。！？｡",
    "\"'”’)]」』）",
)  # of sentences: before a space; anywhere; what still belongs to them
SHORT = frozenset(
    [
        "al",
        "approx",
        "ca",
        "cf",
        "dr",
        "e.g",
        "eg",
        "etc",
        "fig",
        "i.e",
        "ie",
        "inc",
        "jr",
        "ltd",
        "mr",
        "mrs",
        "ms",
        "no",
        "p",
        "pp",
        "prof",
        "sr",
        "st",
        "vs",
        "z.b",
        "u.s",
    ]
)


@dataclass(frozen=True)
class Players:
    """Who plays: `labels` and the token positions (`members`) of each player; `unit` says what they are."""

    unit: str
    labels: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, case: Case, units: Any = "token") -> Players:
        """The players of a case. `units` is "token", "word" (a word with its subwords, a punctuation mark), "sentence", or a
        list of spans: texts as they stand in the prompt (all their occurrences together), compiled regular expressions
        (all matches together), slices of characters, [first, stop) token positions, or "@" and what a site's `@` takes
        ("@user[0]": what a role said in a conversation). What no span names is always present.

        InputError for an unknown unit, a text that is not in the prompt, or spans that overlap.
        """
        if isinstance(units, str) and units not in UNITS:
            raise InputError(
                f"unknown players {units!r}: expected {', '.join(UNITS)} or a list of spans{nearest(units, UNITS)}"
            )
        if not isinstance(units, str) and (not isinstance(units, list | tuple) or not units):
            raise InputError(
                f"players={units!r}: expected {', '.join(map(repr, UNITS))}, or a list of spans such as ['France', (0, 3)]"
            )
        free = [i for i in range(len(case.tokens)) if not case.fixed[i]]
        if not free:
            raise InputError(f"the prompt has no tokens to give credit to, only special ones: {_shown(case)}")
        if units == "token":
            return cls("token", tuple(case.tokens[i] for i in free), tuple((i,) for i in free))
        if isinstance(units, str):
            return cls._cut(case, units, set(free))
        return cls._spans(case, units, set(free))

    @classmethod
    def _cut(cls, case: Case, unit: str, free: set[int]) -> Players:
        """By the text as it was typed: a token goes where its first letter is."""
        members: list[list[int]] = []
        labels: list[str] = []
        for text, places in _streams(case):
            pieces = words(text) if unit == "word" else sentences(text)
            groups: dict[tuple[int, int], list[int]] = {}
            ends, parted = [stop for _, stop in pieces], 0
            for position, (start, stop) in places.items():
                if position not in free:
                    parted += (
                        start == stop
                    )  # a mark that is no part of the text: what stands before and behind it is apart
                    continue
                first = start + len(text[start:stop]) - len(text[start:stop].lstrip())
                first = first if first < stop else start
                groups.setdefault((bisect_right(ends, first), parted), []).append(position)
            for (n, _), group in groups.items():
                start = pieces[n][0] if n < len(pieces) else places[group[0]][0]
                stop = max(places[group[-1]][1], min(ends[n], places[group[-1]][1]) if n < len(pieces) else 0)
                members.append(group)
                labels.append(text[min(start, stop) : stop].strip() or "".join(case.tokens[i] for i in group) or " ")
        return cls(unit, tuple(labels), tuple(map(tuple, members)))

    @classmethod
    def _spans(cls, case: Case, spans: Sequence[Any], free: set[int]) -> Players:
        members = [_find(case, span) for span in spans]
        taken = [i for group in members for i in group]
        if len(set(taken)) < len(taken):
            twice = next(i for i in taken if taken.count(i) > 1)
            raise InputError(f"the spans overlap: two of them have the token {case.tokens[twice]!r}")
        for span, group in zip(spans, members, strict=True):
            if not group or not free.issuperset(group):
                raise InputError(f"the span {span!r} has no tokens of the text, which are {_shown(case)}")
        labels = (
            span.strip()
            if isinstance(span, str) and not span.startswith("@")
            else "".join(case.tokens[i] for i in group).strip()
            for span, group in zip(spans, members, strict=True)
        )
        return cls("span", tuple(labels), tuple(members))

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


# ---- tokens in the text as typed


def _streams(case: Case) -> Iterator[tuple[str, dict[int, tuple[int, int]]]]:
    """The text of each credited stream, and the characters that each of its tokens stands for, by position."""
    first = 0
    for stream, length in zip(case.streams.values(), case.lengths, strict=True):
        real = stream.mask[0].bool().nonzero().flatten().tolist()
        text = stream.maps[0]
        yield text.text, {first + i: at for i, at in zip(real, text.offsets, strict=True)}
        first += length


def _find(case: Case, span: Any) -> tuple[int, ...]:
    """The positions a span names: of a text or an expression every occurrence."""
    if isinstance(span, str) and len(span) > 1 and span[0] == "@":
        columns = case.inputs.stream(next(iter(case.streams))).find(span[1:])
        return tuple(range(len(case.tokens))) if columns is None else tuple(columns[0].tolist())
    if isinstance(span, str | re.Pattern | slice):
        found = [i for text, places in _streams(case) for i in _touched(places, _characters(text, span))]
        if not found:
            what = f"/{span.pattern}/" if isinstance(span, re.Pattern) else repr(span)
            raise InputError(f"the span {what} is not in the prompt; its tokens are {_shown(case)}")
        return tuple(found)
    pair = span.tolist() if hasattr(span, "tolist") else span
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(i, int) for i in pair):
        raise InputError(
            f"{span!r} is no span: expected a text of the prompt, a compiled expression, slice(3, 9) of characters, or "
            "the numbers of its (first, last + 1) tokens"
        )
    if not 0 <= pair[0] <= pair[1] <= len(case.tokens):
        raise InputError(f"the span {tuple(pair)} is outside the prompt, which has {len(case.tokens)} tokens")
    return tuple(range(*pair))


def _characters(text: str, span: str | re.Pattern[str] | slice) -> list[tuple[int, int]]:
    if isinstance(span, slice):
        start, stop, _ = span.indices(len(text))
        return [(start, stop)] if start < stop else []
    if isinstance(span, re.Pattern):
        return [m.span() for m in span.finditer(text) if m.end() > m.start()]
    found = list(occurrences(text, span.strip()))
    if not found and len(text.casefold()) == len(text):
        found = list(occurrences(text.casefold(), span.strip().casefold()))
    return [(a, b) for a, b in found if not (joined(text, a) or joined(text, b))] or found


def _touched(places: Mapping[int, tuple[int, int]], characters: Sequence[tuple[int, int]]) -> list[int]:
    return [i for i, (a, b) in places.items() if any(a < stop and b > start for start, stop in characters)]


def words(text: str) -> list[tuple[int, int]]:
    """The [start, stop) characters of words and of the marks between them, in any script that parts words by spaces; of
    Chinese and Japanese every character.

    >>> [text[a:b] for text in ["I don't: 3.6 नमस्ते!"] for a, b in words(text)]
    ['I', "don't", ':', '3.6', 'नमस्ते', '!']
    """
    found, start = list[tuple[int, int]](), 0
    while start < len(text):
        stop = start + 1
        while stop < len(text) and _goes_on(text, stop):
            stop += 1
        if not text[start].isspace():
            found.append((start, stop))
        start = stop
    return found


def _goes_on(text: str, at: int) -> bool:
    """Whether one word has the characters on both sides."""
    if joined(text, at):
        return not (_ideograph(text[at - 1]) or _ideograph(text[at])) or unicodedata.category(text[at])[0] == "M"
    for mark in (at - 1, at):  # don't, x-ray, 3.6
        if 0 < mark < len(text) - 1:
            around = text[mark - 1] + text[mark + 1]
            if (text[mark] in INNER and around.isalnum()) or (text[mark] in ".," and around.isdigit()):
                return True
    return False


def _ideograph(c: str) -> bool:
    return "\u3040" <= c <= "\u309f" or "\u3400" <= c <= "\u9fff" or "\U00020000" <= c <= "\U0003ffff"


def sentences(text: str) -> list[tuple[int, int]]:
    """The [start, stop) characters of sentences: up to a mark that ends one, or a line's end.

    A point before a small letter, between digits, behind an initial or a usual abbreviation ends nothing.

    >>> [text[a:b].strip() for text in ["Dr. J. Doe has 3.6 m, e.g. here. 好。Yes!"] for a, b in sentences(text)]
    ['Dr. J. Doe has 3.6 m, e.g. here.', '好。', 'Yes!']
    """
    found, start = list[tuple[int, int]](), 0
    for m in re.finditer(rf"[{ENDS}{STOPS}]+[{re.escape(CLOSING)}]*|\n+", text):
        stop, mark = m.end(), m.group()
        if m.start() >= start and (mark[0] == "\n" or mark[0] in STOPS or _ended(text, m.start(), stop)):
            found.append((start, stop))
            start = stop
    found += [(start, len(text))] if text[start:].strip() else []
    return [(a, b) for a, b in found if text[a:b].strip()]


def _ended(text: str, at: int, stop: int) -> bool:
    """Whether marks [at, stop) end a sentence."""
    behind = text[stop:].lstrip()
    if stop < len(text) and not text[stop].isspace():
        return False
    if text[at:stop] != "." or not behind:
        return True
    before = re.split(r"[\s(\"'“‘]", text[:at])[-1]
    return not (behind[0].islower() or before.lower() in SHORT or (len(before) == 1 and before.isupper()))


def _shown(case: Case) -> str:
    return " ".join(map(repr, case.tokens))
