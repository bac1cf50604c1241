"""What an adapter, or training, changed: against raw runs of both models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError, Refused
from tests.zoo import build, tokenizer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
PROMPTS = ["The capital of France is", "Mary and John went to the"]
METRIC = pl.metrics.logit_difference(" Paris", " Rome")


def adapted(at: list[str], layers: list[int]) -> tuple[pl.Model, pl.Model]:
    """A model with an adapter, and its base."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=at, layers_to_transform=layers, init_lora_weights=False, r=2)
    module = peft.get_peft_model(build("llama"), config).eval()
    return pl.load(module, tokenizer=tokenizer()), pl.load(build("llama"), tokenizer=tokenizer())


def test_distances_and_effects_are_those_of_both_models_run_by_hand() -> None:
    model, base = adapted(["o_proj", "down_proj"], [0, 1])
    sites = ["layers.0.attn.out", "layers.1.mlp.out"]
    found = pl.causal.model_difference(model, PROMPTS, base, over=sites, metric=METRIC).data
    for i, site in enumerate(sites):
        for row, prompt in enumerate(PROMPTS):
            a, b = (each.run(prompt, keep=site) for each in (base, model))
            x, y = a.tensor(site).flatten().detach(), b.tensor(site).flatten().detach()
            put = base.run(prompt, edits=[pl.Patch(site, b.tensor(site).detach())])
            np.testing.assert_allclose(found["value"][i, row], float(base.score(put, METRIC)), atol=1e-5)
            assert float((y - x).norm()) > 0
        each = [
            float((b - a).norm() / a.norm())
            for a, b in (
                tuple(m.run(p, keep=site).tensor(site).flatten().detach() for m in (base, model)) for p in PROMPTS
            )
        ]
        np.testing.assert_allclose(found["distance"][i], np.mean(each), rtol=1e-4)
    total = [float(model.score(model.run(p), METRIC) - base.score(base.run(p), METRIC)) for p in PROMPTS]
    np.testing.assert_allclose(found["total_effect"], np.mean(total), atol=1e-5)
    assert (found["control"] > 0).all()


def test_an_adapter_in_one_layer_is_found_there_and_switching_it_off_is_the_base() -> None:
    model, base = adapted(["down_proj"], [1])
    digest = model.digest
    alone = pl.causal.model_difference(model, PROMPTS)
    given = pl.causal.model_difference(model, PROMPTS, base).data
    data = alone.data
    for name in ("distance", "effect", "without", "control", "divergence"):
        np.testing.assert_allclose(data[name], given[name], atol=1e-5)
    assert float(data["distance"].sel(layer=0)) == 0
    assert float(data["distance"].sel(layer=1)) > 0
    np.testing.assert_allclose(data["share"].sel(layer=[0, 1]), [0, 1], atol=1e-4)
    np.testing.assert_allclose(data["divergence"].mean(), data["corrupted"].mean(), rtol=1e-5)
    assert model.digest == digest
    alone.to_frame()
    assert "Model" not in alone.provenance.code() or alone.provenance.code()


def test_models_that_do_not_fit_or_do_not_differ_and_models_without_adapters_say_so() -> None:
    model, base = adapted(["down_proj"], [1])
    with pytest.raises(InputError, match="not of one shape"):
        pl.causal.model_difference(model, PROMPTS, pl.load(build("gpt2"), tokenizer=tokenizer()))
    with pytest.raises(InputError, match="no difference to explain"):
        pl.causal.model_difference(base, PROMPTS, pl.load(build("llama"), tokenizer=tokenizer()))
    with pytest.raises(Refused, match="no adapters"):
        pl.causal.model_difference(base, PROMPTS)


def test_fine_tuned_weights_are_compared_as_adapters_are(tmp_path: Any) -> None:
    _, base = adapted(["down_proj"], [1])
    name = "model.layers.0.self_attn.o_proj.weight"
    model = base.changed(pl.changed.Added(name, torch.ones(32, 1), torch.ones(1, 32)))
    found = pl.causal.model_difference(model, PROMPTS, base, over="layers.*.attn.heads.*").data
    assert float(found["distance"].sel(layer=0).max()) == 0  # heads are met before what was changed
    assert float(found["distance"].sel(layer=1).min()) > 0
    by_token = pl.causal.model_difference(model, PROMPTS[:1], base, over="layers.*.resid_post@*").data
    assert by_token["distance"].dims == ("layer", "position")
