"""The activation store: what is written is what runs give, in order, whatever the shards, and it continues."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pellucid as pl
from pellucid.errors import InputError
from pellucid.store import ActivationStore, store_activations
from tests.zoo.tokenizer import tokenizer

SITES = ["layers.*.resid_post", "layers.1.mlp.neurons", "layers.0.attn.z"]
PROMPTS = ["a b c d", "e f", "g h i j k l", "b a", "c c c", "f e d c b a", "k l m"]


@pytest.fixture(scope="module")
def model() -> pl.Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    module = LlamaForCausalLM(config).eval()
    return pl.load(module, tokenizer=tokenizer(module))


def test_rows_are_the_activations_of_single_runs(model, tmp_path):
    store = store_activations(model, PROMPTS, SITES, tmp_path, batch=3, shard_rows=5, dtype=torch.float32)
    assert len(store.index.shards) > 1
    at = 0
    for i, prompt in enumerate(PROMPTS):
        run = model.run(prompt, keep=SITES)
        n = run.inputs.stream("").ids.shape[1]
        for site in store.sites:
            torch.testing.assert_close(store.rows(site, range(at, at + n)), run.tensor(site)[0], atol=1e-5, rtol=1e-4)
        assert store["prompts"][at : at + n].tolist() == [i] * n
        assert store["positions"][at : at + n].tolist() == list(range(n))
        assert store.tokens[at : at + n].tolist() == run.inputs.stream("").ids[0].tolist()
        at += n
    assert at == len(store)


def test_batches_stream_every_row_once_and_in_order(model, tmp_path):
    store = store_activations(model, PROMPTS, SITES, tmp_path, batch=2, shard_rows=4)
    site = store.sites[0]
    batches = list(store.batches(site, 5))
    assert all(len(b) == 5 for b in batches[:-1])
    torch.testing.assert_close(torch.cat(batches), store[site])
    torch.testing.assert_close(store.rows(site, [7, 0, 3]), store[site][[7, 0, 3]])


def test_an_interrupted_harvest_continues_where_it_stopped(model, tmp_path):
    def stopping():
        yield from PROMPTS[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_activations(model, stopping(), SITES, tmp_path / "a", batch=2, shard_rows=1)
    assert ActivationStore(tmp_path / "a").index.shards[-1].last == 4
    resumed = store_activations(model, PROMPTS, SITES, tmp_path / "a", batch=2, shard_rows=1)
    whole = store_activations(model, PROMPTS, SITES, tmp_path / "b", batch=2, shard_rows=1)
    assert resumed.index == whole.index
    for site in [*whole.sites, "prompts", "positions"]:
        torch.testing.assert_close(resumed[site], whole[site])
    done = store_activations(model, PROMPTS, SITES, tmp_path / "a", batch=2, shard_rows=1)
    assert done.index == whole.index  # nothing is left to do
    with pytest.raises(InputError, match="others than those that were read"):
        store_activations(model, PROMPTS[::-1], SITES, tmp_path / "a", batch=2, shard_rows=1)
    with pytest.raises(InputError, match="other ways to read a corpus"):
        store_activations(model, pl.Corpus(PROMPTS, long="cut"), SITES, tmp_path / "a", batch=2, shard_rows=1)


def test_long_texts_are_named_and_read_as_the_corpus_says(model, tmp_path):
    texts = ["a b", "c d e f g h"]
    with pytest.raises(InputError, match="text 1 of the corpus has 12 tokens, more than 8"):
        store_activations(model, pl.Corpus(texts, context=8), SITES[:1], tmp_path / "a")
    cut = store_activations(model, pl.Corpus(texts, context=8, long="cut"), SITES[:1], tmp_path / "b")
    assert cut["prompts"].tolist() == [0] * 3 + [1] * 8
    windows = store_activations(model, pl.Corpus(texts, context=8, long="windows"), SITES[:1], tmp_path / "c")
    assert windows["prompts"].tolist() == [0] * 3 + [1] * 8 + [2] * 4
    with pytest.raises(InputError, match="no text whose activations"):
        store_activations(model, [""], SITES[:1], tmp_path / "d")


def test_other_sites_other_folders_and_unknown_names_are_refused(model, tmp_path):
    store = store_activations(model, PROMPTS[:2], SITES, tmp_path)
    with pytest.raises(InputError, match="other sites"):
        store_activations(model, PROMPTS, ["layers.0.mlp.out"], tmp_path)
    with pytest.raises(InputError, match="no activation store"):
        ActivationStore(tmp_path / "nowhere")
    with pytest.raises(InputError, match="does not hold"):
        store["layers.0.mlp.out"]
    with pytest.raises(InputError, match="the store has"):
        store.rows(store.sites[0], [len(store)])


def test_products_in_bfloat16_give_nearly_the_same_rows(model, tmp_path):
    exact = store_activations(model, PROMPTS, SITES[:1], tmp_path / "a", dtype=torch.float32)
    quick = store_activations(model, PROMPTS, SITES[:1], tmp_path / "b", dtype=torch.float32, compute=torch.bfloat16)
    for site in exact.sites:
        apart = (exact[site] - quick[site]).norm() / exact[site].norm()
        assert 0 < apart < 0.02
        assert torch.equal(exact.shards(site, [0]), exact[site])
