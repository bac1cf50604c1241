"""The closed forms are the papers' formulas, written out here with inverses in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pellucid.errors import InputError
from pellucid.surgery.solvers import identity, null_space, update

N, D, M, P = 12, 7, 3, 4


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """C [n, n], keys as columns [n, m], moves [d, m], earlier keys [n, p]."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = rand(60, N) * torch.linspace(0.1, 2, N, dtype=torch.float64)
    return x.T @ x / 60, rand(N, M), rand(D, M), rand(N, P)


def test_rome_is_its_formula_and_emmet_of_one_fact() -> None:
    c, k, r, _ = drawn()
    left, right, _ = update(k[:, :1].T, r[:, :1].T, lambda x: torch.linalg.solve(c, x.T).T)
    u = torch.linalg.inv(c) @ k[:, 0]
    torch.testing.assert_close(left @ right, torch.outer(r[:, 0], u) / (u @ k[:, 0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_emmet(penalty: float) -> None:
    c, k, r, _ = drawn()
    inverse = torch.linalg.inv(c)
    left, right, _ = update(k.T, r.T, lambda x: x @ inverse, penalty=penalty)
    formula = r @ torch.linalg.inv(k.T @ inverse @ k + penalty * torch.eye(M, dtype=torch.float64)) @ k.T @ inverse
    torch.testing.assert_close(left @ right, formula, rtol=1e-9, atol=1e-9)
    if penalty == 0:
        torch.testing.assert_close(left @ right @ k, r, rtol=1e-9, atol=1e-9)


def test_memit_with_and_without_keys_of_earlier_edits() -> None:
    c, k, r, old = drawn()
    inverse, penalty = torch.linalg.inv(c), 2.5
    left, right, _ = update(k.T, r.T, lambda x: x @ inverse, penalty=penalty)
    formula = r @ k.T @ torch.linalg.inv(penalty * c + k @ k.T)
    torch.testing.assert_close(left @ right, formula, rtol=1e-9, atol=1e-9)
    left, right, _ = update(k.T, r.T, lambda x: x @ inverse, penalty=penalty, old=old.T)
    formula = r @ k.T @ torch.linalg.inv(penalty * c + old @ old.T + k @ k.T)
    torch.testing.assert_close(left @ right, formula, rtol=1e-9, atol=1e-9)


def test_alphaedit_as_its_code_has_it() -> None:
    c, k, r, old = drawn()
    free = null_space(c, 0.75)
    _, vectors = torch.linalg.eigh(c)
    p = vectors[:, : round(0.75 * N)] @ vectors[:, : round(0.75 * N)].T
    penalty = 1.7
    left, right, _ = update(k.T, r.T, free, penalty=penalty, old=old.T)
    # upd = solve(P (K K^T + cache) + L2 I, P K R^T), transposed
    formula = torch.linalg.solve(
        p @ (k @ k.T + old @ old.T) + penalty * torch.eye(N, dtype=torch.float64), p @ k @ r.T
    ).T
    torch.testing.assert_close(left @ right, formula, rtol=1e-9, atol=1e-9)


def test_a_share_is_how_far_values_move_on_average_and_scale_changes_nothing() -> None:
    c, k, r, old = drawn()
    inverse = torch.linalg.inv(c)
    for scale in (1.0, 1e-3, 1e3):
        _, right, penalty = update(scale * k.T, r.T, lambda x, s=scale: x @ inverse / s**2, share=0.6)
        moved = (right @ (scale * k)).diagonal().mean()
        assert float(moved) == pytest.approx(0.6, abs=1e-6)
        assert penalty > 0
    _, right, _ = update(k.T, r.T, identity, share=0.6, old=old.T)
    assert float((right @ k).diagonal().mean()) == pytest.approx(0.6, abs=1e-6)


def test_keys_that_are_not_independent_are_one_error() -> None:
    with pytest.raises(InputError, match="not independent"):
        update(torch.ones(2, 5), torch.ones(2, 3), identity)
    update(torch.ones(2, 5), torch.ones(2, 3), identity, share=0.5)
    with pytest.raises(InputError, match="share of directions"):
        null_space(torch.eye(3), 1.0)
