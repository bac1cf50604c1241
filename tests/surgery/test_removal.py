"""Removal sets: greedy is greedy by brute force, contiguous is Gromov's angle, and every number is the shorter model's own."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError
from pellucid.surgery import layer_importance, removal, remove
from pellucid.views.kinds import view
from tests.surgery.test_arranging import opened
from tests.surgery.test_importance import TEXTS, loss

CHOICES = ("greedy", "contiguous", "single loss", "block influence")


@cache
def lost(family: str, layers: tuple[int, ...]) -> float:
    """Nats a token without some layers, text by text, in plain transformers."""
    model = opened(family)
    short = remove(model, list(layers)).module if layers else model.module
    ids = [model.inputs(text).tensors["input_ids"] for text in TEXTS]
    with torch.no_grad():
        return float(
            np.mean([loss(short(input_ids=i).logits, i) - loss(model.module(input_ids=i).logits, i) for i in ids])
        )


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_greedy_is_brute_force_and_every_number_is_the_shorter_models(family: str) -> None:
    model = opened(family)
    seven = pl.metrics.logit(7)
    found = removal(
        model,
        pl.Corpus(TEXTS, packed=False),
        {"seven": (TEXTS[:2], seven)},
        most=2,
        by=CHOICES,
        layers=range(4),
        draws=3,
    ).data
    taken: tuple[int, ...] = ()
    for size in (1, 2):
        taken = min((tuple(sorted((*taken, i))) for i in range(4) if i not in taken), key=lambda s: lost(family, s))
        assert found["set"].sel(choice="greedy", removed=size).item() == " ".join(map(str, taken))
    for choice in CHOICES[:2]:
        here = found.sel(choice=choice, removed=2)
        layers = tuple(map(int, here["set"].item().split()))
        assert float(here["loss"]) == pytest.approx(lost(family, layers), abs=2e-5)
        short = remove(model, list(layers))
        effect = [float((short.run(t).logits - model.run(t).logits)[0, -1, 7]) for t in TEXTS[:2]]
        assert float(here["effect"].sel(capability="seven")) == pytest.approx(np.mean(effect), abs=2e-4)
    single = layer_importance(model, pl.Corpus(TEXTS, packed=False)).data["loss"].values[0]
    assert found["set"].sel(choice="single loss", removed=2).item() == " ".join(
        map(str, sorted(np.argsort(single)[:2]))
    )
    assert float(found["loss"].sel(choice="greedy", removed=1)) == pytest.approx(single.min(), abs=2e-5)
    assert (found["loss"].sel(removed=0) == 0).all() and (found["kept"].sel(removed=0) == 1).all()
    greedy, alone, angle = (float(found["cost"].sel(choice=c)) for c in ("greedy", "single loss", "contiguous"))
    assert angle == 1 and alone < greedy < 2 * alone and alone < 5


def test_the_contiguous_block_is_of_the_smallest_angle_and_random_sets_are_of_the_same_layers() -> None:
    family = "llama"
    model = opened(family)
    found = removal(
        model, pl.Corpus(TEXTS, packed=False), most=2, by=["contiguous"], layers=[0, 1, 2], draws=4, seed=3
    ).data
    angles = []
    for text in TEXTS:
        run = model.run(text, keep="layers.*.resid_pre")
        states = [run.tensor(f"layers.{i}.resid_pre")[0].double() for i in range(3)] + [
            model.run(text, keep="layers.2.resid_post").tensor("layers.2.resid_post")[0].double()
        ]
        angles.append(
            [float(torch.cosine_similarity(states[i], states[i + 2], dim=-1).arccos().mean()) for i in range(2)]
        )
    start = int(np.argmin(np.mean(angles, 0)))
    assert found["set"].sel(removed=2, choice="contiguous").item() == f"{start} {start + 1}"
    rng = np.random.default_rng(3)
    drawn = [lost(family, tuple(sorted(rng.permutation([0, 1, 2])[:2].tolist()))) for _ in range(4)]
    random = found.sel(choice="random", removed=2)
    assert float(random["loss"]) == pytest.approx(np.mean(drawn), abs=2e-5)
    assert random["low"] <= random["loss"] <= random["high"]


def test_a_choice_that_is_no_better_than_random_is_said_first_and_it_shows_itself() -> None:
    found = removal(opened("llama"), TEXTS, most=2, by=["contiguous"])
    assert found.title.startswith("No choice is better than random sets") or "random sets" in found.title
    shown: Any = view(found)
    assert [line.name for line in shown.lines] == ["contiguous", "random"] and [
        line.dashed for line in shown.lines
    ] == [False, True]
    sizes = found.data["loss"].sel(choice="contiguous").values
    assert len(sizes) == 3 and all(a != b for a, b in pairwise(sizes))


def test_bad_questions_are_one_error() -> None:
    model = opened("llama")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (model, {"by": "greedy"}, "expected a list"),
        (model, {"by": ["best"]}, "expected a list"),
        (model, {"most": 3}, "of 2 layers that may go"),
        (model, {"most": 4, "layers": range(4)}, "one must stay"),
        (model, {"most": 2, "layers": [0, 2], "by": ["contiguous"]}, "no 2 neighbours"),
        (model, {"layers": [9]}, "there is no layer 9"),
        (opened("bert"), {"most": 1}, "does not predict the next token"),
        (opened("t5"), {"most": 1}, "does not predict the next token"),
    ]
    for of, options, what in cases:
        with pytest.raises(InputError, match=what):
            removal(of, TEXTS, **options)


def test_what_a_capability_needs_and_text_does_not_is_named() -> None:
    """Layer 2 writes what the metric reads and nothing that text would miss."""
    model = opened("gpt2")
    texts = TEXTS * 4
    bias = model.module.transformer.h[2].mlp.c_proj.bias.detach() + model.module.lm_head.weight[7].detach() * 3
    told = model.changed(pl.changed.Replaced("transformer.h.2.mlp.c_proj.bias", bias))
    found = layer_importance(told, texts, {"seven": (texts, pl.metrics.log_odds(7))}, parts=["mlp"])
    assert found.data.attrs["specific"]["seven"][0] == 2
    data = found.data
    assert int(np.argmax(data["specific"].sel(capability="seven", part="mlp").values)) == 2
    assert data["needed"].dims == ("measure", "part", "layer") and float(abs(data["needed"]).max()) == pytest.approx(1)
    loss_z, seven_z = ((x - x.mean()) / x.std() for x in (data["loss"].values[0], -data["effect"].values[0, 0]))
    np.testing.assert_allclose(data["specific"].values[0, 0], seven_z - loss_z, atol=1e-5)
    shown: Any = view(found)
    assert shown.rows.labels == ("text", "seven") and len(shown.columns.labels) == 4
