"""Erasing keys rescales rows; fractions are those of a slow loop; orders that know the truth need fewer tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid import Replace
from pellucid.attention import attention_erasure
from pellucid.attention.erasure import decision, rankings, without
from pellucid.errors import InputError
from tests.attention.opening import PROMPT, classifier, opened


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 6), gone=st.integers(1, 5), seed=st.integers(0, 99))
def test_zeroed_keys_get_nothing_and_rows_keep_their_sum(n, gone, seed):
    rng = np.random.default_rng(seed)
    keys = rng.permutation(n)[: min(gone, n - 1)]
    x = torch.from_numpy(rng.random((1, 3, 2, n)))
    left = without(keys)(x)
    assert (left[..., keys] == 0).all()
    torch.testing.assert_close(left.sum(-1), x.sum(-1))
    rest = [k for k in range(n) if k not in keys]
    ratio = left[..., rest] / x[..., rest]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))


def test_a_row_that_loses_all_its_keys_passes_nothing_on():
    x = torch.tensor([[[[1.0, 0, 0]]]])
    assert (without(np.array([0]))(x) == 0).all()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_fractions_are_those_of_erasing_one_key_after_the_other(family):
    model = classifier(family)
    found = attention_erasure(model, [PROMPT], points=50)
    inputs = model.inputs(PROMPT)
    ranked, usable = rankings(model, inputs)
    margin = decision(model, inputs)
    for name in ("attention", "gradient", "product"):
        order = usable[np.argsort(-ranked[name][usable], kind="stable")]
        needed = 1.0
        for n in range(1, len(usable)):
            run = model.run(inputs, edits=[Replace("layers.*.attn.pattern", without(order[:n]))])
            if float(model.score(run, margin)) < 0:
                needed = n / len(usable)
                break
        assert float(found.fraction.sel(order=name)) == pytest.approx(needed)
        assert float(found.never.sel(order=name)) == (needed == 1.0)


def test_attention_is_what_the_row_that_is_read_gives():
    model = classifier("bert")
    inputs = model.inputs(PROMPT)
    ranked, _ = rankings(model, inputs, layers=-1)
    pattern = model.run(inputs, keep="layers.1.attn.pattern").tensor("layers.1.attn.pattern")[0]
    np.testing.assert_allclose(ranked["attention"], pattern[:, 0].mean(0).detach(), atol=1e-6)


def test_special_tokens_can_be_kept():
    model = opened("bert")
    prompt = "The capital of<mask> is in Paris"
    ids = model.inputs(prompt).stream("").ids[0].tolist()
    _, usable = rankings(model, model.inputs(prompt), keep_special=True)
    assert usable.tolist() == [i for i in range(1, len(ids) - 1) if ids[i] != model.tokenizer.mask_token_id]


def test_intervals_are_over_prompts_and_nonsense_is_refused():
    found = attention_erasure(classifier(), [PROMPT, "Mary went to Rome", "John is in the store"], points=4)
    assert (found.low <= found.fraction).all()
    assert (found.fraction <= found.high).all()
    with pytest.raises(InputError, match="one stack"):
        attention_erasure(opened("bart"), [PROMPT])
    with pytest.raises(InputError, match="at least 2"):
        attention_erasure(classifier("gpt2"), ["the"])
