"""Correlations are scipy's over token scores that a slow loop gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

import pellucid as pl
from pellucid.attention import attention_correlation, flow, patterns, rollout
from pellucid.attention.correlation import MEASURES, leave_one_out, token_scores
from pellucid.errors import InputError, Refused
from tests.attention.opening import PROMPT, classifier, opened
from tests.zoo import build, tokenizer

TEXTS = [PROMPT, "When Mary and John went to the store, John gave a drink"]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_leaving_out_is_running_the_shorter_prompt(family):
    model = classifier(family)
    ids = model.inputs(PROMPT).stream("").ids[0].tolist()
    found = leave_one_out(model, model.inputs(PROMPT), range(1, len(ids) - 1))
    before = model.run(PROMPT).logits.softmax(-1)
    for t in range(1, len(ids) - 1):
        after = model.run([ids[:t] + ids[t + 1 :]]).logits.softmax(-1)
        assert found[t] == pytest.approx(float((after - before).abs().sum() / 2), abs=1e-6)
    assert found[0] == found[-1] == 0


def test_leaving_out_follows_the_mask_that_is_read():
    model = opened("bert")
    text = "The capital of <mask> is Paris"
    ids = model.inputs(text).stream("").ids[0].tolist()
    mask = ids.index(model.tokenizer.mask_token_id)
    tokens = [t for t in range(1, len(ids) - 1) if t != mask]
    found = leave_one_out(model, model.inputs(text), tokens)
    before = model.run(text).logits[0, mask].softmax(-1)
    for t in tokens:
        after = model.run([ids[:t] + ids[t + 1 :]]).logits[0, mask - (t < mask)].softmax(-1)
        assert found[t] == pytest.approx(float((after - before).abs().sum() / 2), abs=1e-6)


def test_scores_are_those_of_the_methods_at_the_row_that_is_read():
    model = classifier("gpt2")
    found = token_scores(model, model.inputs(PROMPT))
    assert set(found) == {*MEASURES, "gradient"}
    np.testing.assert_allclose(found["last layer"], patterns(model, PROMPT).values[-1].mean(0)[-1], atol=1e-6)
    np.testing.assert_allclose(found["all layers"], patterns(model, PROMPT).values.mean((0, 1))[-1], atol=1e-6)
    np.testing.assert_allclose(found["rollout"], rollout(model, PROMPT).values[-1, -1], atol=1e-6)
    np.testing.assert_allclose(found["flow"], flow(model, PROMPT, queries=-1).values[0], atol=1e-6)


def test_gradients_are_embedding_times_gradient():
    model = opened("gpt2")
    run = model.run(PROMPT)
    answer = int(run.logits[0, -1].argmax())
    ids = model.inputs(PROMPT).stream("").ids
    positions = model.module.transformer.wpe(torch.arange(ids.shape[1]))[None]
    x = (model.module.transformer.wte(ids) + positions).detach().requires_grad_()
    given = x - positions.detach()
    (slope,) = torch.autograd.grad(model.module(inputs_embeds=given).logits[0, -1, answer], x)
    expected = (x * slope).sum(-1)[0].abs().detach().numpy()
    np.testing.assert_allclose(token_scores(model, model.inputs(PROMPT), [])["gradient"], expected, atol=1e-5)


def test_taus_are_scipys_with_intervals_over_prompts():
    model = classifier()
    found = attention_correlation(model, TEXTS, measures=["last layer"])
    each = []
    for text in TEXTS:
        inputs = model.inputs(text)
        usable = range(inputs.stream("").ids.shape[1])  # classifiers of the tests have no special tokens in a prompt
        scores = token_scores(model, inputs, ["last layer"])
        each.append(kendalltau(scores["last layer"], leave_one_out(model, inputs, usable)).statistic)
    row = found.sel(measure="last layer", reference="leave-one-out")
    np.testing.assert_allclose(row.by_prompt, each)
    assert float(row.tau) == pytest.approx(np.mean(each))
    assert float(row.low) <= float(row.tau) <= float(row.high)
    assert np.isnan(float(found.tau.sel(measure="gradient", reference="gradient")))
    assert not np.isnan(float(found.tau.sel(measure="gradient", reference="leave-one-out")))


def test_nonsense_is_refused():
    with pytest.raises(InputError, match="did you mean 'rollout'"):
        attention_correlation(classifier(), TEXTS, measures=["rollouts"])
    with pytest.raises(InputError, match="expected at least 3"):
        attention_correlation(classifier(), ["Rome is"])
    with pytest.raises(InputError, match="one stack"):
        attention_correlation(opened("bart"), TEXTS)


def test_an_answer_at_every_token_has_no_leave_one_out():
    from transformers import BertForQuestionAnswering

    module = BertForQuestionAnswering(build("bert").config).eval()
    with pytest.raises(Refused, match="at every token"):
        attention_correlation(pl.load(module, tokenizer=tokenizer(build("bert"))), [PROMPT])
