"""Which texts is a model judged on, and what is known of their reasons?

A file of lines of JSON, or a directory a `datasets` data set was saved to, with these fields:

    text             required
    target, against  a token (" Paris"), a class by name or number; by default the model's own answer
    label            the class, where there is no target
    rationale        what people say is responsible: texts as they stand in it, or [first, stop) character ranges
    counterfactual   the same text edited until its label turns: the words that were edited are the rationale
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.attribution.case import Case
from pellucid.attribution.players import Players
from pellucid.errors import InputError, nearest
from pellucid.tasks.tokens import encode

FIELDS = ("text", "target", "against", "label", "rationale", "counterfactual")
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Example:
    """One text, what is asked about it, and the [first, stop) characters known to be responsible (None: not known)."""

    text: Any
    target: Any = None
    against: Any = None
    rationale: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, given: Any, where: str = "the example") -> Example:
        """From a text or a mapping with the fields above. InputError says which field cannot be used."""
        if isinstance(given, Example):
            return given
        if not isinstance(given, Mapping):
            return cls(given)
        if not isinstance(text := given.get("text"), str) or not text.strip():
            raise InputError(
                f"{where} has no text: expected a field 'text' (it has {', '.join(map(str, given)) or 'none'})"
            )
        target = given.get("target", given.get("label"))
        return cls(text, target, given.get("against"), cls._rationale(text, given, where))

    @staticmethod
    def _rationale(text: str, given: Mapping[str, Any], where: str) -> tuple[tuple[int, int], ...] | None:
        if (named := given.get("rationale")) is not None:
            found = []
            for part in named:
                if isinstance(part, str):
                    matches = [m.span() for m in re.finditer(re.escape(part.strip()), text)] if part.strip() else []
                    if not matches:
                        raise InputError(f"{where}: the rationale {part!r} is not in the text")
                    found += matches
                elif len(part) == 2 and 0 <= part[0] < part[1] <= len(text):
                    found.append((int(part[0]), int(part[1])))
                else:
                    raise InputError(
                        f"{where}: {part!r} is no rationale: give texts, or [first, stop) characters of the text"
                    )
            return tuple(found)
        if (other := given.get("counterfactual")) is not None:
            return edited(text, other)
        return None

    def players(self, case: Case, players: Players) -> np.ndarray | None:
        """[player] whether one of its tokens touches the rationale; None if there is none, or it was all cut off."""
        if not self.rationale or not isinstance(self.text, str):
            return None
        offsets = encode(case.model.tokenizer, self.text)[1]
        touched = {i for i, (a, b) in enumerate(offsets) for first, stop in self.rationale if a < stop and b > first}
        found = np.array([bool(touched.intersection(group)) for group in players.members])
        return found if found.any() and not found.all() else None


def edited(text: str, other: str) -> tuple[tuple[int, int], ...]:
    """The [first, stop) characters of words that are not in the other text as well, by the longest common parts.

    >>> [("a bad film, a bore"[a:b]) for a, b in edited("a bad film, a bore", "a good film, a joy")]
    ['bad', 'bore']
    """
    spans = [m.span() for m in WORD.finditer(text)]
    here = [text[a:b].lower() for a, b in spans]
    there = [m.group().lower() for m in WORD.finditer(other)]
    changes = SequenceMatcher(None, here, there, autojunk=False).get_opcodes()
    return tuple(spans[i] for tag, first, stop, _, _ in changes if tag != "equal" for i in range(first, stop))


def read_examples(path: str | Path, limit: int | None = None) -> list[Example]:
    """The examples of a file of lines of JSON or a directory of a saved `datasets` data set. InputError names the line."""
    path = Path(path)
    if path.is_dir():
        rows: Iterable[tuple[str, Any]] = _saved(path)
    elif path.is_file():
        rows = _lines(path)
    else:
        raise InputError(f"there is no data at {str(path)!r}: expected a file of lines of JSON, or a saved data set")
    examples: list[Example] = []
    for where, row in rows:
        if limit is not None and len(examples) >= limit:
            break
        if unknown := [str(name) for name in row if name not in FIELDS] if not examples and "text" not in row else []:
            raise InputError(f"{where} has no text but {unknown[0]!r}{nearest(unknown[0], FIELDS)}")
        examples.append(Example.of(row, where))
    if not examples:
        raise InputError(f"{str(path)!r} has no examples")
    return examples


def _lines(path: Path) -> Iterable[tuple[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{where} is no object with a field 'text'")
            yield where, row


def _saved(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise InputError(
            f"{str(path)!r} is a directory: install `datasets` to read it, or give lines of JSON"
        ) from None
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is no saved data set: {error}") from None
    if isinstance(found, datasets.DatasetDict):
        raise InputError(
            f"{str(path)!r} has several splits: give one of {', '.join(str(path / name) for name in found)}"
        )
    return ((f"{path.name}, row {i}", row) for i, row in enumerate(found))
