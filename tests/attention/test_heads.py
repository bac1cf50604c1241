"""Head scores are what they say on patterns of known heads, and their chances are those of an even head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.attention import head_summaries, patterns
from pellucid.attention.heads import habits, repeated
from pellucid.errors import InputError
from pellucid.tasks import repeated_tokens
from tests.attention.opening import PROMPT, TARGET, opened


def seen(n, causal):
    mask = torch.ones(n, n, dtype=torch.bool)
    return mask.tril() if causal else mask


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 9), causal=st.booleans(), marked=st.integers(0, 2))
def test_an_even_head_scores_its_chance_everywhere(n, causal, marked):
    mask = seen(n, causal)
    marks = torch.zeros(n, dtype=torch.bool)
    marks[:marked] = True
    found = habits((mask / mask.sum(1, keepdim=True))[None], mask, marks)
    for name in ("distance", "diagonal", "previous", "next", "first", "separator"):
        if not torch.isnan(found[f"{name}_chance"]):
            torch.testing.assert_close(found[name][0], found[f"{name}_chance"])
    assert float(found["focus"]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("offset", [0, -1, 1])
def test_a_head_of_one_place_has_that_score_and_no_entropy(offset):
    n = 6
    pattern = torch.zeros(1, n, n)
    for q in range(n):
        pattern[0, q, min(max(q + offset, 0), n - 1)] = 1
    found = habits(pattern, seen(n, causal=False), torch.zeros(n, dtype=torch.bool))
    name = {0: "diagonal", -1: "previous", 1: "next"}[offset]
    assert float(found[name]) == 1
    assert float(found["entropy"]) == pytest.approx(0, abs=1e-6)
    assert float(found["focus"]) == pytest.approx(1)
    assert torch.isnan(found["separator"]).all()


def test_induction_and_duplicate_heads_are_told_apart_on_a_repetition():
    n = 4
    size = 1 + 2 * n
    heads = torch.zeros(3, size, size)
    for q in range(size):
        second = q > n
        heads[0, q, q - n if second else 0] = 1
        heads[1, q, q - n + 1 if second else 0] = 1
        heads[2, q, max(q - 1, 0)] = 1
    found = repeated(heads, seen(size, causal=True), n)
    assert found["duplicate"].tolist() == [1, 0, 0]
    assert found["induction"].tolist() == [0, 1, 0]
    assert found["previous_random"].tolist() == [0, 0, 1]


def test_probes_say_ordinary_tokens_twice_after_a_bos():
    model = opened("gpt2")
    for ids in repeated_tokens(model.tokenizer, 3, length=7, vocabulary=model.vocabulary).tolist():
        assert ids[0] == model.tokenizer.bos_token_id
        assert ids[1:8] == ids[8:]
        assert len(set(ids[1:8])) == 7
        assert not set(ids[1:]) & set(model.tokenizer.all_special_ids)


def test_scores_of_prompts_are_means_of_slow_ones():
    model = opened("gpt2")
    texts = [PROMPT, "The king gave Mary a drink in the store"]
    found = head_summaries(model, texts, probes=0)
    expected = []
    for text in texts:
        a = patterns(model, text).values
        expected.append(np.mean([a[:, :, q, q - 1] for q in range(1, a.shape[-1])], 0))
    np.testing.assert_allclose(found.previous.values, np.mean(expected, 0), atol=1e-6)
    entropy = [
        -(a[:, :, 1:] * np.log(np.maximum(a[:, :, 1:], 1e-30))).sum(-1).mean(-1)
        for a in (patterns(model, t).values for t in texts)
    ]
    np.testing.assert_allclose(found.entropy.values, np.mean(entropy, 0), atol=1e-5)
    assert (found.next.isnull()).all()  # the future is masked


def test_separators_are_the_tokenizers_special_tokens():
    model = opened("bert")
    a = patterns(model, PROMPT).values
    found = head_summaries(model, PROMPT, probes=0)
    np.testing.assert_allclose(found.separator.values, (a[..., 0] + a[..., -1]).mean(-1), atol=1e-6)


def test_a_stack_of_two_is_named():
    model = opened("bart")
    assert head_summaries(model, [], stack="encoder", probes=1, length=5).induction.dims == ("layer", "head")
    with pytest.raises(InputError, match="this model has 'encoder' and 'decoder'"):
        head_summaries(model, [PROMPT], probes=0)
    assert TARGET


def test_nothing_to_look_at_is_an_error():
    with pytest.raises(InputError, match="give prompts, or probes"):
        head_summaries(opened("gpt2"), [], probes=0)
    with pytest.raises(InputError, match="different tokens"):
        head_summaries(opened("gpt2"), length=100_000)
