"""Descriptions: planted meanings are found and beat those of other units; noise has none; the scores are the textbook's."""

from __future__ import annotations

import copy
from functools import cache
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
from tokenizers.processors import TemplateProcessing

import pellucid
from pellucid.errors import InputError
from pellucid.neurons.contexts import Context, UnitContexts
from pellucid.neurons.judges import CallableJudge, Judge, ModelJudge, StatisticalJudge
from pellucid.neurons.naming import Description, ModelExplainer, StatisticalExplainer, describe, features, wilson
from pellucid.neurons.scoring import auroc, random_directions, score_descriptions
from tests.zoo import build, tokenizer

WORDS = [
    " the",
    " cat",
    " dog",
    " house",
    " running",
    " talking",
    " walking",
    " 42",
    " 1999",
    " Paris",
    " of",
    " is",
    ".",
    " red",
]


@cache
def opened(family):
    module = build(family, max_position_embeddings=512)
    return pellucid.load(module, tokenizer=tokenizer(module))


def planted(meaning, n=80, length=8, noise=0.2, seed=0, name="unit"):
    """A unit that is active where `meaning(tokens, i)` says so."""
    rng = np.random.default_rng(seed)
    contexts = []
    for _ in range(n):
        tokens = tuple(rng.choice(WORDS, length))
        fires = np.array([meaning(tokens, i) for i in range(length)], dtype=float)
        contexts.append(Context(tokens, 2 * fires + noise * rng.standard_normal(length)))
    return UnitContexts(name, 1.0, tuple(contexts[: n // 2]), tuple(contexts[n // 2 :]))


MEANINGS = {
    'fires on "cat"': lambda t, i: t[i] == " cat",
    'fires on words that end in "-ing"': lambda t, i: t[i].endswith("ing"),
    "fires on numbers": lambda t, i: t[i].strip().isdigit(),
    'fires after "of"': lambda t, i: i > 0 and t[i - 1] == " of",
    'fires before "."': lambda t, i: i + 1 < len(t) and t[i + 1] == ".",
}
UNITS = [planted(meaning, seed=i, name=text) for i, (text, meaning) in enumerate(MEANINGS.items())]


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.unit)
def test_a_planted_meaning_is_the_description(unit):
    (found,) = describe([unit])
    assert str(found) == unit.unit
    assert found.rules[0].precision == pytest.approx(1) and found.rules[0].lift > 4


def test_meanings_of_several_words_are_all_found():
    (found,) = describe([planted(lambda t, i: t[i] in (" cat", " Paris", " red"), n=120)])
    assert {r.value for r in found.rules if r.kind == "token"} == {"cat", "paris", "red"}


def test_noise_gets_few_rules_and_silence_none():
    rng = np.random.default_rng(0)
    noise = planted(lambda t, i: rng.random() < 0.1, n=200)
    assert len(StatisticalExplainer(confidence=0.999)(noise).rules) <= 1
    silent = StatisticalExplainer()(planted(lambda t, i: False, noise=0))
    assert silent.rules == () and "stands out" in silent.text
    assert StatisticalExplainer()(UnitContexts("empty", 0.0, (), ())).rules == ()


def test_a_token_is_predicted_the_mean_activation_of_its_best_rule():
    unit = UNITS[0]
    found = StatisticalExplainer(rules=1)(unit)
    cats = [a for c in unit.shown for t, a in zip(c.tokens, c.activations, strict=True) if t == " cat"]
    rest = [a for c in unit.shown for t, a in zip(c.tokens, c.activations, strict=True) if t != " cat"]
    predicted = found.predict(Context((" a", " cat"), np.zeros(2)))
    assert predicted == pytest.approx([np.mean(rest), np.mean(cats)])


@given(k=st.integers(1, 30), more=st.integers(0, 30), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_the_bound_is_wilsons(k, more, confidence):
    expected = binomtest(k, k + more, alternative="greater").proportion_ci(confidence, "wilson").low
    assert wilson(k, k + more, NormalDist().inv_cdf(confidence)) == pytest.approx(expected, abs=1e-9)


def test_features_of_pieces_and_words():
    said = set(features(Context((" John", "son", " met"), np.zeros(3)), 1))
    assert {("token", "son"), ("after", "john"), ("before", "met"), ("shape", "pieces inside words")} <= said
    assert ("shape", "capitalised words") in set(features(Context((" John",), np.zeros(1)), 0))
    assert ("shape", "pieces inside words") in set(features(Context(("play", "##ing"), np.zeros(2)), 1))


# ---- scores


def test_right_descriptions_beat_those_of_other_units_in_every_test():
    found = score_descriptions(UNITS, describe(UNITS))
    assert (found.score > 0.9).all()
    assert (found.beats == 1).all() and (found.beats_surely == 1).all()
    assert ((found.low <= found.score + 1e-9) & (found.score <= found.high + 1e-9)).all()
    assert (found.control.sel(test="simulation") < 0.5).all()
    again = score_descriptions(UNITS, describe(UNITS))
    assert found.data.identical(again.data)


def test_a_description_that_fits_all_units_gains_nothing():
    found = score_descriptions(UNITS, ["common words"] * len(UNITS))
    np.testing.assert_allclose(found.gain, 0, atol=1e-12)
    assert (found.beats == 0).all() and (found.beats_surely == 0).all()


def test_the_description_of_noise_gains_nothing_that_is_sure():
    rng = np.random.default_rng(0)
    noise = [planted(lambda t, i: rng.random() < 0.1, n=120, seed=s, name=str(s)) for s in range(12)]
    found = score_descriptions(noise, describe(noise))
    assert float(found.beats_surely.mean()) < 0.2
    assert abs(float(found.gain.mean())) < 0.05


class Truth(Judge):
    def simulate(self, description, context):
        return np.nan_to_num(context.activations) * (1 if description.text == "true" else 0)


def test_a_judge_that_knows_the_activations_has_full_marks_and_a_blind_one_none():
    found = score_descriptions(UNITS[:2], ["true", "blind"], Truth(), draws=1)
    np.testing.assert_allclose(found.score[0], 1)
    np.testing.assert_allclose(found.score[1], [0.5, 0.5, 0])
    np.testing.assert_allclose(found.control[0], [0.5, 0.5, 0])


def test_simulation_is_the_correlation_over_all_tokens_that_count():
    unit = UNITS[1]
    unit.held_out[0].activations[2] = np.nan
    judge = CallableJudge(lambda text, tokens: [len(t) + 0.1 * i for i, t in enumerate(tokens)])
    found = score_descriptions([unit, unit], ["a", "b"], judge, draws=1)
    said = np.concatenate([judge.simulate(Description("a"), c)[c.counted] for c in unit.held_out])
    true = np.concatenate([c.activations[c.counted] for c in unit.held_out])
    assert float(found.score.sel(test="simulation")[0]) == pytest.approx(np.corrcoef(said, true)[0, 1])
    active = [c.above(1.0).any() for c in unit.held_out]
    loudest = [judge.simulate(Description("a"), c)[c.counted].max() for c in unit.held_out]
    assert float(found.score.sel(test="detection")[0]) == pytest.approx(roc_auc_score(active, loudest))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_weighed_auroc_is_that_of_contexts_drawn_so_often(seed):
    rng = np.random.default_rng(seed)
    good, bad = rng.integers(0, 5, 6).astype(float), rng.integers(0, 4, 5).astype(float)
    w, v = rng.integers(1, 4, 6), rng.integers(1, 4, 5)
    truth = np.r_[np.ones(w.sum()), np.zeros(v.sum())]
    expected = roc_auc_score(truth, np.r_[np.repeat(good, w), np.repeat(bad, v)])
    assert auroc(good, bad, w[None].astype(float), v[None].astype(float))[0] == pytest.approx(expected)


def test_a_description_in_words_is_taken_at_its_words():
    said = StatisticalJudge().simulate(
        Description("cats and the dog"), Context((" cat", " dog", " dogs", " a"), np.zeros(4))
    )
    assert said.tolist() == [0, 1, 0, 0]
    said = StatisticalJudge().simulate(Description("countries"), Context((" count", "country"), np.zeros(2)))
    assert said.tolist() == [1, 0]


def test_units_without_active_contexts_are_nan_and_do_not_count():
    silent = planted(lambda t, i: False, noise=0, name="silent")
    found = score_descriptions([*UNITS[:2], silent], [*describe(UNITS[:2]), "x"])
    assert np.isnan(found.score[2]).all() and (found.beats == 1).all()


# ---- models


def test_a_model_is_shown_marked_contexts_and_its_first_line_is_the_description():
    model = opened("gpt2")
    explainer = ModelExplainer(model, contexts=2, max_new_tokens=3)
    texts = ("The cat", "he gave a drink", "in Paris", "to Rome")
    contexts = tuple(Context(tuple(f" {w}" for w in t.split()), np.arange(len(t.split())) * 1.0) for t in texts)
    unit = UnitContexts("u", 0.5, contexts, ())
    prompt = explainer.prompt(unit)
    assert "- he <<gave>> <<a>> <<drink>>\n- The <<cat>>\nWhat" in prompt
    assert prompt.endswith("words: gave, a, drink, cat, Paris, Rome\nAnswer:")
    assert "marked" not in ModelExplainer(model, contexts=0).prompt(unit)
    said = model.generate(prompt, max_new_tokens=3).text
    (found,) = describe([unit], explainer)
    assert found.rules == () and found.text == (said.strip().splitlines() or ["no answer"])[0].strip()
    assert describe([unit], lambda contexts: f"about {contexts.unit}")[0].text == "about u"


def test_a_model_with_a_chat_template_is_asked_in_a_turn():
    model = copy.copy(opened("gpt2"))
    model.tokenizer = tokenizer = copy.deepcopy(model.tokenizer)
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [assistant]"
    )
    prompt = ModelExplainer(model).prompt(UNITS[0])
    assert prompt.startswith(f"{begin[0]}[user] In these lines") and prompt.endswith("cat [assistant]")
    asked = []
    model.generate = lambda prompt, **_: asked.append(prompt) or SimpleNamespace(text=" cats\nand more")
    assert ModelExplainer(model)(UNITS[0]).text == "cats"
    assert tokenizer(prompt)["input_ids"].count(begin[1]) == 2  # the template's and the tokenizer's
    assert asked[0][0].count(begin[1]) == 1 and asked[0][0][0] == begin[1]


def test_a_model_judges_by_its_preference_for_yes_whatever_the_batch():
    model = opened("gpt2")
    judge = ModelJudge(model, yes=" Paris", no=" Rome")
    contexts = [Context((" The", " city"), np.zeros(2)), Context((" he", " gave", " a", " drink"), np.zeros(4))]
    answers = judge.detect(Description("towns"), contexts)
    question = "Description: towns\nText: he gave a drink\nQuestion: Does the text contain the description?\nAnswer:"
    logits = model.run(question).logits[0, -1].detach()
    ids = [model.tokenizer(w, add_special_tokens=False)["input_ids"][-1] for w in ("Paris", "Rome")]
    assert answers[1] == pytest.approx(float(logits[ids[0]] - logits[ids[1]]), abs=1e-5)
    one = ModelJudge(model, batch=1, yes=" Paris", no=" Rome")
    np.testing.assert_allclose(one.detect(Description("towns"), contexts), answers, atol=1e-5)
    simulated = judge.simulate(Description("towns"), contexts[1])
    fuzzed = judge.fuzz(Description("towns"), [(contexts[1], np.arange(4) == 2)])
    assert simulated.shape == (4,) and simulated[2] == pytest.approx(fuzzed[0], abs=1e-5)


def test_random_directions_have_length_one_and_a_seed():
    model = opened("gpt2")
    made = random_directions(model, "layers.0.mlp.neurons", 5, seed=3)
    np.testing.assert_allclose(made.read.norm(dim=1), 1, rtol=1e-5)
    assert made.read.equal(random_directions(model, "layers.0.mlp.neurons", 5, seed=3).read)
    assert random_directions(model, "layers.0.resid_post", 2).read.shape == (2, model.anatomy.stacks[0].d_model)


def test_bad_questions_are_one_clear_error():
    with pytest.raises(InputError, match="expected one each, at least two units"):
        score_descriptions(UNITS[:1], ["x"])
    with pytest.raises(InputError, match="there is no test recall"):
        score_descriptions(UNITS[:2], ["x", "y"], tests=["recall"])
    with pytest.raises(InputError, match="is no judge"):
        score_descriptions(UNITS[:2], ["x", "y"], 3)
    with pytest.raises(InputError, match=r"the judge gave \[1\] numbers for 8 tokens"):
        score_descriptions(UNITS[:2], ["x", "y"], lambda text, tokens: [0])
