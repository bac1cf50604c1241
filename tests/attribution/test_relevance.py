"""Relevance equals propagation written out layer by layer, adds up, and lands on the tokens that are responsible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

import pellucid
from pellucid.attribution import continuation, reading, relevance_propagation
from pellucid.errors import InputError, Refused
from pellucid.metrics import logit
from tests.attribution import slow_relevance as slow
from tests.attribution.hand import PROMPT, classifier, opened, token
from tests.attribution.relevance_table import account
from tests.zoo import tokenizer

SLOW = {"llama": slow.llama, "gpt2": slow.gpt2, "bert": slow.bert}
DOUBLE = {"dtype": torch.float64, "attn": "sdpa"}


def near(a, b, tolerance=1e-5):
    a, b = np.asarray(a, float), np.asarray(b, float)
    assert np.abs(a - b).max() <= tolerance * max(np.abs(a).max(), np.abs(b).max())


@pytest.mark.parametrize("family", SLOW)
def test_relevance_equals_propagation_written_out(family):
    model = opened(family, **DOUBLE)
    answer, ids = token(model, "Paris"), model.inputs(PROMPT).stream("").ids[0]
    at = ["layers.*.attn.scores", "layers.*.attn.pattern", "layers.*.resid_post"]
    found = relevance_propagation(model, PROMPT, logit(answer), sites=at)
    with torch.no_grad():
        tokens, attentions, ends = SLOW[family](model.module, ids, answer)
    near(found.attribution, tokens)
    near(found["attn.scores"], torch.stack([a.r_scores for a in attentions]))
    near(found["attn.pattern"], torch.stack([a.r_pattern for a in attentions]))
    near(found["resid_post"], torch.stack(ends).sum(-1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_asking_for_sites_changes_nothing(family):
    model = opened(family)
    at = ["layers.*.attn.scores", "layers.*.attn.z", "layers.*.mlp.neurons", "layers.*.resid_pre", "layers.*.resid_mid"]
    near(
        relevance_propagation(model, PROMPT, logit(30)).values,
        relevance_propagation(model, PROMPT, logit(30), sites=at).values,
    )


@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "bloom"])
def test_sites_of_families_with_attention_of_their_own_change_nothing(family):
    model = opened(family)
    plain = relevance_propagation(model, PROMPT, 30)
    near(plain.values, relevance_propagation(model, PROMPT, 30, sites="layers.*.attn.scores").values)


# ---- what adds up

FAMILIES = [
    "gpt2", "llama", "gemma2", "gemma3n_text", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmo2", "phi3", "falcon",
    "bloom", "opt", "mpt", "gpt_neox", "bert", "roberta", "deberta-v2", "modernbert", "xlnet", "albert", "t5", "bart",
    "mamba", "mamba2", "rwkv", "jamba", "qwen3_next", "recurrent_gemma", "fnet", "longformer",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_accounts_for_its_answer(family):
    """With softmax held nothing keeps relevance but tokens and constants: what is missing would be a missing rule."""
    row = account(family)
    assert not row.refused
    assert row.difference == 0, "the logits are the model's own"
    assert row.missing < 1e-4
    assert np.isfinite(row.tokens) and np.isfinite(row.biases)


def test_without_biases_and_with_held_softmax_every_layer_holds_the_whole_answer():
    model = opened("llama")
    found = relevance_propagation(model, PROMPT, 30, rules="cp-lrp", sites=["layers.*.resid_post", "embed"])
    score = float(found.score)
    near(found.attribution.sum(), score)
    near(found["resid_post"].sum("position"), [score] * 2)
    near(found["embed"], found.attribution)
    assert abs(float(found.gap)) < 1e-5 * abs(score) and float(found.biases) == 0


def test_the_gap_is_told_and_biases_and_softmax_explain_it():
    found = relevance_propagation(opened("gpt2"), PROMPT, 30)
    near(found.gap, found.attribution.sum() - found.score)
    held = relevance_propagation(opened("gpt2"), PROMPT, 30, rules="cp-lrp")
    assert abs(float(held.gap + held.biases)) < 1e-5 < abs(float(found.gap + found.biases))


def test_heads_and_neurons_pass_on_what_their_layer_adds():
    model = opened("llama")
    at = ["layers.*.attn.z", "layers.*.attn.out", "layers.*.mlp.neurons", "layers.*.mlp.out"]
    found = relevance_propagation(model, PROMPT, 30, sites=at)
    near(
        found["attn.z"].sum("head"),
        found["attn.out"].sum("head") if "head" in found["attn.out"].dims else found["attn.out"],
    )
    near(found["mlp.neurons"].sum("neuron"), found["mlp.out"])


@settings(max_examples=8, deadline=None)
@given(st.integers(5, 90), st.integers(5, 90))
def test_relevance_of_a_difference_is_the_difference_of_relevances(a, b):
    model = opened("gpt2")
    each = [relevance_propagation(model, PROMPT, i).values for i in (a, b)]
    near(relevance_propagation(model, PROMPT, a, against=b).values + 1, each[0] - each[1] + 1)


# ---- targets


def test_each_token_of_a_continuation_has_the_relevance_it_has_alone():
    model = opened("llama")
    found = relevance_propagation(model, PROMPT, continuation(" Paris is", of="logit"))
    first = relevance_propagation(model, PROMPT, " Paris")
    assert found.attribution.dims == ("output", "position")
    near(found.attribution[0, :5], first.attribution)
    assert not found.attribution[0, 5:].any()
    near(found.attribution[1], relevance_propagation(model, PROMPT + " Paris", " is").attribution)


def test_a_class_and_a_reading_are_targets():
    found = relevance_propagation(classifier(), PROMPT, "good", rules="cp-lrp")
    near(found.attribution.sum() + found.biases, found.score)
    model = opened("llama")
    inside = relevance_propagation(model, PROMPT, reading("layers.0.mlp.neurons.7@-1"), rules="cp-lrp")
    near(inside.attribution.sum(), inside.score)


def test_source_and_decoder_tokens_share_the_answer_of_an_encoder_decoder():
    model = opened("t5")
    found = relevance_propagation(model, PROMPT, " Paris", decoder="The capital", rules="cp-lrp")
    near(found.attribution.sum() + found.elsewhere + found.biases, found.score)
    assert list(found.attribution["stream"].values[:1]) == ["source"] and float(found.elsewhere) != 0
    both = relevance_propagation(model, PROMPT, continuation(" Paris", of="logit"), rules="cp-lrp")
    near(both.attribution.sum("position") + both.biases, both.score)
    assert set(both.attribution["stream"].values) == {"source", "target"}


def test_interactions_of_cross_attention_are_of_target_queries_with_source_keys():
    found = relevance_propagation(opened("t5"), PROMPT, " Paris", sites="decoder.layers.*.cross.scores")
    assert found["decoder.cross.scores"].dims == ("decoder_layer", "decoder_head", "decoder_query", "encoder_key")
    assert found["decoder.cross.scores"].shape[-1] == found.attribution.size


def test_words_get_the_sum_of_their_tokens():
    model = opened("llama")
    tokens = relevance_propagation(model, "The xylophone is", 30)
    words = relevance_propagation(model, "The xylophone is", 30, players="word")
    near(words.attribution.sum(), tokens.attribution.sum())
    assert list(words.attribution["text"].values) == ["The", "xylophone", "is"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_changes_nothing(family, side):
    model = opened(family)
    ids = model.inputs(PROMPT).stream("").ids[0].tolist()
    pad, mask = [0, 0], [0, 0]
    padded = [*pad, *ids] if side == "left" else [*ids, *pad]
    seen = [*mask, *[1] * len(ids)] if side == "left" else [*[1] * len(ids), *mask]
    given = {"input_ids": torch.tensor([padded]), "attention_mask": torch.tensor([seen])}
    try:
        found = relevance_propagation(model, given, logit(30)).values
    except Refused:  # this family computes something else when padded there, and says so
        return
    near(found[np.array(seen, bool)], relevance_propagation(model, PROMPT, logit(30)).values, 1e-4)
    assert not found[~np.array(seen, bool)].any()


# ---- meaning


def marked(marker: int, answer: int) -> pellucid.Model:
    """One head that looks for a marker and writes what makes the answer, in a direction nothing else writes."""
    d = 128
    module = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=32, n_embd=d, n_layer=1, n_head=1, tie_word_embeddings=False)
    ).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for norm in (module.transformer.h[0].ln_1, module.transformer.h[0].ln_2, module.transformer.ln_f):
            norm.weight.fill_(1)
        module.transformer.wte.weight[:, :97] = torch.eye(97)
        attention = module.transformer.h[0].attn
        attention.c_attn.bias[100] = 10  # every query asks for what the marker's key has
        attention.c_attn.weight[marker, d + 100] = 10
        attention.c_attn.weight[marker, 2 * d + 110] = 1
        attention.c_proj.weight.copy_(torch.eye(d))
        module.lm_head.weight[answer, 110] = 1
    return pellucid.load(module, tokenizer=tokenizer())


@pytest.mark.parametrize("rules", ["attnlrp", "cp-lrp"])
def test_the_responsible_token_and_interaction_are_found(rules):
    words = tokenizer()("The capital of France is in")["input_ids"]
    model = marked(words[3], 40)
    at = "layers.*.attn.pattern" if rules == "attnlrp" else ()
    found = relevance_propagation(model, torch.tensor([words]), 40, rules=rules, sites=at)
    relevance = found.values
    assert relevance.argmax() == 3 and relevance[3] > 0.95 * np.abs(relevance).sum()
    if rules == "cp-lrp":
        near(relevance.sum() + found.biases, found.score)
    else:
        interactions = np.abs(found["attn.pattern"].values[0, 0])
        assert np.unravel_index(interactions.argmax(), interactions.shape) == (len(words) - 1, 3)


@pytest.mark.slow
def test_a_trained_model_knows_paris_from_the_tower(smollm2):
    prompt = "The Eiffel Tower is located in the city of"
    for against in (None, " Rome"):
        found = relevance_propagation(smollm2, prompt, " Paris", against=against)
        relevance = dict(zip(found.attribution["token"].values, found.values, strict=True))
        assert max(relevance, key=lambda text: abs(relevance[text])) == "iffel"
        name = relevance[" E"] + relevance["iffel"] + relevance[" Tower"]
        assert name > sum(abs(relevance[text]) for text in (" is", " located", " in", " the", " of"))
    held = relevance_propagation(smollm2, prompt, " Paris", rules="cp-lrp")
    assert abs(float(held.gap + held.biases)) < 1e-3 * abs(float(held.score))


# ---- refusals


def test_wrong_options_are_named():
    model = opened("llama")
    with pytest.raises(InputError, match="unknown rules 'lrp': expected 'attnlrp' or 'cp-lrp'"):
        relevance_propagation(model, PROMPT, rules="lrp")
    with pytest.raises(InputError, match="epsilon=-1"):
        relevance_propagation(model, PROMPT, epsilon=-1)
    with pytest.raises(InputError, match="whole parts of layers"):
        relevance_propagation(model, PROMPT, sites="layers.0.attn.heads.1")


def test_interactions_are_refused_where_patterns_are_constants():
    with pytest.raises(InputError, match="use rules='attnlrp'"):
        relevance_propagation(opened("llama"), PROMPT, rules="cp-lrp", sites="layers.*.attn.pattern")


def test_an_operator_without_a_rule_is_refused_by_name():
    model = pellucid.load(build_wavy(), tokenizer=tokenizer())
    with pytest.raises(Refused, match="uses sin, for which relevance propagation has no rule"):
        relevance_propagation(model, PROMPT)


def build_wavy():
    from tests.zoo import build

    class Wavy(torch.nn.Module):
        def forward(self, x):
            return torch.sin(x) + x.mean(-1, keepdim=True)  # no function of one number: it mixes

    module = build("llama")
    module.model.layers[0].mlp.act_fn = Wavy()
    return module


def test_weights_that_let_no_gradient_through_are_refused():
    from tests.zoo import build

    module = torch.ao.quantization.quantize_dynamic(build("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    model = pellucid.load(module, tokenizer=tokenizer())
    with pytest.raises(Refused):
        relevance_propagation(model, PROMPT, 30)


def test_gradients_are_managed_inside():
    """B1: a raw error under no_grad."""
    model = opened("gpt2")
    with torch.no_grad():
        found = relevance_propagation(model, PROMPT, " Paris").main
    np.testing.assert_allclose(found, relevance_propagation(model, PROMPT, " Paris").main, atol=1e-6)


def test_the_module_is_left_as_it_was():
    model = opened("gpt2")
    before = {name: p.requires_grad for name, p in model.module.named_parameters()}
    logits = model.run(PROMPT).logits
    relevance_propagation(model, PROMPT, 30, sites="layers.*.attn.pattern")
    assert torch.equal(logits, model.run(PROMPT).logits)
    assert before == {name: p.requires_grad for name, p in model.module.named_parameters()}
    assert all(p.grad is None for p in model.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
