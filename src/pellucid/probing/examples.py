"""What is a probe asked? Labelled places in texts: words, spans, pairs of spans, whole sentences.

`Spans` are places, read from a model once; `Examples` put labels on them, singly or in pairs, so that many questions
share the same reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from pellucid.errors import InputError, one_of


@dataclass(frozen=True, eq=False, repr=False)
class Spans:
    """Places in texts: `where` are (text, first character, last character + 1).

    >>> words = Spans.words(["The cat sat", ["do", "n't", "stop"]])
    >>> words.texts, words.surface(4)
    (('The cat sat', "do n't stop"), "n't")
    """

    texts: tuple[str, ...]
    where: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if not self.where:
            raise InputError("there is no span to read: give at least one (text, first character, last character + 1)")
        for text, start, stop in self.where:
            if not 0 <= text < len(self.texts) or not 0 <= start < stop <= len(self.texts[text]):
                raise InputError(
                    f"the span {(text, start, stop)} lies outside the {len(self.texts)} texts, or is empty: expected "
                    "(text, first character, last character + 1)"
                )

    def __len__(self) -> int:
        return len(self.where)

    def __repr__(self) -> str:
        return f"<Spans: {len(self):,} in {len(self.texts):,} texts>"

    @classmethod
    def words(cls, texts: Iterable[str | Sequence[str]]) -> Spans:
        """Every word of texts that are split at spaces, or given word by word (they are joined with a space)."""
        joined, where = [], []
        for i, given in enumerate(texts):
            words = given.split() if isinstance(given, str) else list(given)
            at = 0
            for word in words:
                where.append((i, at, at + len(word)))
                at += len(word) + 1
            joined.append(" ".join(words))
        return cls(tuple(joined), tuple(where))

    @classmethod
    def whole(cls, texts: Iterable[str]) -> Spans:
        """Each text as one span."""
        texts = tuple(texts)
        return cls(texts, tuple((i, 0, len(text)) for i, text in enumerate(texts)))

    def surface(self, i: int) -> str:
        """What stands there."""
        text, start, stop = self.where[i]
        return self.texts[text][start:stop]

    @cached_property
    def text_of(self) -> np.ndarray:
        """[span] which text each lies in."""
        return np.array([text for text, _, _ in self.where])


def known(labels: Any) -> np.ndarray:
    """Labels as an array. InputError that names the first row without one: None, NaN, an infinite number."""
    given = list(labels.tolist() if isinstance(labels, torch.Tensor) else labels)
    for row, label in enumerate(given):
        gone = label is None or type(label).__name__ in ("NAType", "NaTType")
        if gone or (isinstance(label, float | np.floating) and not np.isfinite(label)):
            raise InputError(f"row {row} has no label ({label!r}): leave it out")
    return np.asarray(given)


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """Labels on spans. `first` [n] (and `second` [n], for pairs) are rows of `spans`, `types` [n] what an example is
    an instance of (by default the lower-cased word, or pair of words): what must not leak, and what control tasks
    label. `labels` are text or truth values (classes) or numbers (regression); numbers are classes only if `kind` is
    "classes". InputError for a missing one, which names its row.

    >>> tags = Examples(Spans.words(["the cat", "the dog"]), ["DET", "NOUN", "DET", "NOUN"])
    >>> tags.classes, tags.types.tolist(), tags.texts.tolist()
    (('DET', 'NOUN'), ['the', 'cat', 'the', 'dog'], [0, 0, 1, 1])
    """

    spans: Spans
    labels: Any
    first: Any = None
    second: Any = None
    types: Any = None
    name: str = "label"
    kind: Literal["classes", "numbers"] | None = None

    def __post_init__(self) -> None:
        if self.kind is not None:
            one_of(self.kind, Literal["classes", "numbers"], "kind=")
        labels = known(self.labels)
        numeric = labels.dtype.kind in "iuf" if self.kind is None else self.kind == "numbers"
        labels = labels.astype(float if numeric else str)
        first = np.arange(len(self.spans)) if self.first is None else np.asarray(self.first, dtype=int)
        second = None if self.second is None else np.asarray(self.second, dtype=int)
        types = self._words(first, second) if self.types is None else np.asarray(self.types).astype(str)
        for what, rows in (("labels", labels), ("second spans", second), ("types", types)):
            if rows is not None and rows.shape != first.shape:
                raise InputError(f"{len(first)} examples but {list(rows.shape)} {what}: expected one for each")
        if not len(first):
            raise InputError("there is no example: give at least one span with its label")
        for key, rows in (("labels", labels), ("first", first), ("second", second), ("types", types)):
            object.__setattr__(self, key, rows)

    def _words(self, first: np.ndarray, second: np.ndarray | None) -> np.ndarray:
        def word(i: int) -> str:
            return self.spans.surface(i).lower()

        if second is None:
            return np.array([word(i) for i in first])
        return np.array([f"{word(i)} {word(j)}" for i, j in zip(first, second, strict=True)])

    def __len__(self) -> int:
        return len(self.first)

    def __repr__(self) -> str:
        asked = "numbers" if self.numeric else f"{len(self.classes)} classes"
        return f"<Examples of {self.name!r}: {len(self):,} in {len(self.spans.texts):,} texts, {asked}>"

    @property
    def numeric(self) -> bool:
        return bool(self.labels.dtype.kind == "f")

    @cached_property
    def classes(self) -> tuple[str, ...]:
        if self.numeric:
            raise InputError(f"{self.name!r} has numbers for labels: give text, or kind='classes'")
        return tuple(np.unique(self.labels).tolist())

    @cached_property
    def targets(self) -> np.ndarray:
        """[n] the labels as indices into `classes`."""
        return np.searchsorted(np.array(self.classes), self.labels)

    @cached_property
    def texts(self) -> np.ndarray:
        """[n] which text each example lies in."""
        return self.spans.text_of[self.first]

    def __getitem__(self, rows: Any) -> Examples:
        """Some of the examples, on the same spans."""
        second = None if self.second is None else self.second[rows]
        return replace(self, labels=self.labels[rows], first=self.first[rows], second=second, types=self.types[rows])

    def relabelled(self, labels: Any, name: str | None = None) -> Examples:
        """The same places with other labels."""
        return replace(self, labels=labels, name=name or self.name)

    def sample(self, n: int, seed: int = 0) -> Examples:
        """At most `n` of the examples, whole texts at a time, so that what is left still splits by text."""
        texts, counts = np.unique(self.texts, return_counts=True)
        order = np.random.default_rng(seed).permutation(len(texts))
        kept = texts[order[np.cumsum(counts[order]) <= n]]
        if not len(kept):
            raise InputError(f"no text has as few as {n} examples: ask for more")
        return self[np.flatnonzero(np.isin(self.texts, kept))]
