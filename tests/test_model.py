"""The face a user holds: components by index, and what a wrong name says."""

from __future__ import annotations

import pytest
import torch

import pellucid as pl
from pellucid.errors import SiteError
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
