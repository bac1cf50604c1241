"""Models without a tokenizer take ids in every kind of method, and what needs text says so; slow tokenizers are read too."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import pellucid as pl
from pellucid.errors import InputError
from pellucid.metrics import logit, logit_difference

IDS, OTHER = [5, 6, 7, 8, 9], [5, 6, 10, 8, 9]


@cache
def module() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=64)
    ).eval()  # fmt: skip


@cache
def opened(slow: bool) -> pl.Model:
    return pl.load(module(), tokenizer=ByT5Tokenizer() if slow else None)


METHODS: dict[str, Callable[[pl.Model, Any, Any], Any]] = {
    "generate": lambda m, p, q: m.generate(p, max_new_tokens=2).text,
    "sweep": lambda m, p, q: m.sweep(p, [pl.Ablate("layers.0.mlp.out")], logit(7)).values,
    "saliency": lambda m, p, q: pl.attribution.saliency(m, p).to_frame(),
    "occlusion": lambda m, p, q: pl.attribution.occlusion(m, p),
    "patching": lambda m, p, q: pl.causal.patching(m, p, q, over="layers.*.resid_pre@*", metric=logit_difference(7, 8)),
    "lens": lambda m, p, q: pl.lenses.logit_lens(m, p).to_frame(),
    "patterns": lambda m, p, q: pl.attention.patterns(m, p),
    "shown": lambda m, p, q: pl.lenses.logit_lens(m, p)._repr_html_(),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_method_takes_ids_and_slow_tokenizers(name: str) -> None:
    METHODS[name](opened(False), IDS, OTHER)
    METHODS[name](opened(True), "the 🎉 cat", "the 🎉 dog")


def test_without_a_tokenizer_the_numbers_are_those_with_one() -> None:
    text = "the 🎉 cat"
    ids = ByT5Tokenizer()(text)["input_ids"]
    assert torch.equal(opened(True).run(text).logits, opened(False).run(ids).logits)
    asked = logit(7, position=2)
    with_one, without = (pl.attribution.saliency(opened(s), p, asked) for s, p in ((True, text), (False, ids)))
    shared = min(with_one.values.size, without.values.size)
    np.testing.assert_allclose(with_one.values.ravel()[:shared], without.values.ravel()[:shared], atol=1e-6)
    run = opened(True).run(text, keep="layers.0.resid_post@'🎉'")
    assert run.tensor("layers.0.resid_post@'🎉'").shape[1] == len("🎉".encode())


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.run("text"),
        lambda m: m.run([{"role": "user", "content": "Hi"}]),
        lambda m: m.run(pl.Pair("a", "b")),
        lambda m: m.sweep(IDS, [[]], logit(" a")),
        lambda m: m.generate(IDS, stop="x"),
        lambda m: pl.probing.read(m, pl.probing.Spans.words(["a b"])),
        lambda m: list(pl.Corpus(["a b"]).rows(m)),
    ],
)
def test_what_needs_text_says_so(call: Callable[[pl.Model], Any]) -> None:
    with pytest.raises(InputError, match="opened without a tokenizer"):
        call(opened(False))


@pytest.mark.parametrize("at", ["", " ", 2.5, [1], {}])
def test_what_is_no_position_is_one_clear_error(at: Any) -> None:
    with pytest.raises(InputError, match="is no position"):
        opened(False).inputs(IDS).stream("").find(at)
