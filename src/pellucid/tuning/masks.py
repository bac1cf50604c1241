"""Masks over tokens: exactly so many, softly so many with a gradient, and how often a random gate is open.

k = share * n of n tokens. In training m is, of scores s,

    top_k         1 for the k largest s, with the gradient of sigmoid((s - threshold) / temperature)   (straight-through)
    sparsemax     the nearest point of {0 <= m <= 1, sum m = k}: m = clip(s - tau, 0, 1)               (the budget of SPECTRA, Guerreiro and Martins 2021)
    entmax15      min(1, k entmax_1.5(s))
    hard_kuma     a stretched Kumaraswamy(a, b) variable cut to [0, 1], drawn anew each step            (Bastings et al. 2019)

and in use the k largest of `ranked`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pellucid.engine.edits import Edit, Place
from pellucid.tuning.sparse import entmax15

Mask = Literal["top_k", "hard_kuma", "sparsemax", "entmax15"]
LOW, HIGH = -0.1, 1.1  # to which a Kumaraswamy variable is stretched


@dataclass(frozen=True, eq=False, repr=False)
class Mixed(Edit):
    """Embeddings where `mask` [row, position] is 1, `fill` [row, position, d] where it is 0."""

    mask: Tensor
    fill: Tensor

    def new(self, x: Tensor, place: Place) -> Tensor:
        m = self.mask.to(x)[..., None]
        return m * x + (1 - m) * self.fill.to(x)


def ranked(kind: Mask, scores: Tensor) -> Tensor:
    """[row, position] by what the tokens are picked in use."""
    return present(scores) if kind == "hard_kuma" else scores[..., 0]


def soft(kind: Mask, scores: Tensor, free: Tensor, share: float, temperature: float, drawn: torch.Generator) -> Tensor:
    """[row, position] the mask in training, with a graph; `scores` [row, position, 2], of which only hard_kuma reads the second."""
    s, k = scores[..., 0], counts(free, share).to(scores.device)
    free = free.to(scores.device)
    if kind == "top_k":
        hard = largest(s.detach().cpu(), free.cpu(), share).to(s)
        inside = s.masked_fill(hard == 0, torch.inf).amin(1, keepdim=True)
        outside = s.masked_fill(~free | (hard > 0), -torch.inf).amax(1, keepdim=True)
        outside = torch.where(outside.isfinite(), outside, inside - 1)
        threshold = torch.where(inside.isfinite(), (inside + outside) / 2, 0.0)
        soft = ((s - threshold) / temperature).sigmoid()
        return (hard + (soft - soft.detach())) * free
    if kind == "hard_kuma":
        a, b = gates(scores)
        u = torch.rand(s.shape, generator=drawn).to(s).clamp(1e-4, 1 - 1e-4)
        x = (1 - (1 - u) ** (1 / b)) ** (1 / a)
        return (LOW + (HIGH - LOW) * x).clamp(0, 1) * free
    s = (s / temperature).masked_fill(~free, -torch.inf)
    if kind == "entmax15":
        return (entmax15(s) * k[:, None]).clamp(max=1) * free
    return budget(s, k)


def counts(free: Tensor, share: float) -> Tensor:
    """[row] how many tokens a share is: at least one, where there is any."""
    n = free.sum(1)
    return torch.minimum((share * n).round().clamp_min(1), n).long()


def largest(scores: Tensor, free: Tensor, share: float) -> Tensor:
    """[row, position] exactly so many of the free tokens, those of the largest scores, the earlier of equal ones.

    >>> largest(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), torch.tensor([[True, True, True, False]]), 0.5)
    tensor([[False,  True,  True, False]])
    """
    order = scores.masked_fill(~free, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    made = torch.zeros_like(free)
    return made.scatter(1, order, torch.arange(free.shape[1]) < counts(free, share)[:, None]) & free


def budget(scores: Tensor, k: Tensor) -> Tensor:
    """[row, position] the nearest point of {0 <= m <= 1, sum m = k}, k [row] whole numbers: sparsemax for k = 1. Scores of -inf get 0.

    >>> budget(torch.tensor([[3.0, 1.0, 0.5, -2.0]]), torch.tensor([2]))
    tensor([[1.0000, 0.7500, 0.2500, 0.0000]])
    """
    with torch.no_grad():
        known = scores.isfinite()
        low = scores.masked_fill(~known, torch.inf).amin(1, keepdim=True) - 1
        high = scores.amax(1, keepdim=True)
        low, high = (torch.where(x.isfinite(), x, 0.0).double() for x in (low, high))
        for _ in range(60):
            tau = (low + high) / 2
            more = (scores - tau).clamp(0, 1).sum(1, keepdim=True) > k[:, None]
            low, high = torch.where(more, tau, low), torch.where(more, high, tau)
        whole, active = scores - high >= 1, (scores - high > 0) & (scores - high < 1)
    n = active.sum(1, keepdim=True).clamp_min(1)
    tau = (scores.masked_fill(~active, 0).sum(1, keepdim=True) - (k[:, None] - whole.sum(1, keepdim=True))) / n
    return torch.where(active, (scores - tau).clamp(0, 1), whole.to(scores))


def f1(mask: Tensor, marked: Tensor) -> Tensor:
    """[row] of two sets of tokens."""
    return 2 * (mask & marked).sum(1) / (mask.sum(1) + marked.sum(1)).clamp_min(1)


def gates(scores: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of each Kumaraswamy variable; score 0 is 1, the uniform distribution."""
    a, b = (softplus(scores[..., i] * (1 if i == 0 else -1) + 0.5413) for i in (0, 1))
    return a.clamp(1e-2, 100), b.clamp(1e-2, 100)


def present(scores: Tensor) -> Tensor:
    """P(m > 0) = (1 - x^a)^b, x where the stretched variable is 0."""
    a, b = gates(scores)
    return (1 - (-LOW / (HIGH - LOW)) ** a) ** b
