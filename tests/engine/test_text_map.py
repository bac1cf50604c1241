"""Characters and tokens in every script: a fast tokenizer's own offsets, and the same found by decoding for slow ones."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, CanineTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pellucid as pl
from pellucid.engine.text_map import TextMap, covering, encode, laid_over
from pellucid.errors import InputError
from tests.tasks.tokenizers import tokenizer

TEXTS = [
    "Hi 🎉🎉 don't", "नमस्ते दुनिया", "สวัสดี", "東京に行く。", "Cafe\u0301 BERLIN naïve", " lead  two\nx", "<s> x", "👩‍👩‍👧 ok",
]  # fmt: skip


@cache
def byte_level() -> Any:
    """A byte-level BPE that knows every byte and a few merges, as GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["the capital of France is Paris"] * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@cache
def llama() -> pl.Model:
    module = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    return pl.load(module.eval(), tokenizer=byte_level())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["minilm", "unigram", "bytes", "byt5", "canine"])
def test_decoding_finds_what_a_fast_tokenizer_says(kind: str, text: str) -> None:
    slow = {"byt5": ByT5Tokenizer, "canine": CanineTokenizer}
    made = slow[kind]() if kind in slow else byte_level() if kind == "bytes" else tokenizer(kind)
    ids, offsets = encode(made, text)
    found = laid_over(made, ids, text)
    for (a, b), (c, d) in zip(offsets, found, strict=True):
        if kind not in slow and text != "สวัสดี":  # where MiniLM's unknown word ends is a matter of taste
            assert "".join(text[a:b].split()) == "".join(text[c:d].split())
    if kind in slow:  # every letter has its own tokens, in order
        for i, letter in enumerate(text):
            if not letter.isspace():
                first, last = covering(offsets, i, i + 1)
                said = made.decode(ids[first:last])
                assert (letter in said) or text.startswith("<s>")


@given(st.text(st.characters(codec="utf-8", exclude_characters="�"), max_size=12))
def test_any_text_is_found_again_in_a_byte_level_tokenizer(text: str) -> None:
    ids, offsets = encode(byte_level(), text)
    assert len(ids) == len(offsets)
    for i in range(len(text)):
        first, last = covering(offsets, i, i + 1)
        assert text[i] in byte_level().decode(ids[first:last], clean_up_tokenization_spaces=False)
    try:
        found = laid_over(byte_level(), ids, text)
    except InputError:  # it refuses what it cannot lay over, and says no wrong place
        return
    for (a, b), (c, d) in zip(offsets, found, strict=True):
        if c < d:
            assert set(text[c:d].split()) <= set(text[a:b].split()) or text[c:d].strip() in text[a:b]


def positions(prompt: str, at: str, **options: Any) -> list[int]:
    return llama().inputs(prompt, **options).stream("").find(at)[0].tolist()  # type: ignore[index]


def said(prompt: str, at: str, **options: Any) -> str:
    stream = llama().inputs(prompt, **options).stream("")
    found = [int(i) for i in stream.ids[0, positions(prompt, at, **options)]]
    return str(llama().tokenizer.decode(found))


def test_a_position_is_named_in_the_text_as_typed() -> None:
    prompt = "नमस्ते 🎉 the capital Cafe\u0301 東京に don't"
    assert said(prompt, "@'🎉'"[1:]).strip() == "🎉" and len(positions(prompt, "'🎉'")) >= 4
    assert said(prompt, "'नमस्ते'") == "नमस्ते"
    assert said(prompt, "'東京'").strip() == "東京"
    assert said(prompt, "'Café'").strip() == "Cafe\u0301"  # composed here, decomposed there
    assert said(prompt, '"don\'t"').strip() == "don't"
    assert said(prompt, r"/c\w+l/").strip() == "capital"
    assert said(prompt, "chars(7:8)").strip() == "🎉"
    assert said(prompt, "x", spans={"x": "the capital"}).strip() == "the capital"
    assert said(prompt, "x", spans={"x": re.compile(r"c\w+l")}).strip() == "capital"
    assert said(prompt, "x", spans={"x": [slice(7, 8)]}).strip() == "🎉"
    run = llama().run(prompt, keep=["layers.0.resid_post@'🎉'", r"layers.0.resid_post@/c\w+l/"])
    assert run.tensor("layers.0.resid_post@'🎉'").shape[1] == len(positions(prompt, "'🎉'"))


def test_whole_words_come_before_parts_of_words() -> None:
    assert positions("is it his", "'is'") == positions("is it his", "chars(0:2)")
    inside = positions("it was this", "'is'")  # only inside a word: the token that holds it
    assert inside == positions("it was this", "chars(9:11)")


def test_ids_without_text_are_found_in_what_they_say() -> None:
    ids = llama().tokenizer("the 🎉 of France")["input_ids"]
    stream = llama().inputs([ids]).stream("")
    assert stream.maps[0].text == "the 🎉 of France"
    assert stream.find("'🎉'").tolist() == llama().inputs("the 🎉 of France").stream("").find("'🎉'").tolist()
    assert TextMap(None, (3, 17)).tokens(3, 6) == range(1, 2)


def test_texts_behind_one_another_keep_their_own_maps() -> None:
    inputs = llama().inputs(["the 🎉 of", "of 🎉"])
    assert inputs.rows([1]).stream("").find("'of'").tolist() == [[0, 1]] or inputs.rows([1]).texts == ("of 🎉",)
    assert inputs.rows([1, 0]).stream("").maps[0].text == "of 🎉"


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("'Rome'", "'Rome' is not in the prompt"),
        ("/R.me/", "nothing in the prompt matches /R.me/"),
        ("/(/", "cannot read the regular expression"),
        ("chars(9:99)", "outside the text"),
        ("chars(3:3)", "outside the text"),
        ("user", "is no position"),
    ],
)
def test_what_names_nothing_is_one_clear_error(at: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        positions("the capital", at)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([1], "must be a mapping"),
        ({"x": None}, "needs one .first, last . 1. per prompt: expected 1, got None"),
        ({"x": [None]}, "needs one .first"),
        ({"x": ["Rome"]}, "is not in the prompt"),
    ],
)
def test_a_bad_span_is_one_clear_error(spans: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        llama().inputs("the capital", spans=spans)


def test_half_a_character_is_no_text() -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        llama().run("a\udfff")
