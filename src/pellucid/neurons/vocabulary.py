"""Which tokens may stand in a text that is made token by token, and does the text say those tokens?

Token ids are only an input a person can give if decoding them and encoding the text gives the same ids again. Words cut
in other ways, half characters and special tokens do not: those are left out unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pellucid.engine.marks import special_ids
from pellucid.errors import InputError
from pellucid.model import Model

PROBE = "The cat sat on the mat"
TRIES = 40  # rounds of drawing before giving up


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a model's texts: special tokens around a text are `prefix` and `suffix`, and never inside it.

    `readable`: only texts whose tokens survive decoding and encoding; otherwise any ids are allowed.
    """

    tokenizer: Any
    size: int
    readable: bool = True

    @classmethod
    def of(cls, model: Model, readable: bool = True) -> Vocabulary:
        """InputError for a model without a tokenizer that is to give readable texts."""
        if readable and model.tokenizer is None:
            raise InputError("this model was opened without a tokenizer: texts are not readable, use readable=False")
        return cls(model.tokenizer, model.vocabulary, readable)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        if self.tokenizer is None:
            return [], []
        whole, bare = self.tokenizer(PROBE)["input_ids"], self._encode([PROBE])[0]
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
        if start is None:
            raise InputError("this tokenizer cuts a text differently when it adds special tokens: use readable=False")
        return whole[:start], whole[start + len(bare) :]

    @property
    def prefix(self) -> list[int]:
        return self._around[0]

    @property
    def suffix(self) -> list[int]:
        return self._around[1]

    @cached_property
    def allowed(self) -> Tensor:
        """[n] ids that are no special tokens and whose text has no broken character."""
        if self.tokenizer is None:
            return torch.arange(self.size)
        special = special_ids(self.tokenizer) | set(getattr(self.tokenizer, "added_tokens_decoder", {}))
        ids = [i for i in range(min(self.size, len(self.tokenizer))) if i not in special]
        if self.readable:
            texts = self._decode([[i] for i in ids])
            ids = [i for i, text in zip(ids, texts, strict=True) if text and "\ufffd" not in text]
        return torch.tensor(ids)

    def texts(self, rows: Tensor) -> list[str]:
        """The text of each row of ids [row, position], without the tokens around it."""
        if self.tokenizer is None:
            return [" ".join(f"#{i}" for i in row) for row in rows.tolist()]
        return self._decode(rows.tolist())

    def survive(self, rows: Tensor) -> Tensor:
        """[row] whether ids [row, position] are what their text is encoded as."""
        if not self.readable or not len(rows):
            return torch.ones(len(rows), dtype=torch.bool)
        again = self._encode(self._decode(rows.tolist()))
        return torch.tensor([a == b for a, b in zip(again, rows.tolist(), strict=True)])

    def draw(self, n: int, length: int, generator: torch.Generator) -> Tensor:
        """`n` random texts [n, length] that survive. InputError where hardly any does."""
        found: list[Tensor] = []
        for _ in range(TRIES):
            picked = torch.randint(len(self.allowed), (2 * n, length), generator=generator)
            rows = self.allowed[picked]
            found.append(rows[self.survive(rows)])
            if sum(map(len, found)) >= n:
                return torch.cat(found)[:n]
        raise InputError(
            f"only {sum(map(len, found))} of {2 * n * TRIES} random texts of {length} tokens survive being written and "
            "read again: use a smaller length, or readable=False"
        )

    def around(self, rows: Tensor) -> Tensor:
        """[row, prefix + position + suffix] as the model is given them."""
        before, after = (torch.tensor(part, dtype=rows.dtype) for part in self._around)
        return torch.cat([before.expand(len(rows), -1), rows, after.expand(len(rows), -1)], 1)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return list(self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
