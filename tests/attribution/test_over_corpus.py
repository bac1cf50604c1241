"""Words over a corpus: the mean of what single calls say, whole texts drawn, another text's answer as control."""

from __future__ import annotations

import numpy as np
import pytest

import pellucid as pl
from pellucid.errors import InputError
from tests.attribution.hand import opened

TEXTS = ["The city of Paris is in France", "The city of Rome is in Italy", "Mary is in the city", "he is in Rome"] * 2


def test_a_word_has_the_mean_of_its_attributions_in_single_calls() -> None:
    model = opened("gpt2")
    found = pl.attribution.word_importance(model, iter(TEXTS), " Paris", control=" Rome", batch=3, players="token")
    means: dict[str, list[tuple[float, float]]] = {}
    for text in TEXTS:
        pair = [pl.attribution.gradient_x_input(model, text, target) for target in (" Paris", " Rome")]
        for token, a, b in zip(pair[0].data.token.values, *(p.data.attribution.values for p in pair), strict=True):
            means.setdefault(str(token).strip(), []).append((float(a), float(b)))
    for word in found.data.word.values:
        a, b = np.array(means[word]).T
        row = found.data.sel(word=word)
        assert int(row["count"]) == len(a)
        expected = (a.mean(), np.abs(a).mean(), b.mean(), (a - b).mean())
        got = [float(row[n]) for n in ("importance", "size", "control", "difference")]
        np.testing.assert_allclose(got, expected, atol=1e-5)
        assert row.low <= row.importance <= row.high
    assert "differ" in found.title and "np." not in found.title


def test_targets_are_one_for_each_text_and_the_control_is_another_texts() -> None:
    model = opened("gpt2")
    targets = [" Paris", " Rome"] * 4
    found = pl.attribution.word_importance(model, TEXTS, targets, seed=2).data
    swapped = pl.attribution.word_importance(model, TEXTS, targets[::-1], seed=2).data
    np.testing.assert_allclose(found.control, swapped.sel(word=found.word).importance, atol=1e-5)
    with pytest.raises(InputError, match="7 targets"):
        pl.attribution.word_importance(model, TEXTS, targets[:7])
    alone = pl.attribution.word_importance(model, TEXTS, " Paris")
    assert np.isnan(alone.data.control).all() and "no control" in alone.title
