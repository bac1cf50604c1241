"""Shapley values where tokens join by groups: the words of a sentence together, the tokens of a word together.

The Owen value (Owen 1977) averages only over those orders in which the members of every group stand next to one another,
at each level of a hierarchy. A coalition then takes part of one group at most while the others are whole or absent, so
masked prompts are closer to text than the scattered words of the Shapley value; and what only a whole group can say is
shared within the group.

    owen        any hierarchy, from random orders in antithetic pairs; every order adds up to v(all) - v(none)
    partition   a binary tree, exactly (about n^2 runs) or up to a budget: SHAP's partition explainer, whose tree for text
                comes from the tokenizer; here neighbours are halved. Each split of a group into L and R in a
                surrounding S asks how v(S + L) and v(S + R) lie between v(S) and v(S + L + R); the groups with the
                most left to share are split first, and what the budget leaves is shared evenly within the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.attribution.absence import absence
from pellucid.attribution.batches import batched
from pellucid.attribution.case import Case
from pellucid.attribution.game import Coalitions
from pellucid.attribution.players import UNITS, Players
from pellucid.attribution.shapley import marginals, paired
from pellucid.engine.edits import Edit
from pellucid.errors import InputError, nearest
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

Tree = int | tuple["Tree", ...]  # a player, or a group
BATCH = 10  # groups split at a time


@technique
@batched
def owen(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    players: Any = "token",
    hierarchy: Any = "sentence",
    draws: int = 20,
    baseline: Any = None,
    keep_special: bool = True,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """Owen values of players in groups, estimated from random orders that keep groups together.

    `hierarchy` is "sentence" or "word" (players are grouped by those), "balanced" (neighbours halved again and again),
    or nested lists of player numbers. `draws` is even, as each order comes with its reverse. The other options
    are those of `occlusion`. InputError for a hierarchy that does not name each player once.

    Gives `attribution` [player] (or [position] of tokens; with [output] in front for a continuation) and its standard
    `error` (NaN for a single pair); they add up to `score` - `baseline_score` exactly.

    >>> owen(model, "It is old. The capital of France is", " Paris", draws=10).top(3)
    position token special attribution error score baseline_score evaluations
    ...
    """
    if draws < 2 or draws % 2:
        raise InputError(f"draws={draws}: expected an even number of them, as each comes with its reverse")
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
    game = absence(case, players, baseline, seed=seed, checkpoint=checkpoint)
    tree = grouped(case, game.players, hierarchy)
    rng = np.random.default_rng(seed)
    drawn = [_order(tree, rng) for _ in range(draws // 2)]
    value, error = paired(marginals(game, torch.tensor([o for one in drawn for o in (one, one[::-1])])))
    return game.result(
        f"Owen values of {case.question.name}", {"attribution": value, "error": error},
        attrs={"hierarchy": str(hierarchy)},
    )  # fmt: skip


@technique
@batched
def partition(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    players: Any = "token",
    evaluations: int = 500,
    baseline: Any = None,
    keep_special: bool = True,
    checkpoint: str | Path | None = None,
) -> Result:
    """Owen values over a balanced binary tree of neighbouring players, with at most about `evaluations` runs.

    The other options are those of `occlusion`. InputError for fewer than two evaluations.

    Gives `attribution` [player] (or [position] of tokens; with [output] in front for a continuation), which adds up to
    `score` - `baseline_score` exactly, and `shared` alike: how much of it (in absolute terms) is an even share in a
    group that the budget left whole; 0 everywhere means that the values are exact.

    >>> partition(model, "The capital of France is", " Paris", evaluations=100).top(3)
    position token special attribution shared score baseline_score evaluations
    ...
    """
    if evaluations < 2:
        raise InputError(f"evaluations={evaluations}: expected at least 2, with everything present and absent")
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
    game = absence(case, players, baseline, checkpoint=checkpoint)
    found, shared = split(game, halved(range(len(game.players))), evaluations)
    return game.result(
        f"Owen values of {case.question.name} over a balanced tree", {"attribution": found, "shared": shared},
        attrs={"hierarchy": "balanced"},
    )  # fmt: skip


# ---- hierarchies


def grouped(case: Case, players: Players, hierarchy: Any) -> Tree:
    """The tree of a hierarchy over these players."""
    n = len(players)
    if isinstance(hierarchy, str):
        if hierarchy == "balanced":
            return halved(range(n))
        if hierarchy not in UNITS[1:]:
            known = [*UNITS[1:], "balanced"]
            raise InputError(
                f"unknown hierarchy {hierarchy!r}: expected {', '.join(known)} or nested lists{nearest(hierarchy, known)}"
            )
        owner = {i: k for k, group in enumerate(Players.of(case, hierarchy).members) for i in group}
        groups: dict[int, list[int]] = {}
        for number, group in enumerate(players.members):
            groups.setdefault(owner[group[0]], []).append(number)
        return tuple(tuple(group) for group in groups.values())
    tree = _frozen(hierarchy)
    if sorted(leaves(tree)) != list(range(n)):
        raise InputError(f"the hierarchy must name each of the players 0 to {n - 1} once, got {hierarchy!r}")
    return tree


def _frozen(tree: Any) -> Tree:
    if isinstance(tree, int):
        return tree
    if not isinstance(tree, Sequence) or isinstance(tree, str) or not tree:
        raise InputError(f"a hierarchy is made of player numbers and lists of them, got {tree!r}")
    return tuple(_frozen(branch) for branch in tree)


def halved(players: Sequence[int]) -> Tree:
    """A balanced tree of neighbours.

    >>> halved(range(5))
    (((0, 1), 2), (3, 4))
    """
    if len(players) == 1:
        return players[0]
    middle = (len(players) + 1) // 2
    return halved(players[:middle]), halved(players[middle:])


def leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [leaf for branch in tree for leaf in leaves(branch)]


def _order(tree: Tree, rng: np.random.Generator) -> list[int]:
    """An order that keeps groups together: branches shuffled at every level."""
    if isinstance(tree, int):
        return [tree]
    return [leaf for i in rng.permutation(len(tree)) for leaf in _order(tree[i], rng)]


# ---- the recursion over a binary tree


@dataclass(frozen=True, eq=False)
class Open:
    """A group in a surrounding [player]: its values [output] without and with the group, and what that weighs."""

    tree: Tree
    around: Tensor
    without: Tensor
    within: Tensor
    weight: float

    @property
    def left(self) -> float:
        """How much there is to share."""
        return self.weight * float((self.within - self.without).abs().max())


def split(game: Coalitions, tree: Tree, evaluations: int) -> tuple[Tensor, Tensor]:
    """[output, player] Owen values, and how much of each is an even share in a group left whole."""
    n = len(game.players)
    nothing, everything = game(torch.stack([torch.zeros(n), torch.ones(n)]))
    todo = [Open(tree, torch.zeros(n), nothing, everything, 1.0)]
    found, shared = torch.zeros(len(nothing), n).double(), torch.zeros(len(nothing), n).double()
    while todo:
        groups = [o for o in todo if not isinstance(o.tree, int)]
        for one in todo:
            if isinstance(one.tree, int):
                found[:, one.tree] += one.weight * (one.within - one.without)
        budget = (evaluations - game.evaluations) // 2
        if budget <= 0:
            for one in groups:
                share = one.weight * (one.within - one.without)[:, None] / len(leaves(one.tree))
                found[:, leaves(one.tree)] += share
                shared[:, leaves(one.tree)] += share.abs()
            break
        groups.sort(key=lambda o: -o.left)
        size = min(BATCH, budget)
        todo = [*_branches(game, groups[:size]), *groups[size:]]
    return found, shared


def _branches(game: Coalitions, groups: Sequence[Open]) -> list[Open]:
    """Each group's two branches, each with the other one absent and present."""
    if not groups:
        return []
    joined = []
    for one in groups:
        assert isinstance(one.tree, tuple)
        for branch in one.tree:
            row = one.around.clone()
            row[leaves(branch)] = 1
            joined.append(row)
    made: list[Open] = []
    for one, rows, values in zip(
        groups, torch.stack(joined).unflatten(0, (-1, 2)), game(torch.stack(joined)).unflatten(0, (-1, 2)), strict=True
    ):
        assert isinstance(one.tree, tuple)
        for branch, own, other, beside in zip(one.tree, values, values.flip(0), rows.flip(0), strict=True):
            made.append(Open(branch, one.around, one.without, own, one.weight / 2))
            made.append(Open(branch, beside, other, one.within, one.weight / 2))
    return made
