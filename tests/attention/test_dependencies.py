"""A head that looks along a relation is found; the baseline is the best fixed offset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.attention import head_relations, patterns
from pellucid.attention.dependencies import OFFSETS, Tally, between_words
from pellucid.errors import InputError
from tests.attention.opening import opened


@dataclass(frozen=True)
class Word:
    start: int
    stop: int
    head: int
    deprel: str


@dataclass(frozen=True)
class Sentence:
    text: str
    words: tuple[Word, ...]


def sentence(text, heads, relations):
    words, at = [], 0
    for form, head, relation in zip(text.split(), heads, relations, strict=True):
        start = text.index(form, at)
        at = start + len(form)
        words.append(Word(start, at, head, relation))
    return Sentence(text, tuple(words))


SENTENCES = [
    sentence("The king gave Mary the drink", [2, 3, 0, 3, 6, 3], ["det", "nsubj", "root", "iobj", "det", "obj"]),
    sentence("John went to the store", [2, 0, 5, 5, 2], ["nsubj", "root", "case", "det", "obl"]),
    sentence("The drink in Rome is a drink", [2, 7, 4, 2, 7, 7, 0], ["det", "nsubj", "case", "nmod", "cop", "det", "root"]),
]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_head_that_looks_at_the_head_word_is_always_right(seed):
    rng = np.random.default_rng(seed)
    tally = Tally(causal=False)
    for each in SENTENCES:
        heads = [w.head for w in each.words]
        looked = rng.random((2, 3, len(heads), len(heads)))
        for word, head in enumerate(heads):
            looked[1, 2, word, head - 1] = 2.0
        tally.add(looked, heads, [w.deprel for w in each.words])
    found = tally.table(least=1)
    assert (found.uas.sel(direction="to head").isel(layer=1, head=2) == 1).all()
    assert (found.best.sel(direction="to head") == 1).all()


def test_the_baseline_is_the_best_fixed_offset():
    tally = Tally(causal=False)
    for each in SENTENCES:
        heads = [w.head for w in each.words]
        tally.add(np.zeros((1, 1, len(heads), len(heads))), heads, [w.deprel for w in each.words])
    found = tally.table(least=1)
    for relation in ("det", "nsubj", "all"):
        gaps = [
            w.head - 1 - i for s in SENTENCES for i, w in enumerate(s.words)
            if w.head and (relation == "all" or w.deprel == relation)
        ]  # fmt: skip
        expected = max(np.mean([gap == offset for gap in gaps]) for offset in OFFSETS)
        row = found.sel(relation=relation, direction="to head")
        assert float(row.baseline) == pytest.approx(expected)
        assert int(row.n) == len(gaps)
        assert np.mean([gap == int(row.offset) for gap in gaps]) == pytest.approx(expected)


def test_attention_between_words_sums_over_keys_and_averages_over_queries():
    rng = np.random.default_rng(0)
    a, spans = rng.random((2, 2, 6, 6)), [(1, 3), (3, 4), (4, 6)]
    found = between_words(a, spans)
    for i, (f, e) in enumerate(spans):
        for j, (g, m) in enumerate(spans):
            np.testing.assert_allclose(found[:, :, i, j], a[:, :, f:e, g:m].sum(-1).mean(-1))


def test_a_models_heads_are_scored_as_a_slow_loop_does():
    model = opened("bert")
    found = head_relations(model, SENTENCES, least=1)
    right = np.zeros_like(found.uas.sel(relation="det", direction="to head").values)
    for each in SENTENCES:
        a = patterns(model, each.text).values
        offsets = model.tokenizer(each.text, return_offsets_mapping=True)["offset_mapping"]
        spans = [[t for t, (x, y) in enumerate(offsets) if x < w.stop and y > w.start] for w in each.words]
        for i, w in enumerate(each.words):
            if w.deprel != "det":
                continue
            score = np.stack([a[:, :, spans[i]][..., s].sum(-1).mean(-1) for s in spans], -1)
            score[..., i] = -1
            right += score.argmax(-1) == w.head - 1
    np.testing.assert_allclose(found.uas.sel(relation="det", direction="to head"), right / 5, atol=1e-9)


def test_a_causal_model_is_asked_only_about_what_it_can_see():
    found = head_relations(opened("gpt2"), SENTENCES, least=1)
    backwards = sum(0 < w.head <= i for s in SENTENCES for i, w in enumerate(s.words))
    assert int(found.n.sel(relation="all", direction="to head")) == backwards
    assert np.isnan(float(found.best.sel(relation="det", direction="to head")))


def test_too_few_words_are_an_error():
    with pytest.raises(InputError, match="no relation has 10 words"):
        head_relations(opened("bert"), SENTENCES)
    with pytest.raises(InputError, match="no sentence could be used"):
        head_relations(opened("bert"), [])
