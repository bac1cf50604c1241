"""A fitted monitor stands beside a reader of the text alone, and says first where that does as well."""

from __future__ import annotations

import numpy as np
import pytest

from pellucid import safety as sf
from pellucid.safety import fitting
from pellucid.safety.judging import text_scores
from tests.engine.hand import opened

WORDS = ["The city of Rome", "John gave the store", "Mary went to the", "The capital of France is"]
TALKS = [f"{a} {b}" for a in WORDS for b in ("city", "store", "gave")]


def test_what_the_text_says_as_well_is_said_first_and_the_text_read_is_the_monitors() -> None:
    model = opened("llama")
    labels = np.array(["John" in t or "Mary" in t for t in TALKS])
    made = sf.fit_monitor(model, TALKS, labels, site="layers.1.resid_post", reads="prompt", rule="mean")
    found = made.fitted
    assert found is not None and found.data.row.values.tolist() == ["monitor", "text", "form"]
    assert [str(t).split()[:2] for t in found.data.text_read.values] == [t.split()[:2] for t in TALKS]
    assert float(found.data.area.sel(row="text")) == 1.0 and found.title.startswith("No better than text 1.00")


def test_a_text_that_does_worse_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llama")
    labels = np.array(["John" in t or "Mary" in t for t in TALKS])
    for name in ("text_scores", "form_scores"):  # what reads nothing
        monkeypatch.setattr(fitting, name, lambda train, y, ask: np.zeros(len(ask)))
    found = sf.fit_monitor(model, TALKS, labels, site="layers.1.resid_post", reads="prompt", rule="mean").fitted
    assert found is not None and float(found.data.area.sel(row="text")) == 0.5
    assert found.title.startswith("monitor at layers.1.resid_post") and text_scores is not fitting.text_scores


def test_answers_are_read_as_they_are_written() -> None:
    model = opened("llama")
    made = sf.fit_monitor(
        model, TALKS, [True, False] * 6, site="layers.0.resid_post", max_new_tokens=4, batch=5, name="harm"
    )
    texts = [model.generate(t, max_new_tokens=4) for t in TALKS]
    assert made.fitted is not None
    for own, full in zip(made.fitted.data.text_read.values, texts, strict=True):  # the last token is read by nobody
        assert full.text.startswith(str(own))
