"""Auditors foretell from hidden states what readers of the text cannot, topics held out, and say when a baseline does as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pellucid.errors import InputError
from pellucid.safety import audit
from pellucid.safety.auditors import _first
from pellucid.safety.statements import Statements
from tests.safety.test_readers import opened

HEADS = [
    f"{a} {b}"
    for a in ("Mary", "John", "the dog", "the cat", "she", "he")
    for b in ("went to the", "is in the", "gave a")
]
PROMPTS = [f"{h} {w}" for h in HEADS for w in ("store", "house")]
LABELS = [p.endswith("store") for p in PROMPTS]
TOPICS = [p.split(" ")[0] if not p.startswith("the") else p[4:7] for p in PROMPTS]
FAST: Any = {"topics": TOPICS, "draws": 2, "split": 3, "tokens": 2}


@pytest.mark.parametrize("kind", ["linear", "attention", "transformer"])
def test_what_the_last_token_says_is_foretold_and_so_is_it_by_the_text(kind: Any) -> None:
    found = audit(opened("llama"), PROMPTS, LABELS, kind=kind, answers=["he is in Rome"] * len(PROMPTS), **FAST)
    area = found.data.area
    assert float(area.sel(row=kind)) > 0.8 and float(area.sel(row="text")) == 1.0
    assert found.title.startswith("No better than text 1.00") and float(found.data.lead) == 0.0
    assert set(area.row.values) == {kind, "text", "own output", "shuffled", "topic, folds at random"}


def test_the_own_output_is_the_first_token_of_each_prompt_however_padded() -> None:
    for family in ("gpt2", "t5"):
        model = opened(family)
        data = Statements(["he is in the store", "she"], [True, False])
        found = _first(model, data, 2)
        for i, prompt in enumerate(data.prompts):
            alone = model.run(prompt).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(found[i], alone, rtol=1e-3, atol=1e-3)
    mass = audit(opened("gpt2"), PROMPTS, LABELS, opening=[" store"], **FAST).data
    assert "own mass" in mass.row.values


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral", "t5"])
def test_a_family_is_audited(family: str) -> None:
    found = audit(opened(family), PROMPTS, LABELS, **FAST)
    assert np.isfinite(found.data.area).all() and np.isnan(found.data.lead)


def test_a_spoken_auditor_stands_beside_the_text_it_could_have_read() -> None:
    found = audit(
        opened("gpt2"),
        PROMPTS[:24],
        LABELS[:24],
        kind="spoken",
        asks="he is in x and",
        words=(" Rome", " France"),
        split=3,
    )
    assert found.data.row.values.tolist()[:2] == ["spoken", "text"]


def test_what_cannot_be_audited_is_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match="writes no answer"):
        audit(opened("bert"), PROMPTS, LABELS)
    with pytest.raises(InputError, match="both kinds"):
        audit(opened("gpt2"), PROMPTS, [True] * len(PROMPTS))
    with pytest.raises(InputError, match="it takes 4 of either"):
        audit(opened("gpt2"), PROMPTS[:4], LABELS[:4], split=2)
    with pytest.raises(InputError, match="expected one for each"):
        audit(opened("gpt2"), PROMPTS, LABELS, answers=["a"])
