"""The sweep of strengths chooses on one half what the other half is asked about; the price is by hand; random vectors decide."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError, Refused
from pellucid.safety import Vector, strengths
from pellucid.safety.price import Meter, written
from tests.safety.test_steering import fitted, opened

PROMPTS = [
    "The city of Paris",
    "Mary and John went",
    "a big dog is",
    "she is in the",
    "he went to",
    "John gave a drink",
]
TEXTS = ["The capital of France is Paris", "a big dog is in the house today"]


def towards(model: pl.Model, token: str) -> Vector:
    """The unembedding row of a token: adding it to the last layer raises that token, and nothing random does as much."""
    site = "layers.2.resid_post"
    i = model.tokenizer(token, add_special_tokens=False)["input_ids"][0]
    return Vector(
        site, model.module.get_output_embeddings().weight[i].detach(), fitted("llama").at(2).unit, digest=model.digest
    )


def test_the_price_of_written_text_and_of_ordinary_text_is_by_hand() -> None:
    model = opened("llama")
    edits = [fitted("llama").at(1).edit(0.5)]
    made = model.generate(PROMPTS[:3], edits=edits, max_new_tokens=5)
    found = written(model, made)
    for b, prompt in enumerate(PROMPTS[:3]):
        ids = model.inputs(prompt).tensors["input_ids"][0].tolist()
        logits = model.run([ids + made.ids(b)]).logits[0].log_softmax(-1)
        nll = -np.mean([float(logits[len(ids) - 1 + i, t]) for i, t in enumerate(made.ids(b))])
        assert found["nll"][b] == pytest.approx(nll, abs=1e-4)
    everywhere = [fitted("llama").at(1).edit(0.5, tokens="1:")]
    task = {"paris": (PROMPTS, pl.metrics.logit_difference(" Paris", " Rome"))}
    cost = Meter.of(model, TEXTS, task, batch=2)(everywhere)
    kls, right = [], []
    for text in TEXTS:
        ids = model.inputs(text).tensors["input_ids"][0]
        p, q = (model.run(text, edits=e).logits[0].log_softmax(-1) for e in ([], everywhere))
        kls += [float((p[i].exp() * (p[i] - q[i])).sum()) for i in range(1, len(ids))]
        right += [bool(q[i].argmax() == ids[i + 1]) for i in range(1, len(ids) - 1)]
    assert cost["kl"] == pytest.approx(np.mean(kls), rel=1e-4)
    assert cost["top1"] * len(kls) == pytest.approx(sum(right))
    score = model.score(model.run(PROMPTS, edits=everywhere), task["paris"][1])
    assert cost["paris"] == pytest.approx(float((score > 0).float().mean()))
    assert Meter.of(model, TEXTS)() == pytest.approx({"kl": 0.0, "top1": Meter.of(model, TEXTS)()["top1"]})


def test_a_vector_that_works_is_chosen_and_held_out_prompts_agree() -> None:
    model, v = opened("llama"), towards(opened("llama"), "Paris")
    metric = pl.metrics.logit_difference(" Paris", " Rome")
    found = strengths(
        model, v, PROMPTS, metric, strengths=(0.2, 0.5), budget=1e9, texts=TEXTS, max_new_tokens=4, draws=3
    )
    assert found.data.chosen_direction == "vector" and float(found.data.chosen_strength) == 0.5
    assert found.effect.dims == ("site", "strength", "direction") and bool(found.beats_random.all())
    order = np.random.default_rng(0).permutation(6)
    halves = [[PROMPTS[i] for i in part] for part in (order[:3], order[3:])]
    for half, effect in (
        (halves[0], found.sel(strength=0.5, direction="vector").effect.item()),
        (halves[1], found.test_effect[0].item()),
    ):
        base, steered = (model.score(model.run(half, edits=e), metric) for e in ([], [v.edit(0.5)]))
        assert effect == pytest.approx(float((steered - base).mean()), abs=1e-4)
    assert found.test_effect[0] > found.test_effect[2:].max() and "moves" in found.title
    assert float(found.test_low[0]) <= float(found.test_effect[0]) <= float(found.test_high[0])
    lower = strengths(model, v, PROMPTS, metric, strengths=(0.5,), aim="lower", budget=1e9, max_new_tokens=2)
    assert lower.data.chosen_direction == "-vector"


def test_a_cell_that_does_not_beat_the_random_ones_or_costs_too_much_is_never_chosen() -> None:
    model = opened("llama")
    for budget, judge in (
        (1e9, lambda texts: [0.0] * len(texts)),
        (1e-6, pl.metrics.logit_difference(" Paris", " Rome")),
    ):
        found = strengths(
            model, towards(model, "Paris"), PROMPTS, judge, strengths=(0.5,), budget=budget, max_new_tokens=3
        )
        assert (
            "chosen_site" not in found.data
            and "test_effect" not in found.data
            and found.title.startswith("Nothing moves")
        )
    seen: list[list[str]] = []

    def judge(texts: list[str]) -> list[float]:
        seen.append(texts)
        return [float(len(t)) for t in texts]

    strengths(model, fitted("llama"), PROMPTS, judge, strengths=(0.3,), max_new_tokens=3, draws=1)
    assert all(len(t) == 3 for t in seen)


def test_what_cannot_be_swept_is_refused() -> None:
    model, v = opened("llama"), fitted("llama").at(1)
    calls: list[tuple[Any, str]] = [
        (lambda: strengths(model, v, PROMPTS[:3], len), "at least two"),
        (lambda: strengths(model, v, PROMPTS, 3), "judge=3"),
        (lambda: strengths(model, [v, v], PROMPTS, len), "site of its own"),
        (lambda: strengths(model, v, PROMPTS, lambda t: [1.0], max_new_tokens=1), "one for each"),
        (lambda: strengths(model, v, PROMPTS, len, aim="up"), "aim='up'"),  # type: ignore[arg-type]
        (lambda: strengths(opened("gpt2"), v, PROMPTS, pl.metrics.logit(" a"), max_new_tokens=1), "other weights"),
    ]
    for call, said in calls:
        with pytest.raises(InputError, match=said):
            call()
    with pytest.raises(Refused, match="decoders"):
        strengths(opened("t5"), v, PROMPTS, len)
    assert math.isnan(Vector("embed", torch.ones(3)).sink)
