"""Relevance through attention equals the rules of Chefer et al. written out slowly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pellucid.attention import relevance
from tests.attention.opening import PROMPT, TARGET, classifier, native, opened


def bar(a, g):
    """A_bar, one weight after the other."""
    heads, rows, columns = a.shape
    made = np.zeros((rows, columns))
    for q in range(rows):
        for k in range(columns):
            made[q, k] = sum(max(0.0, float(a[h, q, k] * g[h, q, k])) for h in range(heads)) / heads
    return made


def normalise(r):
    rest = r - np.eye(len(r))
    sums = rest.sum(1, keepdims=True)
    return np.eye(len(r)) + np.divide(rest, sums, out=np.zeros_like(rest), where=sums > 0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_self_attention_equals_the_slow_rules(family):
    model = opened(family)
    answer = model.tokenizer.convert_tokens_to_ids("▁Paris")
    values, slopes = native(model, PROMPT, None, lambda z: z[0, -1, answer])
    r = np.eye(values["pattern"][0].shape[-1])
    for a, g in zip(values["pattern"], slopes["pattern"], strict=True):
        r = r + bar(a, g) @ r
    found = relevance(model, PROMPT, " Paris")
    np.testing.assert_allclose(found.matrix.values, r, atol=1e-5)
    np.testing.assert_allclose(found.relevance.values, r[-1], atol=1e-5)


def test_a_pooled_classifier_is_read_at_its_first_token():
    model = classifier("bert")
    values, slopes = native(model, PROMPT, None, lambda z: z[0, 1])
    r = np.eye(values["pattern"][0].shape[-1])
    for a, g in zip(values["pattern"], slopes["pattern"], strict=True):
        r = r + bar(a, g) @ r
    found = relevance(model, PROMPT, 1)
    np.testing.assert_allclose(found.relevance.values, r[0], atol=1e-5)
    assert found.read.values.tolist() == [1.0] + [0.0] * (len(r) - 1)


def test_a_causal_classifier_is_read_at_its_last_token():
    read = relevance(classifier("gpt2"), PROMPT).read.values
    assert read[-1] == 1.0
    assert read[:-1].sum() == 0


def test_encoder_decoders_equal_the_slow_rules():
    model = opened("bart")
    answer = model.tokenizer.convert_tokens_to_ids("▁Paris")
    values, slopes = native(model, PROMPT, TARGET, lambda z: z[0, -1, answer])
    ee = np.eye(values["encoder"][0].shape[-1])
    for a, g in zip(values["encoder"], slopes["encoder"], strict=True):
        ee = ee + bar(a, g) @ ee
    dd = np.eye(values["decoder"][0].shape[-1])
    de = np.zeros((len(dd), len(ee)))
    for a, ga, x, gx in zip(values["decoder"], slopes["decoder"], values["cross"], slopes["cross"], strict=True):
        dd, de = dd + bar(a, ga) @ dd, de + bar(a, ga) @ de
        de = de + normalise(dd).T @ bar(x, gx) @ normalise(ee)
    found = relevance(model, PROMPT, " Paris", decoder=TARGET)
    np.testing.assert_allclose(found.encoder_matrix.values, ee, atol=1e-5)
    np.testing.assert_allclose(found.matrix.values, dd, atol=1e-5)
    np.testing.assert_allclose(found.source.values, de[-1], atol=1e-5)


def test_relevance_is_never_negative_and_padding_has_none():
    model = opened("gpt2")
    ids = model.inputs(PROMPT).stream("").ids
    padded = {"input_ids": torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)}
    padded["attention_mask"] = torch.cat([torch.ones_like(ids), torch.zeros(1, 4, dtype=torch.long)], 1)
    alone, beside = relevance(model, PROMPT, " Paris"), relevance(model, padded, " Paris")
    assert (alone.matrix.values >= 0).all()
    np.testing.assert_allclose(beside.relevance.values, alone.relevance.values, atol=1e-5)
