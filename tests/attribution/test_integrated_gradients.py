"""Integrated gradients equal Captum's, add up to the change of the score, and say from where."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from hypothesis import given, settings
from hypothesis import strategies as st

import pellucid
from pellucid.attribution import integrated_gradients
from pellucid.attribution.baseline import Baseline
from pellucid.attribution.case import Case
from pellucid.attribution.integrated_gradients import _judge
from pellucid.attribution.path import Embedded
from pellucid.attribution.quadrature import quadrature, refine
from pellucid.errors import InputError, Refused
from pellucid.metrics import log_odds, logit, logit_difference
from pellucid.results import Result
from tests.zoo import build, tokenizer

PROMPT = "The capital of France is"
RULES = {
    "gauss-legendre": "gausslegendre",
    "riemann-left": "riemann_left",
    "riemann-right": "riemann_right",
    "riemann-middle": "riemann_middle",
    "trapezoid": "riemann_trapezoid",
}


@cache
def opened(family, **config):
    module = build(family, **config)
    return pellucid.load(module, tokenizer=tokenizer(module))


def captum(model, baseline_id, answer, rule, steps):
    """Captum's integrated gradients of one logit at the last position, over the word embeddings."""
    embedding = model.module.get_input_embeddings()
    inputs = model.inputs(PROMPT)
    ids = inputs.stream("").ids
    there = torch.full_like(ids, baseline_id)
    special = torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids))
    there = torch.where(special, ids, there)

    def score(embeddings):
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        return model.module(inputs_embeds=embeddings, attention_mask=mask).logits[:, -1, answer]

    found = IntegratedGradients(score).attribute(
        embedding(ids).detach(), embedding(there).detach(), n_steps=steps, method=RULES[rule]
    )
    return found.sum(-1)[0].detach().numpy()


@pytest.mark.parametrize("rule", [r for r in RULES if r != "trapezoid"])
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_attributions_equal_captums_for_the_same_rule_and_steps(family, rule):
    model = opened(family)
    paris = model.tokenizer.convert_tokens_to_ids("▁Paris")
    mine = integrated_gradients(
        model, PROMPT, logit(" Paris"), baseline="pad", rule=rule, steps=20, tolerance=1e9, keep_first=False
    )
    np.testing.assert_allclose(mine.values, captum(model, 0, paris, rule, 20), atol=1e-5)
    assert int(mine.steps) == 20
    assert mine.data.attrs["baseline"] == "pad"


@given(rule=st.sampled_from(sorted(RULES)), steps=st.integers(1, 40))
def test_every_rule_weighs_the_whole_path_and_integrates_lines_if_it_is_symmetric(rule, steps):
    points, weights = quadrature(rule, steps)
    assert weights.sum() == pytest.approx(1)
    assert (points >= 0).all()
    assert (points <= 1).all()
    if rule in ("gauss-legendre", "riemann-middle", "trapezoid"):
        assert (weights * points).sum() == pytest.approx(0.5)


@given(
    words=st.lists(
        st.sampled_from(["the", "of", "is", "in", "Paris", "Rome", "Mary", "John", "gave", "drink"]),
        min_size=1,
        max_size=6,
    ),
    family=st.sampled_from(["gpt2", "llama", "bert", "gemma2"]),
    baseline=st.sampled_from(["pad", "mean", " to"]),
)
@settings(max_examples=25, deadline=None)
def test_attributions_add_up_to_the_change_of_the_score(words, family, baseline):
    found = integrated_gradients(
        opened(family), " ".join(words), logit_difference(" Paris", " Rome"), baseline=baseline
    )
    change = float(found.score - found.baseline_score)
    assert float(found.attribution.sum()) == pytest.approx(change + float(found.gap), abs=1e-5)
    assert abs(float(found.gap)) <= 0.01 * max(abs(change), 0.1 * float(abs(found.attribution).sum())) + 2e-5


def test_steps_go_where_the_path_is_rough():
    """One token's score jumps within a ten-thousandth of the path: 500 even steps do not see how high."""

    def height(a):
        return torch.sigmoid((a - 0.3) * 1e5)

    def slopes(at):
        h = height(at.double())
        return torch.stack([h * (1 - h) * 1e5, torch.ones_like(h)], 1)

    found, used = refine(slopes, lambda at: height(at.double()) + at.double(), tolerance=1e-3, limit=2048)
    np.testing.assert_allclose(found, [1, 1], atol=5e-3)
    assert used < 500
    points, weights = quadrature("riemann-middle", 500)
    assert abs(float(torch.tensor(weights) @ slopes(torch.tensor(points))[:, 0]) - 1) > 0.5


def test_a_baseline_prompt_leaves_what_both_prompts_share_without_attribution():
    found = integrated_gradients(opened("gpt2"), PROMPT, " Paris", baseline="The capital of Italy is")
    assert (found.values[[0, 1, 2, 4]] == 0).all()
    assert found.values[3] != 0
    assert found.baseline_token.values.tolist()[3].strip() == "Italy"


def test_special_tokens_keep_their_place_and_receive_nothing():
    found = integrated_gradients(opened("bert"), PROMPT, logit(" Paris"), baseline=" the")
    assert found.special.values.tolist() == [True, *[False] * 5, True]
    assert found.values[0] == found.values[-1] == 0
    moved = integrated_gradients(opened("bert"), PROMPT, logit(" Paris"), baseline=" the", keep_special=False)
    assert moved.values[0] != 0


def test_encoder_decoders_are_attributed_to_their_source_tokens():
    model = opened("t5")
    found = integrated_gradients(model, PROMPT, " Paris", baseline="pad", decoder="is")
    assert found.data.sizes["position"] == 6
    assert abs(float(found.gap)) < 0.01 * float(abs(found.attribution).sum())


def test_any_metric_can_be_attributed():
    model = opened("gpt2")
    found = integrated_gradients(model, PROMPT, log_odds(" Paris"), baseline="pad")
    assert float(found.score) == pytest.approx(float(model.score(model.run(PROMPT), log_odds(" Paris"))), abs=1e-5)
    by_name = integrated_gradients(model, PROMPT, " Paris", baseline="pad")
    assert by_name.allclose(integrated_gradients(model, PROMPT, logit(" Paris"), baseline="pad"))
    own = integrated_gradients(model, PROMPT, lambda logits: logits[:, -1].logsumexp(-1), baseline="pad")
    assert np.isfinite(own.values).all()


def test_the_zero_baseline_is_refused_where_the_first_norm_has_no_gradient():
    with pytest.raises(Refused, match="divides zero by zero"):
        integrated_gradients(opened("llama"), PROMPT, " Paris", baseline="zero")
    assert np.isfinite(integrated_gradients(opened("gpt2"), PROMPT, " Paris", baseline="zero").values).all()


def test_too_few_steps_are_warned_about_and_the_gap_is_reported():
    with pytest.warns(UserWarning, match="miss the change of the score"):
        found = integrated_gradients(opened("llama"), PROMPT, " Paris", baseline="pad", steps=1, rule="riemann-left")
    assert abs(float(found.gap)) > 0.01 * float(abs(found.attribution).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "The capital"}, "the baseline has 2 tokens and the prompt 5"),
        ({"rule": "simpson", "steps": 4}, "unknown rule 'simpson'"),
        ({"steps": 0}, "0 steps"),
        ({"rule": "trapezoid"}, "needs a number of steps"),
        ({"target": log_odds(" Paris"), "against": " Rome"}, "against= goes with a target token"),
    ],
)
def test_bad_arguments_are_one_clear_error(options, message):
    with pytest.raises(InputError, match=message):
        integrated_gradients(opened("gpt2"), PROMPT, **{"target": " Paris", **options})


def test_a_missing_padding_token_is_named():
    module = build("gpt2")
    bare = tokenizer(module)
    bare.pad_token = bare.mask_token = None
    model = pellucid.load(module, tokenizer=bare)
    with pytest.raises(InputError, match="has no pad token: choose baseline='mean'"):
        integrated_gradients(model, PROMPT, " Paris", baseline="pad")
    assert integrated_gradients(model, PROMPT, " Paris").data.attrs["baseline"] == "mean"


def test_nothing_is_left_behind_on_the_model():
    model = opened("gpt2")
    before = model.run(PROMPT).logits
    integrated_gradients(model, PROMPT, " Paris", baseline="pad", steps=4, tolerance=1e9)
    assert torch.equal(model.run(PROMPT).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert all(p.grad is None for p in model.module.parameters())


def test_a_result_comes_back_from_its_file(tmp_path):
    found = integrated_gradients(opened("gpt2"), PROMPT, " Paris", baseline="pad")
    assert Result.load(found.save(tmp_path / "ig.zip")) == found


@pytest.mark.slow
def test_in_smollm2_the_answer_rests_on_the_words_that_name_the_tower(smollm2):
    found = integrated_gradients(
        smollm2, "The Eiffel Tower is located in the city of", " Paris", against=" Rome",
        baseline="The Colosseum is located in the city of",
    )  # fmt: skip
    assert abs(float(found.gap)) < 0.01 * float(abs(found.attribution).sum())
    assert (found.values[1:4] > 1).all()
    assert (found.values[[0, *range(4, 10)]] == 0).all()


def test_in_a_decoder_without_a_mark_in_front_the_first_token_stays_unless_the_baseline_is_a_prompt():
    model = opened("gpt2")
    kept = integrated_gradients(model, PROMPT, " Paris", baseline="pad")
    assert (
        kept.values[0] == 0 and kept.baseline_token.values[0] == "The" and kept.data.attrs["kept"] == "the first token"
    )
    ids = model.inputs(PROMPT).stream("").ids[0].clone()
    ids[1:] = model.tokenizer.pad_token_id
    np.testing.assert_allclose(
        kept.values, integrated_gradients(model, PROMPT, " Paris", baseline=ids).values, atol=1e-6
    )
    moved = integrated_gradients(model, PROMPT, " Paris", baseline="pad", keep_first=False)
    assert moved.values[0] != 0 and "kept" not in moved.data.attrs
    other = integrated_gradients(model, PROMPT, " Paris", baseline="Mary capital of Italy is")
    assert "kept" not in other.data.attrs
    masked = integrated_gradients(opened("bert"), PROMPT, logit(" Paris"), baseline="mean")  # no decoder
    assert "kept" not in masked.data.attrs and masked.values[1] != 0


def test_the_gap_is_judged_against_the_change_it_misses_a_part_of_and_a_contrast_is_proposed():
    """Attributions that nearly cancel: a gap that is small beside them is large beside what they explain (A18)."""
    model = opened("gpt2")
    case = Case.of(model, PROMPT, " Paris")
    start = Baseline.of(Embedded(case), "pad")
    ends, attribution = np.array([[3.0], [3.1]]), np.array([[300.0, -299.87]])
    gap = attribution.sum(-1) - (ends[1] - ends[0])
    with pytest.warns(UserWarning, match=r"by 0\.03 after 24 gradients.*they nearly cancel; a contrast.*against="):
        _judge(case, start, attribution, ends, gap, 24, 0.01, fixed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _judge(case, start, np.array([[0.2, -0.1]]), ends, np.array([1e-4]), 24, 0.01, fixed=True)


@pytest.mark.slow
def test_in_smollm2_the_defaults_find_what_the_answer_rests_on_for_few_gradients(smollm2):
    found = integrated_gradients(smollm2, PROMPT, " Paris", against=" Rome")
    assert int(found.gradients) <= 152
    assert abs(float(found.gap)) <= 0.01 * abs(float(found.score - found.baseline_score)) + 1e-3
    assert found.values[0] == 0 and (found.values[1:] > 0).all()
