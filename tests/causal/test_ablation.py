"""Ablation equals a slow loop of edited runs, whatever removing means."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import pellucid
from pellucid import Ablate
from pellucid.causal import ablation
from pellucid.errors import InputError
from pellucid.metrics import logit, logit_difference
from pellucid.results import Result
from tests.zoo import build, tokenizer

PROMPTS = ["The capital of France is", "The city of Italy is", "a store in France"]
PARIS = logit_difference(" Paris", " Rome")


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


@pytest.mark.parametrize("how", ["zero", "mean", "position_mean", "resample"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "mixtral"])
def test_ablation_equals_one_edited_run_per_site(family, how):
    model = opened(family)
    prompts = PROMPTS[:2]
    result = ablation(model, prompts, how=how, metric=PARIS, seed=3, progress=False)
    clean = model.score(model.run(prompts), PARIS).detach()
    for layer in result["layer"].values.tolist():
        for head in result["head"].values.tolist():
            edit = Ablate(f"layers.{layer}.attn.heads.{head}", how, seed=3)
            expected = model.score(model.run(prompts, edits=[edit]), PARIS).detach()
            here = result.sel(layer=layer, head=head)
            np.testing.assert_allclose(here.value, expected, atol=1e-4)
            assert float(here.effect) == pytest.approx(float((expected - clean).mean()), abs=1e-4)
            assert float(here.low) <= float(here.effect) <= float(here.high)


def test_the_reference_may_be_other_prompts_or_a_run_of_them():
    model = opened("gpt2")
    options = {"over": "layers.*.mlp.out", "how": "mean", "metric": PARIS, "progress": False}
    named = ablation(model, PROMPTS[0], reference=PROMPTS[1:], **options)
    run = model.run(PROMPTS[1:], keep="layers.*.mlp.out")
    assert named.allclose(ablation(model, PROMPTS[0], reference=run, **options), atol=1e-6)
    expected = model.run(PROMPTS[0], edits=[Ablate("layers.1.mlp.out", "mean", reference=run)])
    assert float(named.value.sel(layer=1)) == pytest.approx(float(model.score(expected, PARIS)), abs=1e-4)
    assert not named.allclose(ablation(model, PROMPTS[0], **options), atol=1e-4)


def test_blocks_without_the_part_are_empty_cells():
    model = opened("jamba")
    result = ablation(model, PROMPTS[0], over="layers.*.attn.heads.*", metric=PARIS, progress=False)
    with_attention = [b.index for b in model.anatomy.stacks[0].blocks if "attn.z_out" in b.taps]
    assert result["layer"].values.tolist() == with_attention


def test_several_positions_are_ablated_one_by_one():
    result = ablation(opened("gpt2"), PROMPTS[0], over="layers.0.resid_pre@*", metric=PARIS, progress=False)
    assert result.effect.dims == ("position",)
    assert result.data.sizes["position"] == 5


def test_a_single_prompt_has_no_interval():
    result = ablation(opened("gpt2"), PROMPTS[0], metric=PARIS, progress=False)
    assert "low" not in result.data
    assert "prompt" not in result.data.dims


def test_what_is_missing_is_said():
    with pytest.raises(InputError, match="needs a metric"):
        ablation(opened("gpt2"), PROMPTS[0])
    with pytest.raises(InputError, match="cannot ablate by 'noise'"):
        ablation(opened("gpt2"), PROMPTS[0], how="noise", metric=PARIS)


def test_a_result_comes_back_from_its_file(tmp_path):
    result = ablation(opened("gpt2"), PROMPTS, metric=PARIS, progress=False)
    assert Result.load(result.save(tmp_path / "ablation.zip")) == result


@pytest.mark.slow
def test_few_heads_of_smollm2_carry_the_city(smollm2):
    result = ablation(smollm2, "The Eiffel Tower is located in the city of", metric=logit(" Paris"), progress=False)
    effect = np.sort(abs(result.effect.values).ravel())[::-1]
    assert result.effect.shape == (30, 9)
    assert effect[0] > 1
    assert effect[0] > 5 * np.median(effect)
