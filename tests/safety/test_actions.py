"""Every action under every rule, in a batch padded on the left: each row does what a slow version says of it alone.

The slow version reads one plain answer of one row, finds the token at which the rule's formula passes the level, and does there what the action says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid import safety as sf
from tests.engine.hand import PROMPTS, opened
from tests.safety.test_monitors import FAMILIES, by_hand, reader, site

TOKENS = 5
Numbers = np.ndarray


def exponential(s: Numbers) -> list[float]:
    found = [float(s[0])]
    for x in s[1:]:
        found.append(0.4 * float(x) + 0.6 * found[-1])
    return found


RULES: dict[str, tuple[Any, Callable[[Numbers], Any]]] = {
    "max": ("max", lambda s: [max(s[: t + 1]) for t in range(len(s))]),
    "mean": ("mean", lambda s: [np.mean(s[: t + 1]) for t in range(len(s))]),
    "k of last n": (sf.k_of(2, 3), lambda s: [sorted(s[max(0, t - 2) : t + 1])[-2] if t else -np.inf for t in range(len(s))]),
    "exponential": (sf.ema(0.4), exponential),
    "first token": ("first", lambda s: [s[0]] * len(s)),
}  # fmt: skip
ACTIONS = ("record", "stop", "replace", "abstain", "hand over", "steer", "ablate")
SAID = {"replace": "Rome", "abstain": "I am not sure.", "hand over": "Rome"}


@cache
def alone(family: str) -> list[tuple[list[int], Numbers]]:
    """Each row's plain answer, written by itself, and its scores of one forward pass."""
    model, found = opened(family), []
    for row, prompt in enumerate(PROMPTS):
        made = model.generate(prompt, max_new_tokens=TOKENS)
        found.append((made.ids(0), by_hand(model, _As(made, row), row, reader(family)).double().numpy()))
    return found


class _As:
    """One row's answer, asked for under its number in the batch."""

    def __init__(self, made: Any, row: int) -> None:
        self.ids = lambda asked: made.ids(0)


def edits(family: str) -> dict[str, Any]:
    d = opened(family).anatomy.stacks[-1].d_model
    pushed = pl.Steer(site(family, 0), 5 * torch.randn(d, generator=torch.Generator().manual_seed(1)))
    return {"steer": pushed, "ablate": pl.Ablate(site(family, 0).replace("resid_post", "mlp.out"))}


CASES = [("llama", rule, action) for rule in RULES for action in ACTIONS]
CASES += [(family, "exponential", action) for family in FAMILIES[1:] for action in ACTIONS]


@pytest.mark.parametrize(("family", "rule", "action"), CASES)
def test_a_row_does_what_it_would_do_alone(family: str, rule: str, action: str) -> None:
    model, told = opened(family), []

    def human(alarm: sf.Alarm) -> str:
        told.append(alarm)
        return SAID["hand over"]

    then = {"stop": pl.Stop(), "replace": pl.Say(SAID["replace"]), "abstain": sf.ABSTAIN, "hand over": human, **edits(family)}  # fmt: skip
    given, formula = RULES[rule]
    plain = [(ids, np.array(formula(scores))) for ids, scores in alone(family)]
    tops = [float(statistic.max()) for _, statistic in plain]
    level = (min(tops) + max(tops)) / 2  # fires in one row at least, and not in all
    monitor = sf.Monitor(reader(family), given, threshold=level, then=then.get(action), name="m")
    made = model.generate(PROMPTS, max_new_tokens=TOKENS, monitors=monitor)
    for row, (ids, statistic) in enumerate(plain):
        fires = np.flatnonzero(statistic > level)
        at = int(fires[0]) if len(fires) else None
        assert int(made.firings.acted.values[row, 0]) == (-1 if at is None else at)
        if at is None or action == "record":
            assert made.ids(row) == ids
        elif action == "stop":
            assert made.ids(row) == ids[:at] and made.ended[row] == "watcher" and made.because[row].startswith("m: ")
        elif action in SAID:
            assert made.ids(row)[:at] == ids[:at] and made.firings.shown.values[row] == SAID[action]
            rest = model.tokenizer.decode(made.ids(row)[at:], skip_special_tokens=True).strip()
            assert (rest and SAID[action].startswith(rest)) or len(made.ids(row)) == TOKENS
        else:
            edit = edits(family)[action]
            wanted = model.generate(PROMPTS[row], max_new_tokens=TOKENS, when=lambda s: pl.Redirect([edit]) if s.index == at else None)  # fmt: skip
            assert made.ids(row) == wanted.ids(0) and made.ids(row)[:at] == ids[:at]
    if action == "hand over":
        assert [a.token for a in told] == [int(a) for a in made.firings.acted.values[:, 0] if a >= 0]
        assert all(a.statistic == pytest.approx(float(plain[a.row][1][a.token]), rel=1e-3, abs=1e-4) for a in told)
