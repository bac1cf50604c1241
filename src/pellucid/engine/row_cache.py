"""Keys and values of rows that are not equally far: each row has its own tokens in every layer, and any rows make a batch.

A pass says which rows it is of (`live`, in the order of its batch), how many columns its past has and how many of its new
columns are each row's own; what a layer gives its attention is flush right, as a batch padded on the left is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class Kept(BaseException):
    """A block's keys and values are in the cache, and no more was asked of it."""


class RowLayer(DynamicLayer):
    """One layer: by row keys and values [head, token, d]."""

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache, self.rows = cache, dict[int, tuple[Tensor, Tensor]]()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Each live row has its new columns behind its own; all of the live rows, as one batch."""
        cache = self.cache
        for i, row in enumerate(cache.live):
            new = tuple(x[i, :, -cache.fresh[row] :] for x in (key_states, value_states))
            old = self.rows.get(row)
            self.rows[row] = new if old is None else tuple(torch.cat(each, 1) for each in zip(old, new, strict=True))  # type: ignore[assignment]
        if cache.keeping:
            raise Kept
        width = cache.past + key_states.shape[-2]
        return self._batch(0, width), self._batch(1, width)

    def _batch(self, which: int, width: int) -> Tensor:
        made = [self.rows[row][which] for row in self.cache.live]
        made = [x if x.shape[1] == width else nn.functional.pad(x, (0, 0, width - x.shape[1], 0)) for x in made]
        return made[0][None] if len(made) == 1 else torch.stack(made)

    def get_seq_length(self) -> int:
        return self.cache.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.past + int(query_length), 0


class RowCache(Cache):
    """A cache of `n` layers whose rows come and go; a plain one, which keeps every token also where attention slides: the mask does that."""

    def __init__(self, n: int) -> None:
        super().__init__(layers=[RowLayer(self) for _ in range(n)])
        self.live: list[int] = []
        self.fresh: dict[int, int] = {}  # of the new columns, how many are the row's own
        self.past = 0
        self.keeping = False  # an update ends the block: see `Kept`

    def cut(self, row: int, n: int) -> None:
        """The row has its first n tokens only."""
        for layer in self.layers:
            if row in layer.rows:
                layer.rows[row] = tuple(x[:, :n] for x in layer.rows[row])

    def tokens(self, row: int) -> list[int]:
        """How many tokens of the row each layer has."""
        return [layer.rows[row][0].shape[1] if row in layer.rows else 0 for layer in self.layers]
