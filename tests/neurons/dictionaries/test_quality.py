"""Loss recovered is 1 for a dictionary that explains everything, 0 for one that knows the mean, and as defined between."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import pellucid
from pellucid.engine.edits import Replace
from pellucid.errors import InputError
from pellucid.neurons.dictionaries import Dictionary, ReLU, TopK, dictionary_quality
from tests.zoo import build, tokenizer

SITE = "layers.0.resid_post"
TEXTS = ["the cat sat on the mat and looked at the dog", "a bird flew over the house", "one two three four five"] * 6


@pytest.fixture(scope="module")
def model():
    module = build("gpt2", initializer_range=0.5)
    return pellucid.load(module, tokenizer=tokenizer(module))


def both_signs(d):
    """Explains everything: a feature for each direction of each axis."""
    eye = torch.eye(d)
    rows = torch.cat([eye, -eye])
    return Dictionary(rows.T.contiguous(), torch.zeros(2 * d), rows, torch.zeros(d), ReLU(), SITE)


def token_rows(model):
    return [list(row.ids) for row in pellucid.Corpus(TEXTS, context=16, tokens=400).rows(model)]


def quality(model, d):
    return dictionary_quality(model, d, TEXTS, tokens=400, context=16, batch=5)


def test_a_complete_dictionary_recovers_all_and_the_mean_nothing(model):
    d = both_signs(32)
    found = quality(model, d)
    assert found.recovered.item() == pytest.approx(1, abs=1e-4)
    assert found.explained.item() == pytest.approx(1, abs=1e-5)
    assert found.l0.item() == pytest.approx(32)
    rows = token_rows(model)
    x = model.run(rows, keep=[SITE]).tensor(SITE)
    nothing = replace(d, encoder=torch.zeros(32, 64), decoder_bias=x.flatten(0, 1).mean(0).detach())
    found = quality(model, nothing)
    assert found.recovered.item() == pytest.approx(0, abs=1e-4)
    assert found.explained.item() == pytest.approx(0, abs=1e-5)
    assert found.dead.item() == 1


def test_losses_are_those_of_plain_runs_under_the_plain_edits(model):
    d = replace(both_signs(32), activation=TopK(5))
    found = quality(model, d)
    rows = token_rows(model)
    x = model.run(rows, keep=[SITE]).tensor(SITE)

    def loss(edits):
        logits = model.run(rows, edits=edits).logits
        return float(cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(rows)[:, 1:].flatten()).detach())

    mean = x.flatten(0, 1).mean(0)
    edits = [[], d.splice(), [Replace(SITE, lambda x: mean.expand_as(x))], [Replace(SITE, torch.zeros_like)]]
    clean, spliced, gone, zero = (loss(e) for e in edits)
    np.testing.assert_allclose(found.loss.values[:4], [clean, spliced, gone, zero], rtol=1e-4)
    assert found.recovered.item() == pytest.approx((gone - spliced) / (gone - clean), rel=1e-3)
    assert found.recovered_from_zero.item() == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)
    assert found.low.item() <= found.recovered.item() <= found.high.item()
    y = d.decode(d.encode(x))
    left = (x - y).pow(2).sum() / (x - mean).pow(2).sum()
    assert found.explained.item() == pytest.approx(1 - float(left.detach()), abs=1e-4)


def test_rows_beyond_the_limit_are_in_no_number(model):
    rows = token_rows(model)
    norms = model.run(rows, keep=[SITE]).tensor(SITE).detach().norm(dim=-1)
    limit = float(norms.median())
    found = quality(model, replace(both_signs(32), activation=TopK(5), limit=limit))
    assert found.beyond.item() == pytest.approx(float((norms > limit).float().mean()), abs=1e-3)
    assert found.l0.item() <= 5


def test_models_that_predict_no_next_token_are_refused():
    module = build("bert")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    with pytest.raises(InputError, match="give a causal language model"):
        quality(model, both_signs(32))
    with pytest.raises(InputError, match="not one row"):
        dictionary_quality(pellucid.load(m := build("gpt2"), tokenizer=tokenizer(m)), both_signs(32), ["a cat"])


def test_a_transcoder_is_measured_where_it_writes(model):
    g = torch.Generator().manual_seed(0)
    d = Dictionary(
        torch.randn(32, 40, generator=g), torch.zeros(40), torch.randn(40, 32, generator=g), torch.zeros(32),
        TopK(4), "layers.1.resid_mid", "layers.1.mlp.out",
    )  # fmt: skip
    found = quality(model, d)
    rows = token_rows(model)
    run = model.run(rows, keep=[d.site, d.writes])
    x, y = run.tensor(d.site).detach(), run.tensor(d.writes).detach()
    logits = model.run(rows, edits=d.splice()).logits.detach()
    spliced = cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(rows)[:, 1:].flatten())
    assert float(found.loss.sel(state="spliced")) == pytest.approx(float(spliced), rel=1e-4)
    left = (y - d.decode(d.encode(x))).pow(2).sum() / (y - y.flatten(0, 1).mean(0)).pow(2).sum()
    assert found.explained.item() == pytest.approx(1 - float(left), rel=1e-3)
