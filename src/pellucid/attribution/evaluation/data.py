"""Which texts is a model judged on, and what is known of their reasons?

A file of lines of JSON, or a directory a `datasets` data set was saved to, with these fields:

    text             required
    target, against  a token (" Paris"), a class by name or number; by default the model's own answer
    label            the class, where there is no target
    rationale        what people say is responsible: texts as they stand in it, or [first, stop) character ranges
    counterfactual   the same text edited until its label turns: the words that were edited are the rationale

Does an attribution name what people name?

Against a rationale, the players people (or an edit that turned the label) say are responsible (ERASER, DeYoung et al.
2020):

    token F1   of the top k players as the predicted rationale
    IOU F1     of spans: a predicted stretch of players counts as found if it shares at least half of the union with a
               stretch of the rationale
    AUPRC      area under precision over recall as the threshold falls, trapezoids as in ERASER's code
    average precision   the same area by steps: constant scores have the share of the rationale, where trapezoids between
               two points flatter them (0.6 for a share of 0.2)
    mass       share of the scores' absolute sum that lies on the rationale

k is the number of players in the rationale, unless given. A plausible attribution need not be faithful: a model can be
right for the wrong reasons, and an attribution that shows them is implausible and true.
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
from pellucid.statistics import area
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


PLAUSIBILITY = ("token F1", "IOU F1", "AUPRC", "average precision", "mass")


def plausibility(scores: np.ndarray, rationale: np.ndarray, k: int | None = None) -> dict[str, float]:
    """These measures of scores [player] against a rationale, booleans [player]. InputError if no player is in it.

    >>> found = plausibility(np.array([0.0, 3.0, 1.0]), np.array([False, True, False]))
    >>> found["token F1"], found["AUPRC"], found["mass"]
    (1.0, 1.0, 0.75)
    """
    rationale = np.asarray(rationale, dtype=bool)
    if rationale.shape != scores.shape or not rationale.any():
        raise InputError(f"the rationale names {int(rationale.sum())} of {len(scores)} players: expected one at least")
    k = int(rationale.sum()) if k is None else k
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[np.argsort(-scores, kind="stable")[:k]] = True
    size = float(np.abs(scores).sum())
    return {
        "token F1": token_f1(chosen, rationale),
        "IOU F1": iou_f1(chosen, rationale),
        "AUPRC": auprc(scores, rationale),
        "average precision": average_precision(scores, rationale),
        "mass": float(np.abs(scores[rationale]).sum()) / size if size > 0 else float("nan"),
    }


def token_f1(chosen: np.ndarray, rationale: np.ndarray) -> float:
    return 2 * float((chosen & rationale).sum()) / float(chosen.sum() + rationale.sum())


def iou_f1(chosen: np.ndarray, rationale: np.ndarray, threshold: float = 0.5) -> float:
    """F1 over stretches; each predicted one counts by the stretch of the rationale it meets best."""
    predicted, gold = _stretches(chosen), _stretches(rationale)
    found = sum(max(len(p & g) / len(p | g) for g in gold) >= threshold for p in predicted)
    return 2 * min(found, len(gold)) / (len(predicted) + len(gold))


def _stretches(mask: np.ndarray) -> list[set[int]]:
    where = np.flatnonzero(mask)
    return [set(part.tolist()) for part in np.split(where, np.flatnonzero(np.diff(where) > 1) + 1) if len(part)]


def auprc(scores: np.ndarray, rationale: np.ndarray) -> float:
    precision, recall = _precision_recall(scores, rationale)
    reached = int(np.argmax(recall == 1)) + 1
    return area(np.append(1.0, precision[:reached]), np.append(0.0, recall[:reached]))


def average_precision(scores: np.ndarray, rationale: np.ndarray) -> float:
    precision, recall = _precision_recall(scores, rationale)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def _precision_recall(scores: np.ndarray, rationale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At every threshold from the highest score down; equal scores pass it together."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    found = np.cumsum(rationale[order])[last]
    return found / (last + 1), found / rationale.sum()
