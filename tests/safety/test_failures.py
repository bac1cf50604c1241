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


@cache
def bias() -> tuple[pl.Model, pl.tasks.Prompts]:
    """Twins that differ in one name, turned both ways: the first half to fit on, the second held out."""
    model = opened("gpt2")
    ends = ["went to the store", "gave the drink to Paris", "is in the city", "is in Rome", "went to Italy", "gave a drink"]  # fmt: skip
    made: list[list[str]] = [[], [], [], []]
    for end in ends:
        sides, said = [f"When {name} {end} and" for name in ("Mary", "John")], [" he", " Mary"]
        for turn in (1, -1):
            for list_, x in zip(made, (*sides[::turn], *said[::turn]), strict=True):
                list_.append(x)
    return model, pl.tasks.Prompts.from_pairs(*made, model.tokenizer)


def test_the_bias_protocol_is_a_failure_whose_twins_should_be_answered_alike() -> None:
    """`gap` is the bias of `causal.mitigation`, with and without its edits; a gap is what single runs say; a group's is its mean."""
    model, prompts = bias()
    alone = pl.causal.mitigation(model, prompts, ["he is in the city"], sizes=(2,), draws=1)
    edits = pl.causal.mitigating_edits(model, prompts[:6], [str(s) for s in alone.mediators.values[:2]])
    right, wrong = ([i[0][0] for i in side] for side in (prompts.wrong_ids, prompts.answer_ids))
    task = (["John is in", "Mary is in", "he went to", "Mary"], pl.metrics.logit_difference(" Rome", " Paris"))
    found = trace_failure(
        model, prompts.clean, prompts.corrupted, right, wrong, groups=[i // 2 for i in range(12)], held_out=[3, 4, 5], goal="alike",
        layers=[0, 1], top=2, exact=4, draws=1, tasks={"other": task}, also={"mitigation": edits},
    )  # fmt: skip
    d = found.result.data
    assert float(d.gap[0]) == pytest.approx(float(alone["bias_before"]), abs=1e-5)
    assert float(d.gap.sel(mitigation="mitigation")) == pytest.approx(float(alone.bias.sel(size=2)), abs=1e-5)
    ablated = next(n for n in found.mitigations if n.endswith("by attribution"))
    for name in ("none", ablated, "projection at layer 0", "projection at layer 1"):
        if name in d.mitigation.values:
            m = found.mitigations.get(name)
            gaps = [
                margin(model, prompts.corrupted[i], right[i], wrong[i], m.edits if m else ())
                - margin(model, prompts.clean[i], right[i], wrong[i], m.edits if m else ())
                for i in range(6, 12)
            ]
            here = d.sel(mitigation=name)
            assert float(here.gap) == pytest.approx(np.mean(gaps), abs=1e-4)
            assert np.allclose(here.by_group.values, np.reshape(gaps, (3, 2)).mean(1), atol=1e-4)
            said = [margin(model, p, *(model.tokenizer.convert_tokens_to_ids(t) for t in ("▁Rome", "▁Paris")), m.edits if m else ()) > 0 for p in task[0]]  # fmt: skip
            assert float(here.other) == np.mean(said[1::2])
    name = str(
        d.checked.values[0]
    )  # to first order: what failing twins gain less what passing ones do, held at the mean of both
    site, sides, moved = f"{name}@-1", (prompts.clean[:6], prompts.corrupted[:6]), []
    states = [[model.run([p], keep=[site]).tensor(site)[0, 0] for p in side] for side in sides]
    mean = torch.stack([*states[0], *states[1]]).mean(0)
    for side, here in zip(sides, states, strict=True):
        runs = [model.run([p], keep=[site], grad_of=pl.metrics.logit_difference(a, b)) for p, a, b in zip(side, right, wrong, strict=False)]  # fmt: skip
        moved.append(np.mean([float(((mean - h) * run.grad(site)[0, 0]).sum()) for h, run in zip(here, runs, strict=True)]))  # fmt: skip
    assert float(d.attribution.sel(component=name)) == pytest.approx(moved[0] - moved[1], abs=1e-4)
    edit, gaps = [pl.Patch(site, mean[None])], []
    for given in ((), edit):
        gaps.append(np.mean([margin(model, p, a, b, given) - margin(model, f, a, b, given) for p, f, a, b in zip(sides[1], sides[0], right, wrong, strict=False)]))  # fmt: skip
    assert float(d.exact.sel(checked=name)) == pytest.approx(abs(gaps[0]) - abs(gaps[1]), abs=1e-4)
    assert (
        found.result.main.name == "gap"
        and "nats apart" in found.result.title
        and not any(n.startswith("steering") for n in found.mitigations)
    )
    for call, said_ in (
        (lambda: trace_failure(model, prompts.clean, prompts.corrupted, right, wrong, goal="alike", retrain=[1]), "retrain"),
        (lambda: trace_failure(model, prompts.clean, prompts.clean, right, wrong, goal="alike"), "answered alike"),
        (lambda: trace_failure(model, prompts.clean, prompts.clean, right, wrong, goal="fair"), "'right' or 'alike'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said_):
            call()
