"""What can be found in pairs of a statement and its opposite without knowing which of them holds?

Contrast-consistent search (Burns et al. 2023). With x0, x1 the values of the two members, each less the mean of its own set,

    p = sigmoid(w.x + b),    loss = mean[(p0 - (1 - p1))^2 + min(p0, p1)^2]        consistent, and not undecided

As in the authors' code the sign is chosen with labels. They take the restart of lowest loss; here the one wins whose answers agree most with those of
the other restarts (no label is looked at; of two restarts, and supervised, the lower loss): with more axes than pairs the lowest loss may be of
a restart that fits chance, while most others read the same. Values are also divided by one number
for each site, so that a learning rate means the same on all. Supervised: min(p0, p1) becomes p of the member that does not hold,
so one term is told what the other finds (EleutherAI's elk adds a cross-entropy instead).

All sites and restarts are one problem: a batched product of [site, 2 pairs, d] with [site, d, restart] for each step. The loss is no
evidence of truth: it is as low for whatever else the pairs differ in, and lower for what they differ in more plainly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.errors import InputError, at_least
from pellucid.training import train


@dataclass(frozen=True, eq=False)
class Found:
    """By site: `weight` [site, d] and `bias` [site] on values as they are (higher: holds), `loss` [site] of the chosen restart, `losses`
    [site, restart], and `agreement` [site, restart] with the others, -1 to 1."""

    weight: Tensor
    bias: Tensor
    loss: Tensor
    losses: Tensor
    agreement: Tensor


def search(
    first: Tensor,
    second: Tensor,
    holds: Tensor,
    *,
    supervised: bool = False,
    restarts: int = 10,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Found:
    """`first`, `second` [site, pair, d]; `holds` [pair] whether the first member does: used for the sign, and if `supervised`."""
    at_least(1, restarts=restarts, steps=steps)
    if first.shape != second.shape or first.ndim != 3 or first.shape[1] < 2:
        raise InputError(
            f"pairs of shapes {list(first.shape)} and {list(second.shape)}: expected [site, pair, d], two pairs or more"
        )
    sites, n, d = first.shape
    first, second = first.detach().float(), second.detach().float()
    means = torch.stack([first.mean(1), second.mean(1)], 1)  # [site, set, d]
    x = torch.cat([first - means[:, :1], second - means[:, 1:]], 1)
    scale = x.square().mean(1).median(1).values.sqrt().clamp_min(1e-12)  # of a typical axis: a few are huge
    x = x / scale[:, None, None]
    drawn = torch.rand(d + 1, restarts, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    start = (drawn / d**0.5).expand(sites, -1, -1)
    w, b = start[:, :d].clone(), start[:, d:].clone()
    holds = holds.bool()

    def losses() -> tuple[Tensor, Tensor]:
        p = torch.baddbmm(b, x, w).sigmoid().unflatten(1, (2, n))  # [site, set, pair, restart]
        low = torch.where(holds[:, None], p[:, 1], p[:, 0]) if supervised else p.amin(1)
        return ((p.sum(1) - 1).square() + low.square()).mean(1), p

    train(
        {"w": w, "b": b}, range(steps), lambda batch, step: losses()[0].sum(),
        lambda each: torch.optim.AdamW(each, learning_rate), seed=seed, what="steps of the search",
    )  # fmt: skip
    with torch.no_grad():
        found, p = losses()
        said = torch.where((p[:, 0] + 1 - p[:, 1]) / 2 > 0.5, 1.0, -1.0)  # [site, pair, restart]
        alike = (said.mT @ said / n).abs()
        agreement = (alike.sum(-1) - 1) / max(1, restarts - 1)
        best = found.argmin(1) if supervised or restarts < 3 else agreement.argmax(1)
        at = torch.arange(sites)
        right = ((said > 0) == holds[:, None]).float().mean(1)[at, best]
        sign = torch.where(right < 0.5, -1.0, 1.0)
        weight = w[at, :, best] / scale[:, None] * sign[:, None]
        bias = b[at, 0, best] * sign - (weight * means.mean(1)).sum(1)
    return Found(weight, bias, found[at, best], found, agreement)
