"""What is a reader fitted on? Statements (or chats) that hold or do not, in topics and in pairs.

What belongs together never stands on both sides of a split: whole topics are held out where there are at least three, else whole
pairs. A statement in two topics or pairs, or given with both labels, is refused: it would be learnt in one and asked in the other.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pellucid.engine.given import Chat, is_messages
from pellucid.errors import InputError
from pellucid.probing.examples import known
from pellucid.probing.splits import folds

LEAST, SPEAKERS = 4, ("Alice: ", "Bob: ")


@dataclass(frozen=True, eq=False, repr=False)
class Statements:
    """`prompts` [n] (texts, chats, token ids) with truth values `labels` [n]; `topics` [n] and `pairs` [n] say what belongs
    together (one topic, everything by itself by default); `nuisances` by name [n]: what could be read instead.

    >>> Statements.paired(["Rome is in Italy"] * 1, ["Rome is in Spain"], ["cities"])
    <Statements: 2, 1 of them true, 1 topics, 1 pairs>
    """

    prompts: Sequence[Any]
    labels: Any
    topics: Any = None
    pairs: Any = None
    nuisances: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given, labels = list(self.prompts), known(self.labels).astype(bool)
        n = len(given)
        topics = np.full(n, "") if self.topics is None else known(self.topics).astype(str)
        pairs = np.arange(n) if self.pairs is None else np.unique(known(self.pairs), return_inverse=True)[1]
        nuisances = {name: known(v) for name, v in self.nuisances.items()}
        for what, rows in (("labels", labels), ("topics", topics), ("pairs", pairs), *nuisances.items()):
            if rows.shape != (n,):
                raise InputError(f"{n} statements but {list(rows.shape)} {what}: expected one for each")
        for side in (True, False):
            if int((labels == side).sum()) == 0:
                raise InputError(f"all {n} statements are {not side}: a reader needs both kinds")
        object.__setattr__(self, "prompts", tuple(map(_plain, given)))
        for key, value in (("labels", labels), ("topics", topics), ("pairs", pairs), ("nuisances", nuisances)):
            object.__setattr__(self, key, value)
        home: dict[str, tuple[Any, ...]] = {}
        for i, text in enumerate(map(repr, self.prompts)):
            here = (bool(labels[i]), str(topics[i]), -1 if self.loose else int(pairs[i]))
            if home.setdefault(text, here) != here:
                raise InputError(
                    f"{text:.80} stands here twice, as {home[text][:2]} and as {here[:2]}, or in two pairs: it would be "
                    "learnt on one side and asked on the other; keep one of them"
                )

    @classmethod
    def paired(
        cls,
        true: Iterable[Any],
        false: Iterable[Any],
        topics: Any = None,
        *,
        nuisances: Mapping[str, Any] | None = None,
    ) -> Statements:
        """Contrast pairs: `true[i]` and `false[i]` differ in what is asked; `topics` has one for each pair."""
        true, false = list(true), list(false)
        if len(true) != len(false):
            raise InputError(f"{len(true)} true and {len(false)} false statements: pairs need one of each")
        pair = np.tile(np.arange(len(true)), 2)
        topics = None if topics is None else np.tile(np.asarray(list(topics)).astype(str), 2)
        return cls([*true, *false], [True] * len(true) + [False] * len(false), topics, pair, nuisances or {})

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        pairs = len(self.couples[0])
        return (
            f"<Statements: {len(self)}, {int(self.labels.sum())} of them true, {len(set(self.topics))} topics, "
            f"{pairs} pairs>"
        )

    @property
    def loose(self) -> bool:
        """Whether every statement is a pair by itself."""
        return len(np.unique(self.pairs)) == len(self.prompts)

    @property
    def couples(self) -> np.ndarray:
        """[2, pair]: rows of the true and the false member of each pair that has one of both."""
        found = [(np.flatnonzero(self.labels & (self.pairs == p)), np.flatnonzero(~self.labels & (self.pairs == p)))
                 for p in np.unique(self.pairs)]  # fmt: skip
        return np.array([(t[0], f[0]) for t, f in found if len(t) == 1 and len(f) == 1], dtype=int).reshape(-1, 2).T

    @property
    def by(self) -> str:
        """What is held out whole: "topic", "pair" or "statement"."""
        if len(set(self.topics)) >= 3:
            return "topic"
        return "statement" if self.loose else "pair"

    @property
    def groups(self) -> np.ndarray:
        """[n] what a split must keep together; the same text twice is one statement."""
        if self.by != "statement":
            return np.unique(self.topics if self.by == "topic" else self.pairs, return_inverse=True)[1]
        return np.unique(np.array([repr(p) for p in self.prompts]), return_inverse=True)[1]

    @property
    def texts(self) -> list[str]:
        """What a reader of the text alone is given."""
        return [text_of(p) for p in self.prompts]

    def __getitem__(self, rows: Any) -> Statements:
        at = np.arange(len(self))[rows]
        nuisances = {k: v[at] for k, v in self.nuisances.items()}
        return Statements([self.prompts[i] for i in at], self.labels[at], self.topics[at], self.pairs[at], nuisances)

    def planted(self, seed: int = 0, marks: tuple[str, str] = SPEAKERS, name: str = "speaker") -> Statements:
        """The same with a mark before each text, drawn so that the members of a pair have one each: a distraction that has nothing
        to do with the labels. It is kept as a nuisance. InputError for what is no text, and without pairs."""
        (true, false), drawn = self.couples, np.zeros(len(self), dtype=int)
        if not len(true) or not all(isinstance(p, str) for p in self.prompts):
            raise InputError("a distraction is planted before the texts of pairs: give texts, by Statements.paired")
        drawn[true] = np.random.default_rng(seed).integers(0, 2, len(true))
        drawn[false] = 1 - drawn[true]
        marked = [marks[i] + p for i, p in zip(drawn, self.prompts, strict=True)]
        return replace(self, prompts=marked, nuisances={**self.nuisances, name: drawn.astype(bool)})

    def folds(self, k: int, seed: int) -> np.ndarray:
        """[n] the fold of each. InputError where what is left beside two of them would be too few of a kind."""
        fold = folds(self.groups, min(k, len(np.unique(self.groups))), seed)
        for f in np.unique(fold):
            for g in np.unique(fold):
                left = self.labels[(fold != f) & (fold != g)]
                if min(int(left.sum()), int((~left).sum())) < LEAST:
                    raise InputError(
                        f"beside a test and a validation part, held out by {self.by}, {int(left.sum())} true and {int((~left).sum())} "
                        f"false statements are left: a reader needs at least {LEAST} of either kind; give more, or fewer to a topic"
                    )
        return fold

    def check_apart(self, other: Statements, name: str) -> None:
        """InputError where a statement of `other` is among these."""
        mine = set(map(repr, self.prompts))
        shared = [p for p in other.prompts if repr(p) in mine]
        if shared:
            raise InputError(
                f"{len(shared)} statements stand in the training part and in {name!r}, such as {shared[0]!r:.80}: "
                "take them out of one of them"
            )


def _plain(prompt: Any) -> Any:
    if is_messages(prompt):
        return Chat(prompt)
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def text_of(prompt: Any) -> str:
    """What a person reads: a text as it is, what is said in a chat, the numbers of token ids."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Chat):
        return "\n".join(f"{m['role']}: {m.get('content', '')}" for m in prompt.messages)
    return " ".join(map(str, prompt)) if isinstance(prompt, Sequence) else str(prompt)


def form_of(text: str) -> list[float]:
    """What a prompt looks like, whatever it says: characters, words, capitals, digits, marks."""
    counts = [
        sum(c.isupper() for c in text),
        sum(c.isdigit() for c in text),
        sum(c in string.punctuation for c in text),
    ]
    return [float(len(text)), float(len(text.split())), *map(float, counts)]
