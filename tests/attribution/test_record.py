"""The program of a saved result gives its numbers again: every method of attribution, every reading of attention."""

from __future__ import annotations

import pytest

import pellucid as pl
from pellucid.results import Result
from tests.attribution.hand import PROMPT, opened

READINGS = {
    "patterns": lambda m, e: pl.attention.patterns(m, PROMPT, edits=e),
    "rollout": lambda m, e: pl.attention.rollout(m, PROMPT, edits=e),
    "flow": lambda m, e: pl.attention.flow(m, PROMPT, queries=-1, edits=e),
    "norm_weighted": lambda m, e: pl.attention.norm_weighted(m, PROMPT, edits=e),
    "attention_gradient": lambda m, e: pl.attention.attention_gradient(m, PROMPT, against=" Rome", edits=e),
    "gradient_weighted": lambda m, e: pl.attention.gradient_weighted(m, PROMPT, " Paris", edits=e),
    "relevance": lambda m, e: pl.attention.relevance(m, PROMPT, edits=e),
    "permuted_attention": lambda m, e: pl.attention.permuted_attention(m, PROMPT, draws=2, edits=e),
    "attention_erasure": lambda m, e: pl.attention.attention_erasure(m, [PROMPT], points=2, draws=1, edits=e),
    "attention_correlation": lambda m, e: pl.attention.attention_correlation(m, [PROMPT], edits=e),
    "head_summaries": lambda m, e: pl.attention.head_summaries(m, [PROMPT], probes=2, length=4, edits=e),
    "head_clusters": lambda m, e: pl.attention.head_clusters(m, [PROMPT], n=3, draws=2, edits=e),
    "adversarial_attention": lambda m, e: pl.attention.adversarial_attention(m, PROMPT, steps=3, restarts=1),
}


def again(result: Result, tmp_path, monkeypatch, model) -> Result:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pellucid.model.load", lambda *_, **__: model)
    result.save("result.zip")
    space = {"module": model.module, "tokenizer": model.tokenizer}
    exec(Result.load("result.zip").provenance.code(), space)
    made = space["result"]
    assert isinstance(made, Result)
    return made


@pytest.mark.parametrize("name", pl.attribution.METHODS)
def test_an_attribution_is_made_again_by_its_program(name, tmp_path, monkeypatch):
    model = opened("llama")
    found = pl.attribution.METHODS[name](model, PROMPT, against=" Rome")
    assert found.provenance.arguments["target"] is not None
    assert found.provenance.inputs == [PROMPT]
    assert again(found, tmp_path, monkeypatch, model).allclose(found, atol=1e-6)


@pytest.mark.parametrize("name", READINGS)
def test_a_reading_of_attention_is_made_again_by_its_program_edits_included(name, tmp_path, monkeypatch):
    model = opened("llama")
    edit = pl.Ablate("layers.0.attn.heads.1", "zero")
    plain, found = (READINGS[name](model, edits) for edits in ([], [edit]))
    assert again(found, tmp_path, monkeypatch, model).allclose(found, atol=1e-6)
    assert name == "adversarial_attention" or not plain.allclose(found, atol=1e-9)  # the edits are there
