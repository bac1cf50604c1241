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

from pellucid.engine.inputs import Inputs
from pellucid.engine.reading import Reader
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.surgery.keys import Text, batched, rows


@dataclass(frozen=True, eq=False)
class Measured:
    """Of each pair (prompt, answer): `probability`, `exact`, and `log_p` [vocabulary] of the first token where it was kept."""

    probability: np.ndarray
    exact: np.ndarray
    log_p: Tensor | None = None


@torch.no_grad()
def measured(model: Model, pairs: Sequence[tuple[Text, Text | None]], keep: bool | int = False) -> Measured:
    """See the module; `keep` the distribution of the first token (of so many pairs), to compare it with another model's."""
    given = rows(model, [p for p, _ in pairs], [a for _, a in pairs]) if pairs else []
    probability, exact = np.full(len(given), np.nan), np.zeros(len(given))
    kept = len(given) if keep is True else int(keep)
    first: list[Tensor] = [torch.zeros(0)] * kept
    same: dict[tuple[object, ...], list[int]] = {}  # answers of one token to one prompt are one run
    for i, row in enumerate(given):
        same.setdefault((row.ids, row.decoder, row.read), []).append(i)
    alike = list(same.values())
    for which, inputs in batched(model, [given[group[0]] for group in alike]):
        numbers = [alike[w][0] for w in which]
        z = _read(model, inputs, given[numbers[0]].read).float().log_softmax(-1).cpu()
        for row, i in [(row, i) for row, w in zip(z, which, strict=True) for i in alike[w]]:
            tokens = torch.tensor(given[i].answer, dtype=torch.long)
            if len(tokens):
                probability[i] = float(row.gather(1, tokens[:, None]).mean().exp())
                exact[i] = float(bool((row.argmax(1) == tokens).all()))
            if i < kept:
                first[i] = row[0]
    return Measured(probability, exact, torch.stack(first) if kept and given else None)


def _read(model: Model, inputs: Inputs, at: tuple[int, ...]) -> Tensor:
    """The logits at some places of each row, [row, place, vocabulary]: no other position is unembedded."""
    reader = Reader(model.anatomy, inputs, BoundMetric("answers", at, None, lambda z: z.sum((1, 2))))
    if model.anatomy.head is None:
        return reader.read(model.run(inputs).logits)
    stack = model.anatomy.stacks[-1]
    site = f"{stack.prefix}layers.{len(stack.blocks) - 1}.resid_post"
    x = model.run(inputs, keep=[site], logits=False).tensor(site)
    return reader.unembed(reader.pick(x, 0, x)[None])[0]


def divergence(before: Measured, after: Measured) -> np.ndarray:
    """KL(before || after) of the next token, [pair]."""
    if before.log_p is None or after.log_p is None:
        return np.zeros(0)
    found: Tensor = (before.log_p.exp() * (before.log_p - after.log_p)).sum(-1)
    return found.numpy()
