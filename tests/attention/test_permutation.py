"""Shuffled attention keeps its weights and its mask, and the sweep gives what single runs give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.attention import patterns, permuted_attention
from pellucid.attention.patterns import Kind
from pellucid.attention.permutation import edit, shuffle
from pellucid.errors import InputError
from tests.attention.opening import PROMPT, classifier, opened


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 7), heads=st.integers(1, 3), causal=st.booleans(), seed=st.integers(0, 999))
def test_a_shuffle_keeps_the_weights_of_each_row_where_it_can_look(n, heads, causal, seed):
    generator = torch.Generator().manual_seed(seed)
    seen = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
    a = torch.rand(heads, n, n, generator=generator) * seen
    found = shuffle(a, seen, generator)
    assert (found[:, ~seen] == 0).all()
    torch.testing.assert_close(found.sort(-1).values, a.sort(-1).values)


def test_shuffles_are_uniform():
    generator = torch.Generator().manual_seed(0)
    a = torch.tensor([[[1.0, 0, 0, 0]]]).expand(4000, 1, 4)
    seen = torch.tensor([[True, True, True, False]])
    share = shuffle(a, seen, generator).mean((0, 1))
    torch.testing.assert_close(share, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]), atol=0.03, rtol=0)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_changes_are_those_of_single_runs(family):
    model = classifier(family)
    found = permuted_attention(model, PROMPT, draws=3, seed=5)
    layers = [torch.from_numpy(a) for a in patterns(model, PROMPT).values]
    seen = [(a > 0).any(0) for a in layers]
    generator = torch.Generator().manual_seed(5)
    draws = [[shuffle(a, s, generator) for a, s in zip(layers, seen, strict=True)] for _ in range(3)]
    kind = Kind("", "attn", tuple(range(len(layers))))
    before = model.run(PROMPT).logits.softmax(-1)
    for layer in range(len(layers)):
        runs = [model.run(PROMPT, edits=[edit(kind, layer, None, draw[layer])]) for draw in draws]
        moved = [float((run.logits.softmax(-1) - before).abs().sum() / 2) for run in runs]
        assert float(found.change[layer]) == pytest.approx(np.median(moved), abs=1e-5)


def test_heads_can_be_shuffled_alone_and_a_language_model_is_read_at_its_answer():
    model = opened("gpt2")
    found = permuted_attention(model, PROMPT, over="layers.*.attn.heads.*.pattern", draws=2)
    assert found.change.dims == ("layer", "head")
    assert (found.change.values >= 0).all()
    assert float(found["all"]) > 0


def test_options_are_checked():
    with pytest.raises(InputError, match="expected patterns"):
        permuted_attention(opened("gpt2"), PROMPT, over="layers.*.attn.z")
    with pytest.raises(InputError, match="expected at least 1"):
        permuted_attention(opened("gpt2"), PROMPT, draws=0)
