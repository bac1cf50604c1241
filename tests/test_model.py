"""The face a user holds: components by index, and what a wrong name says."""

from __future__ import annotations

import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError, LoadError, SiteError
from tests.zoo import build, tokenizer


def opened(model_type: str) -> pl.Model:
    module = build(model_type)
    return pl.load(module, tokenizer=tokenizer(module))


def test_a_span_of_layers_run_alone_continues_a_run():
    model = opened("llama")
    run = model.run("The capital of France", keep=["layers.0.resid_pre", "layers.1.resid_post"])
    torch.testing.assert_close(model.layers[0:2](run.tensor("layers.0.resid_pre")), run.tensor("layers.1.resid_post"))
    assert model.layers[1].attn.heads[2].site == "layers.1.attn.heads.2"


def test_two_stacks_are_asked_for_by_name():
    model = opened("t5")
    assert len(model.encoder.layers) == len(model.decoder.layers) == 2
    with pytest.raises(SiteError, match=r"model\.encoder\.layers or model\.decoder\.layers"):
        _ = model.layers
    with pytest.raises(SiteError, match="one stack"):
        _ = opened("llama").encoder


def test_a_model_says_what_it_is_and_that_it_is_proven():
    assert "LlamaForCausalLM, 2 layers, d_model 32; proven" in repr(opened("llama"))


def test_what_is_given_in_another_form_is_taken_or_named():
    """B15: a string for an edit, a single edit and keep=None were raw errors."""
    model = opened("gpt2")
    edit = pl.Ablate("layers.0.mlp.out")
    prompt = "The capital of France"
    torch.testing.assert_close(model.run(prompt, edits=edit).logits, model.run(prompt, edits=[edit], keep=None).logits)
    with pytest.raises(InputError, match="'layers.0.mlp.out' is no edit"):
        model.run(prompt, edits=["layers.0.mlp.out"])
    with pytest.raises(LoadError, match="5 is no model"):
        pl.load(5)
