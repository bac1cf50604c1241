"""The loop accepts what helps on held-out data, rolls back what does not, and goes on where it was interrupted with the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.safety import improve
from tests.safety.test_steering import opened

FITTED, HELD_OUT = [[i, i + 1, i + 2] for i in range(10, 20)], [[i, i + 2, i + 1] for i in range(40, 50)]
NAME = "lm_head.weight"


def measure(model: pl.Model, prompts: Any) -> dict[str, Any]:
    """The goal: the logit of token 5; a guard: that of token 6."""
    z = model.run(prompts).logits[:, -1]
    return {"five": z[:, 5].tolist(), "six": z[:, 6].tolist()}


def turned(token: int, size: float) -> Any:
    """A change that raises the logit of a token by `size` at every prompt."""

    def change(model: pl.Model, prompts: Any, measured: Any, i: int) -> Any:
        h = model.run([*FITTED, *HELD_OUT], keep=["final_norm"]).tensor("final_norm")[:, -1]
        right = torch.linalg.pinv(h) @ torch.ones(len(h))
        left = torch.zeros(model.module.get_parameter(NAME).shape[0], 1)
        left[token] = size
        return pl.changed.Added(NAME, left, right[None])

    return change


def by_round(*changes: Any) -> Any:
    return lambda model, prompts, measured, i: changes[i](model, prompts, measured, i) if i < len(changes) else None


def test_what_helps_is_kept_and_what_hurts_or_may_is_rolled_back(tmp_path: Any) -> None:
    model = opened("llama")
    before = model.digest
    plan = by_round(turned(5, 5.0), turned(5, -5.0), turned(6, -5.0), turned(5, 5.0))
    found = improve(model, measure, plan, FITTED, HELD_OUT, ledger=tmp_path / "l", rounds=5)
    accepted = [bool(r.data.accepted) for r in found.rounds]
    assert accepted == [True, False, False, True] and len(found.rounds) == 4  # the fifth has nothing to propose
    values = [np.mean(measure(m, HELD_OUT)["five"]) for m in (model, found.model)]
    assert float(found.result.before[0, 0]) == pytest.approx(values[0], abs=1e-5)
    assert (
        float(found.rounds[3].sel(measure="five").after) == pytest.approx(values[1], abs=1e-5) and values[1] > values[0]
    )
    assert model.digest == before and "rolled back" in found.rounds[1].title and "six" not in found.rounds[1].title
    assert float(found.rounds[0].data.level) == pytest.approx(0.99) and "2 of 4" in found.result.title
    for i in range(4):
        assert Result.load(tmp_path / f"l/round-{i:03d}.zip") == found.rounds[i]


def test_an_interrupted_loop_goes_on_with_the_same_numbers(tmp_path: Any) -> None:
    model, calls = opened("llama"), []

    def plan(m: pl.Model, prompts: Any, measured: Any, i: int) -> Any:
        calls.append(i)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return turned(5, 3.0)(m, prompts, measured, i)

    with pytest.raises(KeyboardInterrupt):
        improve(model, measure, plan, FITTED, HELD_OUT, ledger=tmp_path / "a", rounds=2)
    again = improve(model, measure, plan, FITTED, HELD_OUT, ledger=tmp_path / "a", rounds=2)
    whole = improve(model, measure, turned(5, 3.0), FITTED, HELD_OUT, ledger=tmp_path / "b", rounds=2)
    assert calls == [0, 1, 1] and again.model.digest == whole.model.digest
    assert again.result.allclose(whole.result)
    for call, said in (
        (lambda: improve(opened("mixtral"), measure, plan, FITTED, HELD_OUT, ledger=tmp_path / "a"), "another model"),
        (
            lambda: improve(model, lambda m, d: {"five": [0.0, 1.0]}, plan, 0, 0, ledger=tmp_path / "a"),
            "other measures",
        ),
    ):
        with pytest.raises(InputError, match=said):
            call()


def test_chance_is_not_accepted_and_wrong_measures_are_refused(tmp_path: Any) -> None:
    model, rng = opened("llama"), np.random.default_rng(0)

    def noise(m: pl.Model, prompts: Any) -> dict[str, Any]:
        return {"goal": rng.normal(size=20)}

    accepted = 0
    for i in range(15):
        found = improve(model, noise, lambda m, d, s, i: m, 0, 0, ledger=tmp_path / str(i), rounds=1)
        accepted += int(found.result.data.accepted.sum())
    assert accepted <= 2
    cases: list[tuple[Any, str]] = [
        (lambda m, d: {}, "no number"), (lambda m, d: {"a": [1.0]}, "several examples"), (lambda m, d: {"a": [1.0, float("nan")]}, "of a"),
    ]  # fmt: skip
    for wrong, said in cases:
        with pytest.raises(InputError, match=said):
            improve(model, wrong, turned(5, 1.0), 0, 0, ledger=tmp_path / "w")
    with pytest.raises(InputError, match="no guard"):
        improve(model, measure, turned(5, 1.0), FITTED, HELD_OUT, ledger=tmp_path / "t", tolerance={"seven": 0.1})
    with pytest.raises(InputError, match="nothing in the first round"):
        improve(model, measure, lambda *_: None, FITTED, HELD_OUT, ledger=tmp_path / "n")
