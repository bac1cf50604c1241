"""Sanity checks leave the model as it was, fail methods that look at nothing, and pass those that follow the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

import pellucid
from pellucid.attribution import gradient_x_input, integrated_gradients, saliency
from pellucid.attribution.evaluation import (
    implementation_invariance,
    label_randomisation,
    reparametrised,
    target_randomisation,
    weight_randomisation,
)
from pellucid.attribution.evaluation.sanity import layers_from_the_top
from pellucid.errors import InputError
from pellucid.metrics import logit
from tests.attribution.evaluation.models import TEXTS, opened
from tests.zoo import build, tokenizer


def by_length(model, prompt, target=None, *, against=None, players="token"):
    """A 'method' that never looks at the model: the longer the word the more."""
    from pellucid.attribution.case import Case
    from pellucid.attribution.players import Players

    case = Case.of(model, prompt, target)
    parts = Players.of(case, players)
    values = np.array([len(label) + i / 100 for i, label in enumerate(parts.labels)])
    return case.result("", {"attribution": ("player", values)}, labels=parts.labels)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "llama"])
def test_every_parameter_belongs_to_one_layer_and_the_head_comes_first(family):
    model = opened(family)
    layers = layers_from_the_top(model)
    names = [name for name, _ in layers]
    flat = [name for _, parameters in layers for name in parameters]
    assert sorted(flat) == sorted(name for name, _ in model.module.named_parameters())
    assert names[-1] == "embedding"
    blocks = [name for name in names if "layers." in name]
    first = "decoder.layers" if family == "t5" else "layers"
    assert blocks[0] == f"{first}.1"
    assert blocks[-1].endswith("layers.0")


def test_a_method_that_ignores_the_model_keeps_its_scores_at_every_depth_and_one_that_does_not_loses_them():
    model = opened("gpt2")
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    found = weight_randomisation(model, TEXTS[:6], methods={"length": by_length, "gradient": gradient_x_input}, seed=1)
    np.testing.assert_allclose(found.correlation.sel(technique="length"), 1)
    assert abs(float(found.correlation.sel(technique="gradient", depth="embedding"))) < 0.6
    assert found.depth.values.tolist()[-1] == "embedding"
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())


def test_the_weights_stay_even_if_the_method_fails():
    model = opened("gpt2")
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    calls = []

    def fails(*args, **options):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("in the middle")
        return by_length(*args, **options)

    with pytest.raises(RuntimeError, match="in the middle"):
        weight_randomisation(model, TEXTS[:1], methods={"fails": fails})
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())


def test_layers_are_lost_one_after_another_from_the_top():
    """At the first depth only the head is another, at the last nothing is left."""
    model, seen = opened("llama"), []

    def spies(model, prompt, target=None, *, against=None, players="token"):
        seen.append({name: p.clone() for name, p in model.module.named_parameters()})
        return by_length(model, prompt, target, players=players)

    weight_randomisation(model, TEXTS[:1], methods={"spies": spies})
    groups = [parameters for _, parameters in layers_from_the_top(model)]
    for depth, weights in enumerate(seen):
        lost = {name for group in groups[:depth] for name in group}
        for name, value in weights.items():
            assert torch.equal(value, seen[0][name]) == (name not in lost)


def test_the_target_matters_to_gradients_and_not_to_the_length_of_words():
    found = target_randomisation(
        opened("gpt2"), TEXTS[:5], methods={"length": by_length, "gradient": gradient_x_input}, draws=2
    )
    np.testing.assert_allclose(found.correlation.sel(technique="length"), 1)
    assert (found.correlation.sel(technique="gradient").values < 0.8).all()


def test_a_classifier_is_compared_with_one_trained_on_other_labels():
    def classifier(seed):
        torch.manual_seed(seed)
        bert = build("bert", num_labels=3)
        return pellucid.load(BertForSequenceClassification(bert.config).eval(), tokenizer=tokenizer(bert))

    one, other = classifier(0), classifier(1)
    methods = {"length": by_length, "gradient": gradient_x_input}
    same = label_randomisation(one, one, TEXTS[:4], methods=methods)
    np.testing.assert_allclose(same.correlation.values, 1)
    found = label_randomisation(one, other, TEXTS[:4], methods=methods)
    np.testing.assert_allclose(found.correlation.sel(technique="length"), 1)
    assert float(found.correlation.sel(technique="gradient")[0]) < 0.9
    with pytest.raises(InputError, match="other tokens"):
        label_randomisation(opened("gpt2"), opened("bert"), TEXTS[:1], " Paris", methods=methods)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "t5"])
def test_integrated_gradients_do_not_change_with_the_basis_and_gradient_norms_do(family):
    model = opened(family)
    found = implementation_invariance(
        model,
        TEXTS[:2],
        logit(" Paris") if family == "bert" else None,  # BERT without a mask is asked by a metric
        methods={"IG": integrated_gradients, "GxI": gradient_x_input, "norm": saliency},
    )
    deviation = dict(zip(found.technique.values, found.deviation.values, strict=True))
    assert deviation["GxI"] < 1e-3
    assert deviation["IG"] < 1e-2
    assert deviation["norm"] > 0.05


def test_the_twin_is_the_same_function_with_other_weights():
    model = opened("bert")
    twin = reparametrised(model)
    with torch.no_grad():
        torch.testing.assert_close(twin.run(TEXTS[0]).logits, model.run(TEXTS[0]).logits, atol=1e-4, rtol=0)
    assert not torch.equal(twin.module.get_input_embeddings().weight, model.module.get_input_embeddings().weight)
    with pytest.raises(InputError, match="another function"):
        implementation_invariance(opened("gpt2"), TEXTS[:1], twin=opened("gpt2", seed=5), methods={"l": by_length})
