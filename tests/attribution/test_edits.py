"""Attribution under edits is attribution of the model with the edit in its weights."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch

import pellucid
from pellucid import Ablate, Scale, Steer
from pellucid.attribution import METHODS, integrated_gradients, occlusion, saliency
from pellucid.errors import InputError, Refused
from tests.attribution.hand import PROMPT, opened
from tests.attribution.test_batches import FEW
from tests.zoo import tokenizer


def halved(family):
    """The second block's MLP writes half of what it wrote."""
    module = copy.deepcopy(opened(family).module)
    linear = {"gpt2": "transformer.h.1.mlp.c_proj", "bert": "bert.encoder.layer.1.output.dense"}[family]
    with torch.no_grad():
        for parameter in module.get_submodule(linear).parameters():
            parameter.mul_(0.5)
    return pellucid.load(module, tokenizer=tokenizer(module))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_edits_or_says_why_not(family, name):
    model, method, options = opened(family), METHODS[name], dict(FEW.get(name, {}))
    prompt = PROMPT if family == "gpt2" else f"{PROMPT} <mask>"
    edits = [Scale("layers.1.mlp.out", 0.5)]
    if name in ("deeplift", "relevance"):
        with pytest.raises(Refused, match="an edit is none of them"):
            method(model, prompt, " Paris", edits=edits)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edited = method(model, prompt, " Paris", edits=edits, **options)
        merged = method(halved(family), prompt, " Paris", **options)
        plain = method(model, prompt, " Paris", **options)
    np.testing.assert_allclose(edited.values, merged.values, atol=1e-5)
    assert float(edited.score) == pytest.approx(float(merged.score), abs=1e-5) and float(plain.score) != float(
        edited.score
    )


def test_edits_at_positions_inside_the_path_and_of_several_prompts():
    model = opened("gpt2")
    v = torch.linspace(-1, 1, model.anatomy.stacks[0].d_model)
    edits = [Steer("layers.0.resid_post@2", v, 3.0), Ablate("layers.1.attn.heads.1")]
    whole = integrated_gradients(model, PROMPT, " Paris", edits=edits, baseline="pad")
    run = model.run(PROMPT, edits=edits)
    token = model.tokenizer.convert_tokens_to_ids("▁Paris")
    assert float(whole.score) == pytest.approx(float(run.logits[0, -1, token]), abs=1e-4)
    inside = integrated_gradients(model, PROMPT, " Paris", edits=edits, baseline="pad", site="layers.0.resid_post")
    assert float(inside.score) == pytest.approx(float(whole.score), abs=1e-4)  # the edit is not made twice
    assert float(inside.baseline_score) == pytest.approx(float(whole.baseline_score), abs=1e-4)
    prompts = [PROMPT, "The city of Rome is near the old country"]
    many = occlusion(model, prompts, " Paris", edits=edits, baseline="mean")
    for i, prompt in enumerate(prompts):
        np.testing.assert_allclose(
            many[i].values, occlusion(model, prompt, " Paris", edits=edits, baseline="mean").values, atol=1e-5
        )


def test_the_predicted_answer_is_the_edited_models_and_what_cannot_be_is_refused():
    model = opened("gpt2")
    edits = [Scale("layers.*.mlp.out", -9.0)]
    said = saliency(model, PROMPT, edits=edits).provenance.arguments["target"]
    best = int(model.run(PROMPT, edits=edits).logits[0, -1].argmax())
    assert said == best or model.tokenizer.decode([best]).strip() == str(said).strip()
    with pytest.raises(InputError, match="give it reference="):
        occlusion(model, PROMPT, " Paris", edits=[Ablate("layers.0.mlp.out", "mean")])
    with pytest.raises(Refused, match="under edits tokens cannot be cut out"):
        occlusion(model, PROMPT, " Paris", edits=edits, baseline="remove")
