"""Features are harvested, and put on pages, as neurons are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

import pellucid
from pellucid.errors import InputError
from pellucid.neurons import Units, harvest, neuron_page
from pellucid.neurons.dictionaries import Dictionary, TopK
from tests.zoo import build, tokenizer

SITE = "layers.0.resid_post"
TEXTS = ["the cat sat on the mat and looked at the dog", "a bird flew over the house", "one two three four five"]


def test_a_feature_has_its_strongest_tokens_and_its_page(tmp_path):
    module = build("gpt2")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    g = torch.Generator().manual_seed(0)
    decoder = normalize(torch.randn(12, 32, generator=g), dim=1)
    d = Dictionary(decoder.T.contiguous(), torch.zeros(12), decoder, torch.zeros(32), TopK(3), SITE)
    found = harvest(model, TEXTS, Units(SITE, d, name="features"), path=tmp_path)
    f = d.features(model, TEXTS).data.activation
    feature = int(f.feature[0])
    best = found.top(f"features.{feature}")[0]
    assert best.value == pytest.approx(float(f.sel(feature=feature).max()), rel=1e-4)
    assert best.value == pytest.approx(float(f.sel(feature=feature)[best.prompt, best.position]), rel=1e-4)
    page = neuron_page(model, found, f"features.{feature}")
    assert float(page["activation"].max()) == pytest.approx(best.value, rel=1e-3)
    other = replace(d, encoder=d.encoder + 1)
    with pytest.raises(InputError):
        harvest(model, TEXTS, Units(SITE, other, name="features"), path=tmp_path)
    with pytest.raises(InputError, match="this dictionary belongs to other weights"):
        harvest(model, TEXTS, Units(SITE, replace(d, digest="0" * 64), name="features"))
