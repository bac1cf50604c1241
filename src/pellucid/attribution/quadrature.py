"""Where on a path are gradients taken, and what does each of them weigh?

Fixed rules place a number of points; `refine` places them where the integral misses the rise it must explain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Rule = Literal["gauss-legendre", "riemann-left", "riemann-right", "riemann-middle", "trapezoid"]
POINTS = 4  # gradients in one stretch of the path
CANCELLED = 0.1  # attributions that add up to less than this share of their size are judged by their size
NARROW = 1e-7  # a rise within less of the path is a jump, which gradients do not see: experts switch, say


def quadrature(rule: Rule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points on [0, 1] and their weights, which add up to 1.

    >>> quadrature("riemann-left", 2)
    (array([0. , 0.5]), array([0.5, 0.5]))
    """
    if rule == "gauss-legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return (points + 1) / 2, weights / 2
    if rule == "trapezoid":
        weights = np.full(steps + 1, 1 / steps)
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, steps + 1), weights
    shift = {"riemann-left": 0.0, "riemann-middle": 0.5, "riemann-right": 1.0}[rule]
    return (np.arange(steps) + shift) / steps, np.full(steps, 1 / steps)


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of the path: its attributions [..., position], and how far they miss the rise of each score [...]."""

    start: float
    stop: float
    attribution: Tensor
    gap: Tensor


def refine(
    slopes: Callable[[Tensor], Tensor], heights: Callable[[Tensor], Tensor], tolerance: float, limit: int
) -> tuple[Tensor, int]:
    """The integral of slopes [point, ..., position] over [0, 1], stretches halved where completeness is missed.

    Paths can be nearly flat and then jump (where an attention sink moves, say), so points are spent where the gap is:
    the difference between the sum over positions and the rise of heights [point, ...]. Ends when the stretches' gaps,
    taken absolutely, add up to no more than `tolerance` of the whole rise (or of a tenth of the attributions' size; for each
    score, if there are several), or after `limit` points; returns the attributions [..., position] and the number of points.
    """
    points, weights = (torch.tensor(x) for x in quadrature("gauss-legendre", POINTS))
    todo, used = [(i / 4, (i + 1) / 4) for i in range(4)], 0
    done: list[Piece] = []
    known: dict[float, Tensor] = {}
    while True:
        new = sorted({end for ends in todo for end in ends} - known.keys())
        known |= dict(zip(new, heights(torch.tensor(new, dtype=torch.float64)), strict=True))
        edges = torch.tensor(todo, dtype=torch.float64)
        width = edges[:, 1:] - edges[:, :1]
        parts = slopes((edges[:, :1] + points * width).flatten()).unflatten(0, (-1, len(points)))
        made = torch.einsum("sn...p,n,s->s...p", parts, weights.to(parts), width[:, 0].to(parts))
        used += len(points) * len(todo)
        done += [Piece(a, b, one, one.sum(-1) - (known[b] - known[a])) for (a, b), one in zip(todo, made, strict=True)]
        total = torch.stack([piece.attribution for piece in done]).sum(0)
        noise = 1e-6 * torch.stack(list(known.values())).abs().amax(0)
        rise = (known[1.0] - known[0.0]).abs()
        allowed = tolerance * rise.maximum(CANCELLED * total.abs().sum(-1)) + noise
        done.sort(key=lambda piece: float((piece.gap.abs() / allowed).max()))
        missed = np.cumsum([float((piece.gap.abs() / allowed).max()) for piece in done])
        enough = int(np.searchsorted(missed, 0.5))
        jumps = [p for p in done[enough:] if p.stop - p.start < NARROW]
        split = [p for p in done[enough:] if p.stop - p.start >= NARROW]
        if missed[-1] <= 1 or used >= limit or not split:
            return total, used
        done = done[:enough] + jumps
        todo = [ends for p in split for m in [(p.start + p.stop) / 2] for ends in ((p.start, m), (m, p.stop))]
