"""Attention gradients equal autograd's on the attentions transformers returns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pellucid import Patch
from pellucid.attention import attention_gradient, gradient_weighted
from pellucid.errors import InputError
from pellucid.metrics import logit
from tests.attention.opening import PROMPT, TARGET, classifier, native, opened


def paris(model):
    return model.tokenizer.convert_tokens_to_ids("▁Paris")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bart"])
def test_signed_and_positive_products_equal_autograds(family):
    model = opened(family)
    target = TARGET if family == "bart" else None
    answer = paris(model)
    values, slopes = native(model, PROMPT, target, lambda z: z[0, -1, answer])
    signed = attention_gradient(model, PROMPT, " Paris", decoder=target)
    positive = gradient_weighted(model, PROMPT, " Paris", decoder=target)
    for name in values:
        mine = "weighted" if name in ("pattern", "decoder") else name
        a, g = torch.stack(values[name]), torch.stack(slopes[name])
        np.testing.assert_allclose(signed[mine].values, (a * g).numpy(), atol=1e-5)
        np.testing.assert_allclose(positive[mine].values, (a * g.clamp_min(0)).numpy(), atol=1e-5)
    last = "weighted"
    np.testing.assert_allclose(
        signed.data["token"].values if family != "bart" else signed[last].mean(("layer", "head", "query")).values,
        signed[last].mean(("layer", "head", "query")).values,
        atol=1e-6,
    )


def test_removing_a_small_weight_takes_what_the_product_says():
    model = opened("gpt2")
    found = attention_gradient(model, PROMPT, logit(" Paris"))
    pattern = model.run(PROMPT, keep="layers.1.attn.pattern").tensor("layers.1.attn.pattern")
    step, (h, q, k) = 1e-2, (2, 6, 3)
    less = pattern.clone()
    less[0, h, q, k] *= 1 - step
    changed = model.run(PROMPT, edits=[Patch("layers.1.attn.pattern", less.transpose(1, 2))])
    score = [float(model.score(run, logit(" Paris"))) for run in (model.run(PROMPT), changed)]
    assert (score[0] - score[1]) / step == pytest.approx(float(found.weighted[1, h, q, k]), rel=2e-2, abs=1e-4)


def test_a_classifier_is_asked_about_its_prediction_or_a_contrast_of_classes():
    model = classifier()
    answer = int(model.run(PROMPT).logits.argmax())
    np.testing.assert_array_equal(
        gradient_weighted(model, PROMPT).values, gradient_weighted(model, PROMPT, answer).values
    )
    first, second = (attention_gradient(model, PROMPT, c).values for c in (0, 1))
    contrast = attention_gradient(model, PROMPT, 0, against=1)
    np.testing.assert_allclose(contrast.values, first - second, atol=1e-6)


def test_a_masked_prompt_is_read_at_its_mask():
    model = opened("bert")
    found = gradient_weighted(model, "The capital of France is <mask> in Italy")
    read = np.abs(found.weighted.values[-1]).sum((0, 2))
    assert found.query_token.values[read.argmax()] == "<mask>"
    assert (np.delete(read, read.argmax()) == 0).all()


def test_several_tokens_and_misplaced_contrasts_are_errors():
    with pytest.raises(InputError, match="where one is read"):
        gradient_weighted(opened("gpt2"), PROMPT, " Parisian")
    with pytest.raises(InputError, match="against= goes with a target token"):
        gradient_weighted(opened("gpt2"), PROMPT, logit(" Paris"), against=" Rome")
