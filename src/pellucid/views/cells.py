"""What are the strongest numbers of a view? A few rows, for where no script may run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

ROWS = 8
Cells = tuple[Sequence[str], Sequence[Sequence[Any]], int]  # columns, rows, and of how many these are the strongest


def strongest(values: np.ndarray) -> list[tuple[int, ...]]:
    """Indices of the `ROWS` largest in size, the largest first; missing ones never.

    >>> strongest(np.array([1.0, np.nan, -3.0]))
    [(2,), (0,)]
    """
    size = np.nan_to_num(np.abs(values.astype(float)), nan=-1.0)
    flat = np.argsort(-size, axis=None, kind="stable")[:ROWS]
    return [at for at in zip(*(i.tolist() for i in np.unravel_index(flat, values.shape)), strict=True) if size[at] >= 0]
