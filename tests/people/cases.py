"""What the tests of people's cases share: tiny models, opened once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import pellucid as pl
from tests.zoo import build, tokenizer

CLEAN, OTHER = "The city of Paris is in France", "The city of Rome is in France"
LONG = "Mary went to Rome and he gave John a drink"
DIFFERENCE = pl.metrics.logit_difference(7, 9)


@cache
def opened(family: str, **options: Any) -> pl.Model:
    module = build(family, **options)
    return pl.load(module, tokenizer=tokenizer(module))


def difference(z: Tensor) -> float:
    """The metric by hand, of logits [vocabulary]."""
    return float(z[7].double() - z[9].double())


def close(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance).all())
