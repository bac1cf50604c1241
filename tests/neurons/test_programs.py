"""Every result of these rooms is given again by the program it prints, from the saved result alone."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.neurons.dictionaries import Dictionary, SparseAutoencoder, TopK, TopKLoss
from tests.test_technique import again
from tests.zoo import build, tokenizer

SITE, NEURONS = "layers.0.resid_post", "layers.0.mlp.neurons"
TEXTS = [
    "The capital of France is Paris",
    "Mary and John went to the store",
    "he gave a drink to Mary",
    "he is in Rome",
] * 4
FACT = ["The capital of France is", "The city of"]


@cache
def model():
    module = build("llama")
    return pl.load(module, tokenizer=tokenizer(module))


def harvested(sites=NEURONS):
    return pl.neurons.harvest(model(), TEXTS, sites, top=6, sample=40)


def dictionary():
    g = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(12, 32, generator=g), dim=1)
    return Dictionary(decoder.T.contiguous(), torch.zeros(12), decoder, torch.zeros(32), TopK(3), SITE)


def described():
    contexts = pl.neurons.read_contexts(model(), harvested(), [f"{NEURONS}.1", f"{NEURONS}.2"], top=8, random=10)
    return pl.neurons.score_descriptions(contexts, pl.neurons.describe(contexts), draws=1)


def selected():
    places = [(i, 0, len(text.split()[0])) for i, text in enumerate(TEXTS)]
    labels = ["name" if text[0].isupper() else "other" for text in TEXTS]
    return pl.neurons.neuron_selectivity(model(), TEXTS, places, labels, NEURONS, draws=3, best=2)


def explained():
    tags = pl.neurons.Concepts.labels(["DET", "NOUN", "VERB", "ADJ"] * 20)
    return pl.neurons.compositional(np.random.default_rng(0).random((80, 3)), tags, quantile=0.8)


def trained():
    rows = torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    sae = SparseAutoencoder(SITE, features=16, objective=TopKLoss(4), steps=5, batch=64).fit(rows)
    return pl.neurons.crowding(model(), directions={"learnt": sae.dictionary_.decoder})


CALLS = {
    "page": lambda: pl.neurons.neuron_page(model(), harvested(), f"{NEURONS}.3", contexts=2),
    "page of a feature": lambda: pl.neurons.neuron_page(
        model(), harvested(pl.neurons.Units(SITE, dictionary(), name="features")), "features.2", contexts=2
    ),
    "words": lambda: pl.neurons.logit_effects(model(), f"{NEURONS}.3", top=3),
    "words of directions": lambda: pl.neurons.logit_effects(model(), {"first": torch.eye(32)[0]}, top=3),
    "selectivity": selected,
    "descriptions": described,
    "formulas": explained,
    "clusters by activation": lambda: pl.neurons.unit_clusters(
        pl.neurons.UnitVectors.activations(harvested()), pl.neurons.UnitClusters(3, "kmeans"), draws=2
    ),
    "clusters by weights": lambda: pl.neurons.unit_clusters(
        pl.neurons.UnitVectors.weights(model(), NEURONS), pl.neurons.UnitClusters(3), draws=2
    ),
    "inputs": lambda: pl.neurons.activating_inputs(
        model(), f"{NEURONS}.3", length=3, steps=2, restarts=2, texts=TEXTS, exchanges=pl.neurons.Exchanges(8, 4)
    ),
    "attribution": lambda: pl.neurons.knowledge_attribution(model(), FACT, [" Paris", " Rome"], steps=2),
    "knowledge neurons": lambda: pl.neurons.knowledge_neurons(
        pl.neurons.knowledge_attribution(model(), FACT, " Paris", steps=2)
    ),
    "effect": lambda: pl.neurons.knowledge_effect(model(), FACT[0], " Paris", [(0, 3), (1, 17)], draws=2),
    "toy": lambda: pl.neurons.toy_model([0.5, 0.9], features=4, hidden=2, steps=3),
    "crowding": lambda: pl.neurons.crowding(model()),
    "crowding of a dictionary": trained,
    "features": lambda: dictionary().features(model(), TEXTS[:2]),
    "quality": lambda: pl.neurons.dictionaries.dictionary_quality(model(), dictionary(), TEXTS, tokens=64, context=16),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_program_of_a_result_gives_it_again(name, tmp_path, monkeypatch):
    result = CALLS[name]()
    found = again(result, tmp_path, monkeypatch, module=model().module, tokenizer=model().tokenizer)
    assert found.allclose(result, atol=1e-6)
    assert found.provenance.call == result.provenance.call
    assert result.provenance.digest == (None if name in ("toy", "formulas") else model().digest)
