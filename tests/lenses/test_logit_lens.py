"""The logit lens reads every layer with the model's own head, and nothing else."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import numpy as np
import pytest
import torch

import pellucid
import pellucid as pl
from pellucid.errors import InputError, Refused
from pellucid.lenses import logit_lens, unembed
from pellucid.results import Result
from tests.zoo import build, tokenizer

PROMPT = "The capital of France is"


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_row_is_the_residual_through_final_norm_and_unembedding(family):
    model = opened(family)
    lens = logit_lens(model, PROMPT, targets=[" Paris", " Rome"])
    norm = model.module.transformer.ln_f if family == "gpt2" else model.module.model.norm
    run = model.run(PROMPT, keep=["embed", "layers.*.resid_post"])
    final = run.logits[0].log_softmax(-1)
    for row, site in enumerate(["embed", "layers.0.resid_post", "layers.1.resid_post"]):
        log_p = model.module.lm_head(norm(run.tensor(site)))[0].log_softmax(-1)
        here = lens.data.isel(layer=row)
        best = log_p.argmax(-1)
        np.testing.assert_allclose(here.probability[:, 0], log_p.max(-1).values.exp().detach(), atol=1e-5)
        assert here.top_token[:, 0].values.tolist() == [model.tokenizer.decode([i]) for i in best.tolist()]
        np.testing.assert_allclose(here.entropy, -(log_p.exp() * log_p).sum(-1).detach(), atol=1e-4)
        np.testing.assert_allclose(here.kl, (final.exp() * (final - log_p)).sum(-1).detach(), atol=1e-4)
        paris = model.tokenizer.convert_tokens_to_ids("▁Paris")
        np.testing.assert_allclose(here.target_log_probability[:, 0], log_p[:, paris].detach(), atol=1e-4)
        assert here.target_rank[:, 0].values.tolist() == (log_p > log_p[:, [paris]]).sum(-1).tolist()


@pytest.mark.parametrize(
    "family", ["gpt2", "bert", "modernbert", "gemma2", "cohere", "t5", "bart", "falcon", "xlnet", "mamba"]
)
def test_the_last_row_is_the_models_own_answer(family):
    model = opened(family)
    lens = logit_lens(model, PROMPT)
    last = lens.data.isel(layer=-1)
    assert float(abs(last.kl).max()) < 1e-5
    assert float(last["rank"].max()) == 0
    assert last.top_token[:, 0].values.tolist() == last.prediction.values.tolist()
    assert lens.data.layer.values.tolist() == list(range(-1, lens.data.sizes["layer"] - 1))
    assert lens.data.site.values[0].endswith("embed")


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "t5"])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(family):
    model = opened(family)
    prompts, texts = [PROMPT, "Mary"], ["Paris is", "Rome"]
    option = {"decoder": texts} if family == "t5" else {}
    together = logit_lens(model, prompts, **option).data
    for i, prompt in enumerate(prompts):
        alone = logit_lens(model, prompt, **({"decoder": texts[i]} if option else {})).data
        n = alone.sizes["position"]
        for name in ("probability", "kl", "entropy", "log_probability"):
            np.testing.assert_allclose(together[name].isel(prompt=i, position=slice(n)), alone[name], atol=1e-4)
        assert np.isnan(together.kl.isel(prompt=i, position=slice(n, None))).all()
        assert together.token.isel(prompt=i).values[:n].tolist() == alone.token.values.tolist()


def test_positions_and_sites_narrow_what_is_read():
    model = opened("llama")
    whole, narrow = (
        logit_lens(model, PROMPT),
        logit_lens(model, PROMPT, positions="' France'", sites="layers.1.resid_mid"),
    )
    assert narrow.data.sizes["position"] == 1
    assert narrow.data.position.values.tolist() == [3]
    assert narrow.data.site.values.tolist() == ["layers.1.resid_mid"]
    assert whole.data.token[3] == narrow.data.token[0]
    with pytest.raises(InputError, match="is no residual at every position"):
        logit_lens(model, PROMPT, sites="layers.*.attn.z")


@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        ([1, 2], [1, 2]),
        ([-1], [-1]),
        (np.int64(1), [1]),
        (np.array([1, 2]), [1, 2]),
        (slice(1, 3), [1, 2]),
        (slice(-2, None), [-2, -1]),
    ],
)
def test_positions_are_lists_and_slices_too(positions, columns):
    """F12: a list was a raw TypeError."""
    whole = logit_lens(opened("gpt2"), PROMPT).data
    some = logit_lens(opened("gpt2"), PROMPT, positions=positions).data
    np.testing.assert_allclose(some.kl, whole.kl.isel(position=columns), atol=1e-5)
    assert some.token.values.tolist() == whole.token.isel(position=columns).values.tolist()


@pytest.mark.parametrize("positions", [[], [1.5], slice(0, 4, 2), ["a"]])
def test_positions_that_are_none_are_named(positions):
    with pytest.raises(InputError, match="positions="):
        logit_lens(opened("gpt2"), PROMPT, positions=positions)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_an_edited_run_is_read_as_the_model_with_those_weights_would_be(family):
    """B11: with a head's weights at zero and with the head ablated the lens is one and the same."""
    model = opened(family)
    edits = [pl.Ablate("layers.0.attn.heads.1"), pl.Scale("layers.1.mlp.out", factor=0.5)]
    found = logit_lens(model, PROMPT, edits=edits).data
    run = model.run(PROMPT, edits=edits, keep=[*found.site.values])
    for i, site in enumerate(found.site.values):
        log_p = unembed(model, run.tensor(site))[0].log_softmax(-1)
        kl = (run.logits[0].softmax(-1) * (run.logits[0].log_softmax(-1) - log_p)).sum(-1)
        np.testing.assert_allclose(found.kl[i], kl.detach(), atol=1e-4)
    assert float(abs(found.kl[-1]).max()) < 1e-5
    assert float(abs(found.kl - logit_lens(model, PROMPT).data.kl).max()) > 1e-3
    assert logit_lens(model, PROMPT, edits=edits).provenance.call.count("pl.") >= 3  # and the record names them


def test_one_layers_logits_are_read_in_parts_without_a_change(monkeypatch):
    model = opened("gpt2")
    whole = logit_lens(model, [PROMPT, "Mary"])
    monkeypatch.setattr(import_module("pellucid.lenses.logit_lens"), "CELLS", 97 * 2)
    assert whole.allclose(logit_lens(model, [PROMPT, "Mary"]), atol=1e-6)


def test_unembed_gives_the_models_logits_soft_cap_included():
    model = opened("gemma2")
    run = model.run(PROMPT, keep="layers.1.resid_post")
    torch.testing.assert_close(unembed(model, run.tensor("layers.1.resid_post")), run.logits)


def test_a_model_without_a_head_is_refused(minilm):
    with pytest.raises(Refused, match="cannot be read through its head"):
        logit_lens(minilm, "Paris")


def test_a_result_comes_back_from_its_file(tmp_path):
    lens = logit_lens(opened("gpt2"), PROMPT, targets=" Paris")
    assert Result.load(lens.save(tmp_path / "lens.zip")) == lens


@pytest.mark.slow
def test_paris_appears_in_the_last_layers_of_smollm2(smollm2):
    lens = logit_lens(smollm2, "The Eiffel Tower is located in the city of", targets=" Paris", positions=-1)
    ranks = lens.data.target_rank[:, 0, 0].values
    assert (ranks[:20] > 100).all()
    assert (ranks[-3:] == 0).all()
    assert lens.sel(layer=29).prediction.item() == " Paris"


def test_a_classifier_is_refused():
    from transformers import GPT2ForSequenceClassification

    config = build("gpt2").config
    config.pad_token_id = 0
    module = GPT2ForSequenceClassification(config).eval()
    with pytest.raises(Refused, match=r"every token|cannot be read"):
        logit_lens(pellucid.load(module, tokenizer=tokenizer(module)), PROMPT)


def test_labels_are_read_by_their_names_and_not_as_tokens_of_those_numbers():
    from transformers import BertForTokenClassification

    config = build("bert").config
    config.id2label = {0: "O", 1: "B-LOC", 2: "B-PER"}
    module = BertForTokenClassification(config).eval()
    model = pellucid.load(module, tokenizer=tokenizer(build("bert")))
    lens = logit_lens(model, PROMPT, top=3, targets=["B-LOC", 2])
    assert set(lens["top_token"].values.ravel().tolist()) == {"O", "B-LOC", "B-PER"}
    assert lens.data.coords["target"].values.tolist() == ["B-LOC", "B-PER"]
    own = model.run(PROMPT).logits[0].argmax(-1).tolist()
    assert lens["prediction"].values.tolist() == [config.id2label[i] for i in own]
    expected = model.run(PROMPT).logits[0].log_softmax(-1)[:, 1]
    found = lens["target_log_probability"].sel(target="B-LOC").isel(layer=-1).values
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    with pytest.raises(InputError, match="no class"):
        logit_lens(model, PROMPT, targets=["Paris"])


def test_what_heads_of_a_classifier_raise_are_its_classes():
    from transformers import GPT2ForSequenceClassification

    config = build("gpt2").config
    config.id2label, config.pad_token_id = {0: "bad", 1: "good"}, 0
    module = GPT2ForSequenceClassification(config).eval()
    found = pl.lenses.head_lens(pellucid.load(module, tokenizer=tokenizer(module)), PROMPT)
    assert set(found["raised_token"].values.ravel().tolist()) == {"bad", "good"}
