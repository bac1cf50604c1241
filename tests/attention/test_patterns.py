"""Patterns are what the model attends with, in every family, or they are refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pellucid import Ablate
from pellucid.attention import norm_weighted, patterns, relevance, rollout
from pellucid.errors import InputError, Refused
from pellucid.results import Result
from tests.attention.opening import PROMPT, TARGET, native, opened


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "mistral", "gemma2", "gpt_neox", "qwen3", "bart", "mbart"])
def test_patterns_are_what_the_eager_model_returns(family):
    model = opened(family)
    target = TARGET if family in ("bart", "mbart") else None
    found = patterns(model, PROMPT, decoder=target)
    expected, _ = native(model, PROMPT, target)
    assert set(found.data.data_vars) == set(expected)
    for name, layers in expected.items():
        np.testing.assert_allclose(found[name].values, torch.stack(layers).numpy(), atol=1e-6)


def test_grouped_queries_have_one_pattern_per_query_head():
    model = opened("llama")
    attention = model.anatomy.stacks[0].blocks[0].attentions["attn"]
    assert attention.kv_heads < attention.heads
    assert patterns(model, PROMPT).pattern.sizes["head"] == attention.heads


def test_an_encoder_decoder_has_three_kinds_with_their_own_tokens():
    found = patterns(opened("t5"), PROMPT, decoder=TARGET)
    assert found.encoder.dims == ("encoder_layer", "encoder_head", "source_query", "source_key")
    assert found.decoder.dims == ("layer", "head", "query", "key")
    assert found.cross.dims == ("layer", "head", "query", "source_key")
    assert found.source_key_token.values.tolist()[:2] == ["The", "capital"]
    for kind in (found.encoder, found.decoder, found.cross):
        np.testing.assert_allclose(kind.sum(kind.dims[-1]).values, 1, atol=1e-5)


def test_sinks_take_their_share_of_a_row():
    sums = patterns(opened("gpt_oss"), PROMPT).pattern.sum("key").values
    assert (sums < 1).all()


def test_rows_are_shared_out_over_the_past_of_a_causal_model():
    found = patterns(opened("gpt2"), PROMPT).pattern.values
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert (np.triu(found, 1) == 0).all()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_in_the_patterns(family, side):
    model = opened(family)
    ids = model.inputs(PROMPT).stream("").ids
    pads, none = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    parts = ([pads, ids], [none, torch.ones_like(ids)])
    padded, mask = (torch.cat(p if side == "left" else p[::-1], 1) for p in parts)
    given = {"input_ids": padded, "attention_mask": mask}
    if family == "gpt2":
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    elif side == "left":
        pytest.skip("an encoder's positions count the padding")
    found = patterns(model, given)
    np.testing.assert_allclose(found.values, patterns(model, PROMPT).values, atol=1e-5)


def test_edits_are_seen():
    found = patterns(opened("gpt2"), PROMPT, edits=[Ablate("layers.1.attn.heads.2.pattern")])
    assert (found.sel(layer=1, head=2).values == 0).all()
    assert (found.sel(layer=1, head=1).values.sum(-1) > 0.99).all()


def test_layers_without_attention_are_left_out():
    found = patterns(opened("jamba"), PROMPT)
    blocks = opened("jamba").anatomy.stacks[0].blocks
    assert found.layer.values.tolist() == [b.index for b in blocks if "attn" in b.attentions]
    assert len(found.layer) < len(blocks)


@pytest.mark.parametrize("family", ["longformer", "mamba"])
def test_attention_without_a_matrix_is_refused_by_name(family):
    with pytest.raises(Refused, match=r"layers\.0\.attn" if family == "longformer" else "none of its layers attends"):
        patterns(opened(family), PROMPT)


def test_several_prompts_are_refused_with_advice():
    with pytest.raises(InputError, match="one prompt at a time, got 2"):
        patterns(opened("gpt2"), [PROMPT, "Rome is"])


@pytest.mark.parametrize(("prompt", "words"), [("", "the prompt is empty"), ("the " * 600, "context holds")])
def test_prompts_that_cannot_be_run_are_one_clear_error(prompt, words):
    for method in (patterns, rollout, norm_weighted, relevance):
        with pytest.raises(InputError, match=words):
            method(opened("gpt2"), prompt)


def test_a_result_is_saved_and_read_again(tmp_path):
    found = patterns(opened("bart"), PROMPT, decoder=TARGET)
    assert Result.load(found.save(tmp_path / "patterns.zip")) == found
