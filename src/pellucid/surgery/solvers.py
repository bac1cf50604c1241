"""Which change of W gives keys K new values, and moves the rest least? Several published editors, one closed form.

W [d, n], keys K [n, m] as columns, R [d, m] what their values must move by, K_p keys of earlier edits (which must not move):

    A = [K_p, K]        Delta = [0, R] (A^T M A + penalty I)^-1 A^T M

    M = C^-1   penalty 0       ROME (one fact; with mean keys throughout, R-ROME) and EMMET's equality   Meng 2022, Gupta 2024
    M = C^-1   penalty > 0     MEMIT: R K^T (penalty C + K K^T)^-1 by Woodbury's identity, and EMMET's relaxed form  Meng 2023
    M = P      penalty > 0     AlphaEdit: R K^T P (K_p K_p^T P + K K^T P + penalty I)^-1                 Fang et al. 2025
    M = I                      C switched off

P projects on directions that ordinary keys hardly use. The published penalties (15,000 or 20,000 for MEMIT, .1 for EMMET, 10 for
AlphaEdit) and AlphaEdit's threshold (eigenvalues below .02) are absolute, and so mean something else in every model: MEMIT's leaves
SmolLM2's answers as they were. Here a penalty is found so that the values move a `share` of their way on average, and P spans
a share of the directions, those of the least eigenvalues. Delta has rank m and is kept in factors: all in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pellucid.errors import InputError

Metric = Callable[[Tensor], Tensor]  # keys [m, n] -> M k, [m, n]


def identity(k: Tensor) -> Tensor:
    """C switched off."""
    return k


def null_space(c: Tensor, share: float) -> Metric:
    """The projector on the `share` of directions that C [n, n] has least in."""
    if not 0 < share < 1:
        raise InputError(f"null_space={share!r}: expected the share of directions that are left free, between 0 and 1")
    vectors = torch.linalg.eigh(c.double())[1][:, : max(1, round(share * len(c)))]  # eigenvalues ascend
    return lambda k: k @ vectors @ vectors.T


def update(
    k: Tensor, r: Tensor, metric: Metric, *, penalty: float | None = None, share: float = 1.0, old: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Delta = left @ right, left [d, m] and right [m, n], and the penalty. Keys k [m, n], moves r [m, d], earlier keys `old` [p, n].

    Without a `penalty` one is found so that k is moved by `share` of r on average (1: exactly, penalty 0). InputError where keys
    are so alike that they cannot have values of their own.

    >>> left, right, _ = update(torch.eye(2, 3), torch.ones(2, 4), identity)
    >>> (left @ right @ torch.eye(2, 3).double().T).T.allclose(torch.ones(2, 4).double())
    True
    """
    k, r = k.double(), r.double()
    a = k if old is None else torch.cat([old.double(), k])
    moved = metric(a)
    gram = moved @ a.T
    gram = (gram + gram.T) / 2
    p, count = len(a) - len(k), len(a)
    if penalty is None:
        penalty = 0.0 if share >= 1 else _penalty(gram, p, share)
    system = gram + penalty * torch.eye(count, dtype=gram.dtype)
    root, failed = torch.linalg.cholesky_ex(system)
    pivots = root.diagonal().square()
    if int(failed) or float(pivots.min()) < 1e-10 * float(pivots.max()):
        raise InputError(
            f"{count} keys are not independent (the same subject twice, or more facts than directions): they cannot all have values "
            "of their own; leave facts out, or give a penalty or a share below 1"
        )
    right = torch.cholesky_solve(moved, root)[p:]
    return r.T.contiguous(), right.contiguous(), float(penalty)


def _penalty(gram: Tensor, p: int, share: float) -> float:
    """The penalty at which the new keys are moved by `share` of their way on average: bisection on its logarithm."""
    if share <= 0:
        raise InputError(f"share={share!r}: expected how far values are moved, more than 0 and at most 1")
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    weight = vectors[p:].square().mean(0)
    scale = float(gram.diagonal().mean())
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        reached = float((weight * values / (values + scale * 2.0**middle)).sum())
        low, high = (middle, high) if reached > share else (low, middle)
    return float(scale * 2.0**low)
