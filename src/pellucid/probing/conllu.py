"""Sentences of a Universal Dependencies treebank, read from CoNLL-U, and what probes ask of them.

Ten columns separated by tabs, a blank line after a sentence, `#` before comments. The words that count are those
numbered 1, 2, ...: ranges (3-4, words written as one) say what is written, empty nodes (5.1) are left out. Each word
knows its characters in the running text; where the words of a range cannot be found in it one after the other, each has
all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pellucid.errors import InputError
from pellucid.probing.examples import Examples, Spans


@dataclass(frozen=True)
class Word:
    """One word: its form, its characters in the sentence's text, and its analysis. `head` counts from 1; 0 is the root."""

    form: str
    start: int
    stop: int
    lemma: str
    upos: str
    xpos: str
    head: int
    deprel: str


@dataclass(frozen=True)
class Sentence:
    """A text and its words in order."""

    text: str
    words: tuple[Word, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Treebank:
    """Sentences and the questions they answer; all questions share `spans`, the words.

    >>> lines = ["1 Dogs dog NOUN NNS _ 2 nsubj _ _", "2 bark bark VERB VBP _ 0 root _ SpaceAfter=No", "3 . . PUNCT . _ 2 punct _ _"]
    >>> bank = Treebank.parse(chr(10).join(lines).replace(" ", chr(9)))
    >>> bank.sentences[0].text, bank.tags().labels.tolist(), bank.relations().labels.tolist()
    ('Dogs bark.', ['NOUN', 'VERB', 'PUNCT'], ['nsubj', 'punct'])
    """

    sentences: tuple[Sentence, ...]

    def __repr__(self) -> str:
        return f"<Treebank of {len(self.sentences):,} sentences, {sum(len(s.words) for s in self.sentences):,} words>"

    @classmethod
    def read(cls, path: str | Path, limit: int | None = None, words: tuple[int, int] = (1, 60)) -> Treebank:
        """The first `limit` sentences of a file that have `words[0]` to `words[1]` words. InputError if there are none."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {str(path)!r} as CoNLL-U: {error}") from None
        return cls.parse(text, limit, words)

    @classmethod
    def parse(cls, text: str, limit: int | None = None, words: tuple[int, int] = (1, 60)) -> Treebank:
        """The same of a text in memory."""
        found: list[Sentence] = []
        block: list[str] = []
        for number, line in enumerate([*text.splitlines(), ""], 1):
            if line.strip():
                block.append(line)
            elif block:
                sentence = _sentence(block, number - len(block))
                block = []
                if words[0] <= len(sentence.words) <= words[1]:
                    found.append(sentence)
                if limit is not None and len(found) == limit:
                    break
        if not found:
            raise InputError(f"no sentence of {words[0]} to {words[1]} words was found: expected CoNLL-U")
        return cls(tuple(found))

    def __len__(self) -> int:
        return len(self.sentences)

    @cached_property
    def spans(self) -> Spans:
        """Every word of every sentence, in order."""
        where = tuple((i, w.start, w.stop) for i, s in enumerate(self.sentences) for w in s.words)
        return Spans(tuple(s.text for s in self.sentences), where)

    @cached_property
    def firsts(self) -> np.ndarray:
        """[sentence] the row of its first word among the spans."""
        return np.cumsum([0, *(len(s.words) for s in self.sentences)])[:-1]

    def tags(self, fine: bool = False) -> Examples:
        """The part of speech of every word: universal, or `fine`, the treebank's own."""
        labels = [w.xpos if fine else w.upos for s in self.sentences for w in s.words]
        return Examples(self.spans, labels, types=self._types(), name="part of speech")

    def relations(self, subtypes: bool = False) -> Examples:
        """What a word is to its head, given both: pairs (word, head). Roots have no head and are left out."""
        rows = [
            (int(first) + i, int(first) + w.head - 1, w.deprel)
            for first, s in zip(self.firsts, self.sentences, strict=True)
            for i, w in enumerate(s.words)
            if w.head
        ]
        word, head = [row[0] for row in rows], [row[1] for row in rows]
        labels = [row[2] if subtypes else row[2].partition(":")[0] for row in rows]
        return Examples(self.spans, labels, word, head, self._types()[word], "dependency relation")

    def arcs(self, seed: int = 0) -> Examples:
        """Whether the second word of a pair is the head of the first: each word with its head, and with another word
        of its sentence at random (Liu et al. 2019). Sentences of less than three words have no other word."""
        rng = np.random.default_rng(seed)
        first, second, labels = [], [], []
        for start, sentence in zip(self.firsts.tolist(), self.sentences, strict=True):
            n = len(sentence.words)
            for i, word in enumerate(sentence.words):
                if not word.head or n < 3:
                    continue
                other = int(rng.choice([j for j in range(n) if j not in (i, word.head - 1)]))
                first += [start + i] * 2
                second += [start + word.head - 1, start + other]
                labels += ["head", "other"]
        return Examples(self.spans, labels, first, second, name="dependency arc")

    def _types(self) -> np.ndarray:
        return np.array([w.form.lower() for s in self.sentences for w in s.words])


def _sentence(block: list[str], line: int) -> Sentence:
    """One sentence from its lines; `line` is the number of the first."""
    given = next((x.partition("=")[2].strip() for x in block if x.startswith("# text =")), None)
    rows: list[list[str]] = []
    for offset, raw in enumerate(block):
        if raw.startswith("#"):
            continue
        columns = raw.strip("\n").split("\t")
        if len(columns) != 10:
            raise InputError(
                f"line {line + offset} is no CoNLL-U: expected 10 columns separated by tabs, got {len(columns)}"
            )
        rows.append(columns)
    text, at = given or _written(rows), 0
    words: list[Word] = []
    inside: tuple[int, int, int] | None = None  # the last word of the range we are in, and its characters
    for columns in rows:
        name, form = columns[0], columns[1]
        if "." in name:
            continue
        if "-" in name:
            start, at = _find(text, form, at, line)
            inside = (int(name.partition("-")[2]), start, at)
            part = start
            continue
        if inside is not None and int(name) <= inside[0]:
            found = text.find(form, part, inside[2])
            start, stop = (found, found + len(form)) if found >= 0 else inside[1:]
            part = stop if found >= 0 else part
        else:
            start, stop = _find(text, form, at, line)
            at, inside = stop, None
        try:
            head = int(columns[6])
        except ValueError:
            raise InputError(
                f"the word {form!r} of the sentence at line {line} has the head {columns[6]!r}: expected a number"
            ) from None
        words.append(Word(form, start, stop, columns[2], columns[3], columns[4], head, columns[7]))
    if any(not 0 <= word.head <= len(words) for word in words):
        raise InputError(f"the sentence at line {line} has a head outside its {len(words)} words")
    return Sentence(text, tuple(words))


def _find(text: str, form: str, at: int, line: int) -> tuple[int, int]:
    start = text.find(form, at)
    if start < 0:
        raise InputError(f"the word {form!r} is not in the text of the sentence at line {line}: {text!r}")
    return start, start + len(form)


def _written(rows: Iterable[list[str]]) -> str:
    """The running text as forms and SpaceAfter=No give it."""
    text, until = "", 0
    for columns in rows:
        name = columns[0]
        if "." in name or ("-" not in name and int(name) <= until):
            continue
        if "-" in name:
            until = int(name.partition("-")[2])
        text += columns[1] + ("" if "SpaceAfter=No" in columns[9].split("|") else " ")
    return text.rstrip()
