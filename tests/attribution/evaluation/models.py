"""Tiny models the evaluation is tested on, and games whose values are a formula."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

import pellucid
from pellucid.attribution.absence import Absence
from pellucid.attribution.case import Case
from pellucid.attribution.players import Players
from pellucid.metrics import logit
from tests.zoo import build, tokenizer

PROMPT = "The capital of France is"
TEXTS = [
    PROMPT, "Mary gave John a drink", "When he went to the store", "The city of Paris is in France",
    "Rome is the capital of Italy", "John is in the city", "Mary and John went to Italy", "he gave a drink to Mary",
    "The store of France is in Rome", "When John is in Paris he went to the store",
]  # fmt: skip


@cache
def opened(family, **config):
    module = build(family, **config)
    return pellucid.load(module, tokenizer=tokenizer(module))


def case_of(family, target=" Paris", prompt=PROMPT):
    # at the last token, whatever the model fills in
    return Case.of(opened(family), prompt, logit(target) if isinstance(target, str) else target)


class Formula(Absence):
    """A game without a model: v(S) = formula(present [player])."""

    def __init__(self, formula, n):
        super().__init__(None, Players("token", ("x",) * n, tuple((i,) for i in range(n))), "formula")
        self.formula = formula

    def _run(self, present):
        self.evaluations += len(present)
        return torch.tensor([[float(self.formula(row.numpy().astype(float)))] for row in present], dtype=torch.float64)


def additive(weights):
    return Formula(lambda here: np.asarray(weights) @ here, len(weights))
