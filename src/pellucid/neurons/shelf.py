"""The tokens a harvest has read, kept so that contexts can be cut again.

A token's place is its prompt and its position among the prompt's tokens, as one number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pellucid.errors import InputError

BITS = 20  # of a place: the position


def place(prompt: Tensor, position: Tensor) -> Tensor:
    return (prompt << BITS) | position


def where(places: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts and positions of places.

    >>> where(place(torch.tensor([7]), torch.tensor([3])))
    (tensor([7]), tensor([3]))
    """
    return places >> BITS, places & ((1 << BITS) - 1)


@dataclass(eq=False)
class Shelf:
    """The tokens of every prompt, by segments: in memory, or in files of a folder, read when they are asked for.

    `given` is what the model was given; `read` what the sites' own stack reads, where that is something else (the decoder
    of an encoder-decoder).
    """

    folder: Path | None = None
    firsts: list[int] = field(default_factory=list, repr=False)  # number of the first prompt of each segment
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
