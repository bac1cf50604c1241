"""How likely is an answer, and is it what the model says? For prompts of one batch after another.

The probability of an answer of several tokens is exp of the mean log-probability of its tokens (Meng et al. 2022). `exact`: each of
its tokens is the likeliest one, so that greedy generation begins with the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pellucid.model import Model
from pellucid.surgery.keys import Text, batched, rows


@dataclass(frozen=True, eq=False)
class Measured:
    """Of each pair (prompt, answer): `probability`, `exact`, and `log_p` [vocabulary] of the first token where it was kept."""

    probability: np.ndarray
    exact: np.ndarray
    log_p: Tensor | None = None


@torch.no_grad()
def measured(model: Model, pairs: Sequence[tuple[Text, Text | None]], keep: bool = False) -> Measured:
    """See the module; `keep` the distribution of the first token, to compare it with another model's."""
    given = rows(model, [p for p, _ in pairs], [a for _, a in pairs]) if pairs else []
    probability, exact = np.full(len(given), np.nan), np.zeros(len(given))
    first: list[Tensor] = [torch.zeros(0)] * len(given)
    same: dict[tuple[object, ...], list[int]] = {}  # answers of one token to one prompt are one run
    for i, row in enumerate(given):
        same.setdefault((row.ids, row.decoder, row.read), []).append(i)
    alike = list(same.values())
    for which, inputs in batched(model, [given[group[0]] for group in alike]):
        numbers = [alike[w][0] for w in which]
        stream = inputs.stream("")
        at = torch.stack([stream.starts + (p if p >= 0 else stream.lengths + p) for p in given[numbers[0]].read], 1)
        logits = model.run(inputs).logits
        z = logits[torch.arange(len(numbers))[:, None], at.to(logits.device)].float().log_softmax(-1).cpu()
        for row, i in [(row, i) for row, w in zip(z, which, strict=True) for i in alike[w]]:
            tokens = torch.tensor(given[i].answer, dtype=torch.long)
            if len(tokens):
                probability[i] = float(row.gather(1, tokens[:, None]).mean().exp())
                exact[i] = float(bool((row.argmax(1) == tokens).all()))
            if keep:
                first[i] = row[0]
    return Measured(probability, exact, torch.stack(first) if keep and given else None)


def divergence(before: Measured, after: Measured) -> np.ndarray:
    """KL(before || after) of the next token, [pair]."""
    if before.log_p is None or after.log_p is None:
        return np.zeros(0)
    found: Tensor = (before.log_p.exp() * (before.log_p - after.log_p)).sum(-1)
    return found.numpy()
