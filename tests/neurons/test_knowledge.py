"""Knowledge neurons: the attribution equals a slow loop, refinement counts wordings, and scaling is a plain edit."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import xarray as xr

import pellucid
from pellucid.engine.edits import Replace, Scale
from pellucid.errors import InputError, Refused
from pellucid.metrics import log_odds, logit, probability
from pellucid.neurons import knowledge_attribution, knowledge_effect, knowledge_neurons
from pellucid.results import Result
from tests.zoo import build, tokenizer

PROMPT = "The capital of France is"
MASKED = "The capital of France is <mask> ."


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


def slow(model, prompt, answer, position, steps, metric=probability):
    """One full run and backward pass for each layer and step."""
    rows = []
    prefix = model.anatomy.stacks[-1].prefix
    for layer in range(len(model.anatomy.stacks[-1].blocks)):
        site = f"{prefix}layers.{layer}.mlp.neurons@{position}"
        w = model.run(prompt, keep=[site.partition("@")[0]]).tensor(site)[0, 0].detach()
        total = torch.zeros_like(w)
        for k in range(steps):
            leaf = (w * k / steps).requires_grad_()
            with torch.enable_grad():
                run = model.run(prompt, edits=[Replace(site, lambda x, leaf=leaf: leaf.expand_as(x))], grad=True)
                score = model.score(run, metric(answer, position=position))
                total += torch.autograd.grad(score.sum(), leaf)[0]
        rows.append((w * total / steps).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj", "bloom"])
def test_attributions_equal_one_full_backward_pass_for_each_layer_and_step(family):
    model = opened(family)
    found = knowledge_attribution(model, PROMPT, " Paris", steps=4)
    np.testing.assert_allclose(found.values, slow(model, PROMPT, " Paris", -1, 4), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_masked_models_are_asked_at_their_mask(family):
    model = opened(family)
    found = knowledge_attribution(model, MASKED, " Paris", steps=4)
    ids = model.inputs(MASKED).stream("").ids[0]
    position = int((ids == model.tokenizer.mask_token_id).nonzero()[0]) - len(ids)
    np.testing.assert_allclose(found.values, slow(model, MASKED, " Paris", position, 4), atol=1e-7, rtol=1e-4)


def test_decoders_of_encoder_decoders_have_neurons_too():
    model = opened("t5")
    found = knowledge_attribution(model, PROMPT, " Paris", steps=3)
    np.testing.assert_allclose(found.values, slow(model, PROMPT, " Paris", -1, 3), atol=1e-7, rtol=1e-4)


def test_many_steps_add_up_to_what_a_layer_contributes():
    """Completeness of the path: the attributions of a layer sum to its score minus that with its neurons at zero."""
    found = knowledge_attribution(opened("llama"), PROMPT, " Paris", steps=400, metric=logit(" Paris"))
    np.testing.assert_allclose(
        found.data.attribution.sum("neuron"), float(found.data.score) - found.data.nothing, atol=5e-3
    )


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(family):
    model = opened(family)
    prompts = [MASKED, "Mary went to <mask> ."] if family == "bert" else [PROMPT, "Mary went to"]
    together = knowledge_attribution(model, prompts, [" Paris", " Rome"], steps=3).data
    for i, (prompt, answer) in enumerate(zip(prompts, [" Paris", " Rome"], strict=True)):
        alone = knowledge_attribution(model, prompt, answer, steps=3).data
        np.testing.assert_allclose(together.attribution[i], alone.attribution, atol=1e-6)
        np.testing.assert_allclose(together.score[i], alone.score, atol=1e-6)


def made(array):
    """An attribution [wording, layer, neuron] given by hand."""
    data = xr.Dataset(
        {"attribution": (("prompt", "layer", "neuron"), np.array(array, dtype=float))},
        coords={"layer": [4, 5], "site": ("layer", ["layers.4.mlp.neurons", "layers.5.mlp.neurons"])},
    )
    return Result(data, kind="knowledge attribution")


def chosen(found):
    """(layer, neuron), and by name they are the same."""
    pairs = list(zip(found.layer.values.tolist(), found.unit.values.tolist(), strict=True))
    assert found.neurons.values.tolist() == [f"layers.{layer}.mlp.neurons.{n}" for layer, n in pairs]
    return pairs


def test_what_most_wordings_share_is_kept_and_the_share_moves_until_a_few_are_left():
    one, two, three, noise = (
        [1, 0.9, 0.8, 0, 0, 0],
        [1, 0.9, 0, 0.5, 0, 0],
        [1, 0, 0.8, 0, 0.5, 0],
        [0.1, 0, 0, 0, 0, 0],
    )
    found = knowledge_neurons(made([[one, noise], [two, noise], [three, noise]]), adjust=False)
    assert chosen(found) == [(4, 0)]
    moved = knowledge_neurons(made([[one, noise], [two, noise], [three, noise]]))
    assert chosen(moved) == [(4, 0), (4, 1), (4, 2)]
    assert float(moved.data.needed) == pytest.approx(0.65)
    assert moved.shared.values.tolist() == pytest.approx([1, 2 / 3, 2 / 3])
    many = knowledge_neurons(made([[[1] * 6, noise]]))
    assert len(chosen(many)) == 6  # no share tells them apart
    with pytest.raises(InputError, match="refined from knowledge attributions"):
        knowledge_neurons(found)


def test_neurons_that_other_facts_have_too_are_not_this_facts_own():
    own, noise = [1, 0.9, 0.8, 0, 0, 0], [0.0] * 6
    others = made([[[1, 0, 0, 0, 0, 0], noise], [[1, 0.5, 0, 0, 0, 0], noise], [[0, 0, 0, 1, 0, 0], noise]])
    found = knowledge_neurons(made([[own, noise]] * 3), others=others, common=0.5)
    assert chosen(found) == [(4, 1), (4, 2)]  # the first passes in two of three wordings, the second in one
    assert chosen(knowledge_neurons(made([[own, noise]] * 3), others=others, common=0.3)) == [(4, 2)]
    with pytest.raises(InputError, match=r"`others` are of \(1, 6\) neurons"):
        knowledge_neurons(
            made([[own, noise]]), others=Result(others.data.isel(layer=[0]), kind="knowledge attribution")
        )


def test_the_effect_is_the_change_of_the_log_odds_under_plain_edits():
    model = opened("llama")
    neurons = [(0, 3), (1, 17)]
    found = knowledge_effect(model, PROMPT, " Paris", neurons, draws=3).data
    clean = model.score(model.run(PROMPT), log_odds(" Paris"))
    for factor in (0.0, 2.0):
        edits = [Scale(f"layers.{layer}.mlp.neurons.{n}@-1", factor) for layer, n in neurons]
        change = model.score(model.run(PROMPT, edits=edits), log_odds(" Paris")) - clean
        assert float(found.effect.sel(group="neurons", factor=factor)) == pytest.approx(
            float(change.detach()), abs=1e-5
        )
    assert found.group.values.tolist() == ["neurons", "random", "most active"]
    names = [f"layers.{layer}.mlp.neurons.{n}" for layer, n in neurons]
    again = knowledge_effect(model, PROMPT, " Paris", names, draws=3).data
    assert found.effect.equals(again.effect)


def test_suppressing_the_neurons_with_the_largest_attribution_lowers_the_answer_more_than_random_ones():
    model = opened("gpt2")
    found = knowledge_attribution(model, PROMPT, " Paris", metric=log_odds(" Paris"))
    top = np.argsort(-found.values, axis=None)[:4]
    neurons = [(int(i), int(n)) for i, n in zip(*np.unravel_index(top, found.values.shape), strict=True)]
    effect = knowledge_effect(model, PROMPT, " Paris", neurons).data.effect.sel(factor=0.0)
    assert float(effect.sel(group="neurons")) < 0
    assert float(effect.sel(group="neurons")) < float(effect.sel(group="random"))


@pytest.mark.parametrize(
    ("family", "prompt", "answer", "message"),
    [
        ("gpt2", PROMPT, " Paris Rome", "tokens here"),
        ("bert", PROMPT, " Paris", "no mask tokens, and this model answers at one: write <mask> once"),
        ("bert", ["<mask> is in Italy", MASKED], " Paris", "answered at different places"),
    ],
)
def test_bad_questions_are_one_clear_error(family, prompt, answer, message):
    with pytest.raises(InputError, match=message):
        knowledge_attribution(opened(family), prompt, answer)


def test_models_without_neurons_are_refused_and_unknown_layers_named():
    with pytest.raises(Refused, match="no neurons to attribute to"):
        knowledge_attribution(opened("mamba"), PROMPT, " Paris")
    with pytest.raises(InputError, match="layer 7 of"):
        knowledge_effect(opened("gpt2"), PROMPT, " Paris", [(7, 0)])
    for neurons, message in (
        ([(0, 10_000)], "no neuron 10000 in layer 0"),
        ([(0, -1)], "no neuron -1"),
        ([3], "3 is no neuron"),
    ):
        with pytest.raises(InputError, match=message):
            knowledge_effect(opened("gpt2"), PROMPT, " Paris", neurons)
    with pytest.raises(InputError, match="there are no neurons"):
        knowledge_effect(opened("gpt2"), PROMPT, " Paris", [])
