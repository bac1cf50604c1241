"""Adversarial attention is a pattern the mask allows, far from the original, and the prediction stays where it is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from pellucid.attention import adversarial_attention, edits, patterns, rollout
from pellucid.errors import InputError
from pellucid.results import Result
from tests.attention.opening import PROMPT, classifier, opened


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def found(request):
    model = classifier(request.param)
    return model, adversarial_attention(model, PROMPT, steps=60)


def test_attention_moves_and_the_prediction_does_not(found):
    model, result = found
    assert 0 <= float(result.moved_tv) <= 0.01
    assert float(result.divergence) > 0.05
    before = model.run(PROMPT).logits.softmax(-1)
    after = model.run(PROMPT, edits=edits(result)).logits.softmax(-1)
    moved = float((before - after).detach().abs().sum() / 2)
    assert moved == pytest.approx(float(result.moved_tv), abs=1e-6)
    assert abs(float(result.probability - result.adversarial_probability)) <= 0.01


def test_what_is_put_in_are_distributions_over_what_can_be_seen(found):
    model, result = found
    np.testing.assert_allclose(result.adversarial.sum("key"), 1, atol=1e-5)
    np.testing.assert_allclose(result.original, patterns(model, PROMPT).values, atol=1e-6)
    hidden = (result.original == 0).all("head")
    assert float(result.adversarial.where(hidden, 0).max()) == 0


def test_the_divergence_is_the_jensen_shannon_divergence_of_the_rows(found):
    _, result = found
    for layer, head, query in np.argwhere(~np.isnan(result.js.values))[::7]:
        a, b = (result[name].values[layer, head, query].astype(float) for name in ("original", "adversarial"))
        assert float(result.js[layer, head, query]) == pytest.approx(jensenshannon(a, b) ** 2, abs=1e-4)
    assert float(result.divergence) == pytest.approx(float(np.nanmean(result.js.values)), abs=1e-6)
    assert float(result.reached.max()) == pytest.approx(float(result.divergence), abs=1e-4)


def test_rows_that_cannot_reach_the_output_are_not_counted(found):
    model, result = found
    read = 0 if model.module.config.model_type == "bert" else -1
    last = result.js.values[-1]
    assert not np.isnan(last[:, read]).any()
    assert np.isnan(np.delete(last, read % last.shape[1], axis=1)).all()
    assert not np.isnan(result.js.values[0, :, 1]).any()


def test_other_methods_see_the_adversarial_attention(found):
    model, result = found
    seen = patterns(model, PROMPT, edits=edits(result))
    np.testing.assert_allclose(seen.values, result.adversarial.values, atol=1e-6)
    assert not np.allclose(rollout(model, PROMPT, edits=edits(result)).values, rollout(model, PROMPT).values, atol=1e-2)


def test_it_can_be_kept_to_some_layers_and_read_again(tmp_path):
    model = classifier()
    result = adversarial_attention(model, PROMPT, layers=0, steps=20, restarts=1)
    assert result.layer.values.tolist() == [0]
    again = Result.load(result.save(tmp_path / "adversarial.zip"))
    after = model.run(PROMPT, edits=edits(again)).logits.softmax(-1)
    assert float((after - model.run(PROMPT).logits.softmax(-1)).abs().sum() / 2) <= 0.01


def test_the_same_seed_finds_the_same():
    model = classifier()
    one, two = (adversarial_attention(model, PROMPT, steps=10, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one.adversarial, two.adversarial)


def test_a_language_model_keeps_its_next_token():
    result = adversarial_attention(opened("llama"), PROMPT, steps=30)
    assert float(result.moved_tv) <= 0.01


@pytest.mark.parametrize("options", [{"epsilon": 0}, {"epsilon": 2}, {"steps": 0}, {"restarts": 0}])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(InputError, match="expected 0 < epsilon < 1"):
        adversarial_attention(classifier(), PROMPT, **options)
