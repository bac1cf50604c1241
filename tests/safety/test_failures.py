"""A failure is traced by numbers that a slow loop gives too; what is chosen is chosen on the fitted part, and random parts never are."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError, Refused
from pellucid.safety import Failure, trace_failure
from tests.safety.test_steering import opened

N = 12


@cache
def pairs(family: str) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """A word before the prompt turns the answer: right is what is said without it, wrong what is said with it."""
    model, rng = opened(family), np.random.default_rng(0)
    passing = [rng.integers(10, 80, 5).tolist() for _ in range(60)]
    failing = [[7, 9, 8, 7, 9, *ids] for ids in passing]
    said = [model.run(side).logits[:, -1].argmax(-1).tolist() for side in (passing, failing)]
    rows = [i for i in range(60) if said[0][i] != said[1][i]][:N]
    return (
        [failing[i] for i in rows],
        [passing[i] for i in rows],
        [said[0][i] for i in rows],
        [said[1][i] for i in rows],
    )


@cache
def traced(family: str) -> Failure:
    failing, passing, right, wrong = pairs(family)
    task = (passing, pl.metrics.logit_difference([[i] for i in right], [[i] for i in wrong]))
    return trace_failure(
        opened(family), failing, passing, right, wrong, groups=[i % 4 for i in range(N)], held_out=[2, 3], layers=[0, 2],
        top=2, exact=3, draws=2, tasks={"plain": task}, texts=[passing[0], passing[1]], retrain=[2] if family == "llama" else [],
    )  # fmt: skip


def margin(model: pl.Model, prompt: Any, right: int, wrong: int, edits: Any = ()) -> float:
    z = model.run([prompt], edits=list(edits)).logits[0, -1]
    return float(z[right] - z[wrong])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attribution_exact_effects_and_shares_are_those_of_single_runs(family: str) -> None:
    model, found = opened(family), traced(family)
    failing, passing, right, wrong = pairs(family)
    own = [i for i in range(N) if i % 4 < 2]
    test = [i for i in range(N) if i % 4 >= 2]
    d = found.result.data
    for name in d.checked.values[:2]:
        site = f"{name}@-1"
        clean = [model.run([passing[i]], keep=[site]).tensor(site)[0, 0] for i in own]
        mean = torch.stack(clean).mean(0)
        effects, guesses = [], []
        for i, there in zip(own, clean, strict=True):
            metric = pl.metrics.logit_difference(right[i], wrong[i])
            run = model.run([failing[i]], keep=[site], grad_of=metric)
            guesses.append(float(((there - run.tensor(site)[0, 0]) * run.grad(site)[0, 0]).sum()))
            edit = pl.Patch(site, mean[None])
            effects.append(
                margin(model, failing[i], right[i], wrong[i], [edit]) - margin(model, failing[i], right[i], wrong[i])
            )
        assert float(d.exact.sel(checked=name)) == pytest.approx(np.mean(effects), abs=1e-4)
        assert float(d.attribution.sel(component=name)) == pytest.approx(np.mean(guesses), abs=1e-4)
    for name, m in found.mitigations.items():
        scores = [margin(m.model or model, failing[i], right[i], wrong[i], m.edits) for i in test]
        here = d.sel(mitigation=name)
        assert float(here.preferred) == pytest.approx(np.mean(np.array(scores) > 0)), name
        kept = [margin(m.model or model, passing[i], right[i], wrong[i], m.edits) > 0 for i in test]
        assert float(here.passing) == pytest.approx(np.mean(kept)) and bool(here.control) == name.startswith("random")
    everywhere = [margin(model, p, r, w) > 0 for p, r, w in zip(passing, right, wrong, strict=True)]
    assert float(d["plain"].sel(mitigation="none")) == np.mean(everywhere) == 1.0 and float(d.preferred[0]) == 0.0
    assert float(d.kl.sel(mitigation="none")) == pytest.approx(0.0, abs=1e-6)


def test_what_is_chosen_beats_the_random_ones_on_the_fitted_part_and_keeps_what_was_right() -> None:
    for family in ("llama", "gpt2"):
        found = traced(family)
        d = found.result.data
        if found.chosen:
            here = d.sel(mitigation=found.chosen)
            assert not bool(here.control) and float(here.fitted) > float(d.fitted[d.control.values].max())
            assert found.result.title.startswith(found.chosen)
        else:
            assert "nothing mends" in found.result.title
    llama = traced("llama")
    retrained = llama.mitigations["retraining of layers 2"].model
    assert retrained is not None and retrained.digest != opened("llama").digest
    assert any(k.startswith("weight projection") for k in llama.mitigations)


def test_what_cannot_be_traced_is_refused() -> None:
    model = opened("gpt2")
    failing, passing, right, wrong = pairs("gpt2")
    cases: list[tuple[Any, str]] = [
        (lambda: trace_failure(model, failing[:5], passing[:5], right[:5], wrong[:5]), "at least 8 pairs"),
        (lambda: trace_failure(model, failing, passing[1:], right, wrong), "one of each"),
        (lambda: trace_failure(model, failing, passing, right, right), "same token"),
        (lambda: trace_failure(model, passing, failing, right, wrong), "nothing fails"),
        (lambda: trace_failure(model, failing, passing, right, wrong, groups=[0] * N), "one side"),
    ]
    for call, said in cases:
        with pytest.raises(InputError, match=said):
            call()
    with pytest.raises(Refused, match="next token"):
        trace_failure(opened("t5"), failing, passing, right, wrong)
