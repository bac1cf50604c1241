"""A corpus as tokens: read from texts in segments, run in batches of like length, kept so that contexts can be cut again.

A token's place is its prompt and its position among the prompt's tokens, as one number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError
from pellucid.model import Model

SEGMENT = 32_768  # tokens read, sorted by length, run, and then counted as done
BITS = 20  # of a place: the position


def place(prompt: Tensor, position: Tensor) -> Tensor:
    return (prompt << BITS) | position


def where(places: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts and positions of places.

    >>> where(place(torch.tensor([7]), torch.tensor([3])))
    (tensor([7]), tensor([3]))
    """
    return places >> BITS, places & ((1 << BITS) - 1)


@dataclass(frozen=True)
class Text:
    """One prompt: what the model is given, and the decoder's text in an encoder-decoder."""

    number: int
    ids: tuple[int, ...]
    target: str | None = None


def read(model: Model, texts: Iterable[Any], context: int) -> Iterator[Text]:
    """Texts, token ids, or pairs of source and target, each as tokens and cut off after `context` of them."""
    if isinstance(texts, str):
        raise InputError("expected several texts: put the one text into a list")
    for number, given in enumerate(texts):
        target = None
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], str):
            given, target = given
        if isinstance(given, str):
            if model.tokenizer is None:
                raise InputError("this model was opened without a tokenizer: give token ids")
            given = model.tokenizer(given, truncation=True, max_length=context)["input_ids"] if given.strip() else ()
        yield Text(number, tuple(given)[:context], target)


def segments(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Consecutive texts of about SEGMENT tokens."""
    found: list[Text] = []
    size = 0
    for text in texts:
        found.append(text)
        size += len(text.ids)
        if size >= SEGMENT:
            yield found
            found, size = [], 0
    if found:
        yield found


def batches(segment: Sequence[Text], tokens: int) -> Iterator[list[Text]]:
    """Texts of like length together, at most `tokens` tokens with their padding (but one text at least)."""
    group: list[Text] = []
    for text in sorted((t for t in segment if t.ids), key=lambda t: len(t.ids)):
        if group and len(text.ids) * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def inputs_of(model: Model, group: Sequence[Text]) -> Inputs:
    target = None if all(t.target is None for t in group) else [t.target or "" for t in group]
    return model.inputs([list(t.ids) for t in group], decoder=target)


@dataclass(eq=False)
class Shelf:
    """The tokens of every prompt, by segments: in memory, or in files of a folder, read when they are asked for.

    `given` is what the model was given; `read` what the sites' own stack reads, where that is something else (the decoder
    of an encoder-decoder).
    """

    folder: Path | None = None
    firsts: list[int] = field(default_factory=list)  # number of the first prompt of each segment
    count: int = 0
    _parts: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.count

    def append(self, rows: Mapping[str, Sequence[Sequence[int]]]) -> None:
        part: dict[str, Tensor] = {}
        for name, each in rows.items():
            part[name] = torch.tensor([i for row in each for i in row], dtype=torch.int32)
            part[f"{name}.ends"] = torch.tensor([len(row) for row in each]).cumsum(0)
        if self.folder is None:
            self._parts[len(self.firsts)] = part
        else:
            save_file(part, str(self._file(len(self.firsts))))
        self.firsts.append(self.count)
        self.count += len(rows["given"])

    def row(self, prompt: int, name: str = "read") -> list[int]:
        """The token ids of a prompt."""
        if not 0 <= prompt < self.count:
            raise InputError(f"there is no prompt {prompt}: the harvest read {self.count}")
        number = max(i for i, first in enumerate(self.firsts) if first <= prompt)
        if number not in self._parts:
            if len(self._parts) > 8:
                self._parts.clear()
            self._parts[number] = load_file(str(self._file(number)))
        part, i = self._parts[number], prompt - self.firsts[number]
        name = name if name in part else "given"
        ends = part[f"{name}.ends"]
        ids: list[int] = part[name][int(ends[i - 1]) if i else 0 : int(ends[i])].tolist()
        return ids

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"tokens-{number:05d}.safetensors"
