"""Training happens on a copy; uniform attention is uniform; a price on similarity moves attention away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pellucid.attention import adversarial_training, patterns, uniform_attention
from pellucid.attention.retraining import Base, copied, uniform
from pellucid.errors import InputError, Refused
from tests.attention.opening import PROMPT, classifier, opened

TEXTS = ["The capital of France is", "Mary went to the store", "John gave Mary a drink", "Rome is in Italy and Paris"]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_uniform_edits_spread_attention_over_what_is_visible(family):
    model = classifier(family)
    found = patterns(model, PROMPT, edits=uniform(model)).values
    n = found.shape[-1]
    even = np.full((n, n), 1 / n) if family == "bert" else np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    np.testing.assert_allclose(found, np.broadcast_to(even, found.shape), atol=1e-6)


def test_uniform_edits_leave_padding_out():
    model = classifier("bert")
    batch = model.run([PROMPT, "the"], edits=uniform(model)).logits
    alone = model.run(["the"], edits=uniform(model)).logits
    torch.testing.assert_close(batch[1:], alone, atol=1e-5, rtol=1e-4)


def test_the_users_model_stays_as_it_was():
    model = classifier()
    before = {name: p.clone() for name, p in model.module.state_dict().items()}
    wants = {name: p.requires_grad for name, p in model.module.named_parameters()}
    found = uniform_attention(model, TEXTS, [0, 1, 2, 0], TEXTS, [0, 1, 2, 0], epochs=15, learning_rate=3e-3)
    adversarial_training(model, TEXTS, TEXTS, strengths=[1.0])
    assert all(torch.equal(p, before[name]) for name, p in model.module.state_dict().items())
    assert wants == {name: p.requires_grad for name, p in model.module.named_parameters()}
    assert float(found.accuracy.sel(attention="own", training="further")) == 1.0  # it can learn four texts by heart
    guess = model.run(TEXTS).logits.argmax(-1).numpy()
    assert float(found.accuracy.sel(attention="own", training="none")) == np.mean(guess == np.array([0, 1, 2, 0]))


def test_attention_moves_farther_the_more_it_is_paid_for():
    model = classifier()
    found = adversarial_training(model, TEXTS, TEXTS, strengths=[0.0, 3.0], epochs=25, learning_rate=1e-2, noise=0.05)
    assert float(found.js.sel(strength=3.0)) > 2 * float(found.js.sel(strength=0.0))
    assert (found.js_low <= found.js).all()
    assert found.tv_by_text.shape == (2, 4)
    assert (found.js.values <= np.log(2)).all()


def test_a_copy_is_compared_as_equal():
    model = classifier()
    off, far, same = Base(model).compared(copied(model)[0], PROMPT)
    assert float(off) == pytest.approx(0, abs=1e-6)
    assert float(far) == pytest.approx(0, abs=1e-6)
    assert same


def test_what_cannot_be_trained_is_said():
    with pytest.raises(Refused, match="classifiers"):
        uniform_attention(opened("gpt2"), TEXTS, [0] * 4, TEXTS, [0] * 4)
    with pytest.raises(InputError, match="no parameter of this model is called 'nothing"):
        adversarial_training(classifier(), TEXTS, TEXTS, parameters="nothing.*")
    with pytest.raises(InputError, match="one label for each"):
        uniform_attention(classifier(), TEXTS, [0], TEXTS, [0] * 4)
