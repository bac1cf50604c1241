"""Direct logit attribution hands out exactly the logit, and to whom the formula says."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import pellucid
import pellucid as pl
from pellucid.errors import InputError, Refused
from pellucid.lenses import direct_logit_attribution
from pellucid.results import Result
from tests.zoo import build, tokenizer

PROMPT = "The capital of France is"
# pre-norm, parallel, sandwich, multipliers, logit scale, soft cap, post-norm, two stacks, experts, scans
FAMILIES = (  # noqa: SIM905
    "gpt2 llama gptj falcon gemma2 gemma3_text granite cohere olmo2 bloom mixtral deepseek_v3 "
    "openai-gpt bart t5 mamba jamba"
).split()


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_add_up_to_the_logit_difference(family, by):
    model = opened(family)
    dla = direct_logit_attribution(model, PROMPT, " Paris", against=" Rome", by=by)
    logits = model.run(PROMPT).logits[0, -1]
    paris, rome = (model.tokenizer.convert_tokens_to_ids(t) for t in ("▁Paris", "▁Rome"))
    if family == "gemma2":  # the logit before the cap
        cap = model.module.config.final_logit_softcapping
        logits = torch.atanh(logits.double() / cap) * cap
    assert float(dla.total) == pytest.approx(
        float(logits[paris] - logits[rome]), abs=1e-3 if family == "gemma2" else 1e-5
    )
    assert float(dla.contribution.sum()) == pytest.approx(float(dla.total), abs=1e-4)
    assert (dla.data.attrs["attributed"] == "logit") == (family != "gemma2")


def by_formula(model, family, position=-1):
    """u, the direction the logit difference reads with the norm's scale held, by the textbook."""
    last = model.run(PROMPT, keep="layers.1.resid_post").tensor("layers.1.resid_post")[0, position]
    paris, rome = (model.tokenizer.convert_tokens_to_ids(t) for t in ("▁Paris", "▁Rome"))
    w = model.module.lm_head.weight[paris] - model.module.lm_head.weight[rome]
    if family == "gpt2":
        norm = model.module.transformer.ln_f
        u = w * norm.weight / (last.var(correction=0) + norm.eps).sqrt()
        return u - u.mean()
    norm = model.module.model.norm
    return w * norm.weight / (last.square().mean() + norm.variance_epsilon).sqrt()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_share_is_the_product_with_the_frozen_direction(family):
    model = opened(family)
    u = by_formula(model, family)
    parts = ["embed", *(f"layers.{i}.{part}.out" for i in range(2) for part in ("attn", "mlp"))]
    heads = [f"layers.{i}.attn.heads.{h}" for i in range(2) for h in range(4)]
    run = model.run(PROMPT, keep=[*parts, *(f"{h}.out" for h in heads), "layers.*.mlp.neurons"])
    layer = direct_logit_attribution(model, PROMPT, " Paris", against=" Rome").sel(component=parts)
    np.testing.assert_allclose(layer.values, [float(run.tensor(p)[0, -1] @ u) for p in parts], atol=1e-5)
    head = direct_logit_attribution(model, PROMPT, " Paris", against=" Rome", by="head").sel(component=heads)
    np.testing.assert_allclose(head.values, [float(run.tensor(f"{h}.out")[0, -1] @ u) for h in heads], atol=1e-5)
    neuron = direct_logit_attribution(model, PROMPT, " Paris", against=" Rome", by="neuron").data
    mlp = model.module.get_submodule(model.anatomy.stacks[0].blocks[1].module).mlp
    down = mlp.c_proj.weight if family == "gpt2" else mlp.down_proj.weight.T
    expected = run.tensor("layers.1.mlp.neurons")[0, -1] * (down @ u)
    mine = neuron.contribution[(neuron.layer == 1) & (neuron.part == "mlp.neurons")]
    np.testing.assert_allclose(mine.values, expected.detach(), atol=1e-5)


def test_a_contribution_counts_behind_its_own_norm_in_sandwich_families():
    """What is added is the attention's output after its norm: heads and rest make up exactly that."""
    model = opened("gemma2")
    layer = direct_logit_attribution(model, PROMPT, " Paris").data.contribution
    head = direct_logit_attribution(model, PROMPT, " Paris", by="head").data
    whole = head.contribution[(head.layer == 1) & head.part.isin(["attn.heads", "attn.rest"])].sum()
    assert float(whole) == pytest.approx(float(layer.sel(component="layers.1.attn.out")), abs=1e-5)


def test_a_batch_gives_what_each_prompt_gives_alone():
    model = opened("gpt2")
    prompts = [PROMPT, "Mary gave"]
    together = direct_logit_attribution(model, prompts, [" Paris", " John"], by="head").data
    for i, (prompt, answer) in enumerate(zip(prompts, [" Paris", " John"], strict=True)):
        alone = direct_logit_attribution(model, prompt, answer, by="head").data
        np.testing.assert_allclose(together.contribution[i], alone.contribution, atol=1e-5)


def test_any_single_position_can_be_read():
    model = opened("llama")
    dla = direct_logit_attribution(model, PROMPT, " Paris", positions="' capital'")
    paris = model.tokenizer.convert_tokens_to_ids("▁Paris")
    assert float(dla.total) == pytest.approx(float(model.run(PROMPT).logits[0, 1, paris]), abs=1e-5)
    with pytest.raises(InputError, match="reads one position"):
        direct_logit_attribution(model, PROMPT, " Paris", positions="0:2")


def test_the_models_own_prediction_is_the_default_target():
    model = opened("gpt2")
    dla = direct_logit_attribution(model, PROMPT)
    assert float(dla.total) == pytest.approx(float(model.run(PROMPT).logits[0, -1].max()), abs=1e-5)


@pytest.mark.parametrize(("family", "why"), [("bert", "is not linear"), ("deepseek_v4", "mixes its residual streams")])
def test_families_whose_head_or_stream_is_not_linear_are_refused_by_name(family, why):
    with pytest.raises(Refused, match=why):
        direct_logit_attribution(opened(family), PROMPT, " Paris", positions=-1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
def test_an_edited_run_is_split_and_adds_up(family, by):
    model = opened(family)
    edits = [pl.Ablate("layers.0.attn.heads.1"), pl.Scale("layers.1.mlp.out", factor=0.5)]
    dla = direct_logit_attribution(model, PROMPT, " Paris", by=by, edits=edits).data
    paris = model.tokenizer("▁Paris", add_special_tokens=False)["input_ids"][-1]
    assert float(dla.total) == pytest.approx(float(model.run(PROMPT, edits=edits).logits[0, -1, paris]), abs=1e-4)
    assert abs(float(dla.gap)) < 1e-4
    if by == "head":
        gone = dla.contribution[(dla.part == "attn.heads") & (dla.layer == 0) & (dla.unit == 1)]
        assert gone.values.tolist() == [0.0]
    with pytest.raises(Refused, match="an edit adds to the residual itself"):
        direct_logit_attribution(model, PROMPT, " Paris", edits=[pl.Scale("layers.0.resid_post", factor=2.0)])


def test_an_unknown_split_is_an_error():
    with pytest.raises(InputError, match="expected one of layer, head, neuron"):
        direct_logit_attribution(opened("gpt2"), PROMPT, " Paris", by="expert")


def test_a_result_comes_back_from_its_file(tmp_path):
    dla = direct_logit_attribution(opened("gpt2"), PROMPT, " Paris", by="head")
    assert Result.load(dla.save(tmp_path / "dla.zip")) == dla


@pytest.mark.slow
def test_late_layers_write_paris_in_smollm2(smollm2):
    dla = direct_logit_attribution(
        smollm2, "The Eiffel Tower is located in the city of", " Paris", against=" Rome", by="head"
    )
    late = dla.data.contribution[dla.data.layer >= 20]
    assert float(dla.total) > 4
    assert abs(float(dla.gap)) < 1e-4
    assert float(late.sum()) > 0.8 * float(dla.total)
