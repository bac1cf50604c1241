"""A corpus as rows: one BOS in front and none inside, nothing lost or cut unsaid, and it goes on where it stopped."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pellucid as pl
from pellucid.corpus import Corpus, batches, by_length, digest, inputs, segments
from pellucid.errors import InputError
from tests.tasks.tokenizers import tokenizer as texts_with
from tests.zoo import build, tokenizer

TEXTS = [
    "the cat sat on the mat",
    "one two three",
    "",
    "a dog went to the city of Paris and gave a drink",
    "so it is",
] * 3


@cache
def llama(bos: bool) -> pl.Model:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2600, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=64)  # fmt: skip
    return pl.load(LlamaForCausalLM(config).eval(), tokenizer=texts_with("byte-bpe") if bos else tokenizer())


@cache
def zoo(family: str) -> pl.Model:
    module = build(family)
    return pl.load(module, tokenizer=tokenizer(module))


def ids(corpus: Corpus, model: pl.Model, after: Any = None) -> list[list[int]]:
    return [list(row.ids) for row in corpus.rows(model, after)]


def test_packed_rows_have_one_bos_in_front_and_none_inside():
    model = llama(bos=True)
    bos, eos = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    written = [*TEXTS, "<s>already marked"]  # as a chat template writes it
    assert model.tokenizer(written[-1])["input_ids"][:2] == [bos, bos]  # what the tokenizer makes of it
    rows = ids(Corpus(written, context=12), model)
    assert rows and all(len(row) == 12 and row[0] == bos and bos not in row[1:] for row in rows)
    slow = [
        i for t in written if t
        for i in [*(j for j in model.tokenizer(t, add_special_tokens=False)["input_ids"] if j != bos), eos]
    ]  # fmt: skip
    assert [i for row in rows for i in row[1:]] == slow[: len(rows) * 11]
    assert len(slow) - len(rows) * 11 < 11  # only what fills no row is left


def test_a_tokenizer_without_bos_packs_plain_rows():
    model = llama(bos=False)
    eos = model.tokenizer.eos_token_id
    stream = [i for t in TEXTS if t for i in [*model.tokenizer(t)["input_ids"], eos]]
    assert ids(Corpus(TEXTS, context=10), model) == [stream[i : i + 10] for i in range(0, len(stream) - 9, 10)]
    assert len(ids(Corpus(TEXTS, context=10, tokens=35), model)) == 3


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_one_a_row_is_what_the_tokenizer_gives(family):
    model = zoo(family)
    whole = [model.tokenizer(t)["input_ids"] if t else [] for t in TEXTS]
    assert ids(Corpus(TEXTS), model) == whole
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    if family == "t5":
        rows = list(Corpus(pairs).rows(model))
        assert [row.decoder for row in rows] == list(reversed(TEXTS)) and [list(r.ids) for r in rows] == whole
        assert inputs(model, rows[:2]).stream("decoder").ids.shape[0] == 2
    else:
        with pytest.raises(InputError, match="text 0 of the corpus is a pair"):
            ids(Corpus(pairs), model)


def test_a_long_text_is_refused_by_its_number_cut_or_read_in_windows():
    model = zoo("bert")
    long = " ".join(["cat dog"] * 6)
    texts, whole = ["a b", long], model.tokenizer(long)["input_ids"]
    front, back = whole[:1], whole[-1:]
    with pytest.raises(InputError, match=rf"text 1 of the corpus has {len(whole)} tokens, more than 10.*long='cut'"):
        ids(Corpus(texts, context=10), model)
    (cut,) = ids(Corpus(texts, context=10, long="cut"), model)[1:]
    assert cut == model.tokenizer(long, truncation=True, max_length=10)["input_ids"]
    windows = ids(Corpus(texts, context=10, long="windows"), model)[1:]
    assert all(w[:1] == front and w[-1:] == back and len(w) <= 10 for w in windows)
    assert [i for w in windows for i in w[1:-1]] == whole[1:-1]
    limit = model.module.config.max_position_embeddings
    with pytest.raises(InputError, match=f"context of {limit + 1} tokens is more than .* holds, {limit}"):
        ids(Corpus(texts, context=limit + 1), model)
    packed = llama(bos=True)
    assert len(ids(Corpus([long] * 40), packed)[0]) == 64  # no more than the model holds, though nothing was said


class Rows:
    """As `datasets` gives them, streamed."""

    def __iter__(self):
        yield from ({"n": i, "text": text} for i, text in enumerate(TEXTS))


def test_lists_generators_files_and_data_sets_are_read_alike(tmp_path):
    model = llama(bos=True)
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    want = ids(Corpus(TEXTS, context=8), model)
    for source in (
        tuple(TEXTS),
        (t for t in TEXTS),
        file,
        Rows(),
        [model.tokenizer(t)["input_ids"] for t in TEXTS if t],
    ):
        assert ids(Corpus(source, context=8), model) == want
    assert ids(Corpus([torch.tensor([1, 5, 6])], packed=False), model) == [[1, 5, 6]]  # ids are taken as they are
    pairs = Corpus([{"en": "the city", "fr": "Paris"}], column=("en", "fr"))
    (row,) = pairs.rows(zoo("t5"))
    assert row.decoder == "Paris"


@pytest.mark.parametrize("corpus", [
    Corpus(TEXTS, context=7), Corpus(TEXTS, packed=False), Corpus(TEXTS, packed=False, context=6, long="windows"),
    Corpus(TEXTS, packed=False, context=6, long="cut", tokens=60), Corpus([" ".join(TEXTS)] * 2, context=9, tokens=100),
])  # fmt: skip
def test_it_goes_on_after_any_row(corpus):
    model = llama(bos=True)
    rows = list(corpus.rows(model))
    assert [row.number for row in rows] == list(range(len(rows)))
    for i, row in enumerate(rows):
        assert list(corpus.rows(model, after=row.place)) == rows[i + 1 :]


def test_a_place_of_another_corpus_is_refused():
    model = llama(bos=True)
    place = list(Corpus(TEXTS, context=7).rows(model))[2].place
    with pytest.raises(InputError, match="are others than those that were read before"):
        ids(Corpus(["another start", *TEXTS[1:]], context=7), model, place)
    with pytest.raises(InputError, match="ends after 0 texts"):
        ids(Corpus([], context=7), model, place)
    later = ids(Corpus([*TEXTS, "and more at the end"], context=7), model, place)  # what was read is the same
    assert later[: len(ids(Corpus(TEXTS, context=7), model)) - 3] == ids(Corpus(TEXTS, context=7), model)[3:]
    rows = [list(Corpus(t, context=7).rows(model)) for t in (TEXTS, TEXTS, TEXTS[::-1])]
    assert digest(rows[0]) == digest(rows[1]) != digest(rows[2])


def test_what_is_no_corpus_is_named():
    model = llama(bos=True)
    for corpus, why in (
        (lambda: Corpus("one text"), "put the one text into a list"),
        (lambda: Corpus(3), "expected several texts"),
        (lambda: Corpus(TEXTS, long="wrap"), "unknown long='wrap'"),
        (lambda: ids(Corpus(["a", None]), model), "text 1 of the corpus is no text"),
        (lambda: ids(Corpus(["a", 1.5]), model), "text 1 of the corpus is no text"),
        (lambda: ids(Corpus([{"texts": "a"}]), model), "row 0 of the corpus has no 'text'.*texts"),
    ):
        with pytest.raises(InputError, match=why):
            corpus()


def test_batches_hold_every_row_once():
    rows = list(Corpus(TEXTS, packed=False).rows(llama(bos=True)))
    real = [row for row in rows if row.ids]
    assert [row for group in batches(rows, 4) for row in group] == real
    assert max(len(group) for group in batches(rows, 4)) == 4
    assert [row for segment in segments(rows, 20) for row in segment] == rows
    groups = list(by_length(rows, 24))
    assert sorted((r for g in groups for r in g), key=lambda r: r.number) == real
    assert all(max(len(r.ids) for r in g) * len(g) <= 24 or len(g) == 1 for g in groups)


def test_defaults_fill_only_what_was_left_open():
    given = Corpus(TEXTS, context=5)
    assert Corpus.of(given, context=9, tokens=40) == Corpus(TEXTS, context=5, tokens=40)
    assert Corpus.of(TEXTS, context=9).context == 9


def test_windows_slide_with_a_stride():
    model = zoo("bert")
    text = " ".join(f"{w}" for w in ["the", "cat", "dog", "city", "of", "Paris", "drink", "so"] * 5)
    whole = model.tokenizer(text)["input_ids"]
    front, back = whole[:1], whole[-1:]
    body = whole[1:-1]
    rows = ids(Corpus([text, "the cat"], context=12, long="windows", stride=4), model)
    assert [row[1:-1] for row in rows[:-1]] == [body[i : i + 10] for i in range(0, len(body) - 10 + 4, 4)]
    assert all(row[:1] == front and row[-1:] == back for row in rows) and rows[-2][1:-1][-1] == body[-1]
    read = list(Corpus([text, "the cat"], context=12, long="windows", stride=4).rows(model))
    for n in (1, 3, len(rows) - 1):  # and it goes on where it stopped
        assert (
            ids(Corpus([text, "the cat"], context=12, long="windows", stride=4), model, read[n - 1].place) == rows[n:]
        )
    assert ids(Corpus([text], context=12, long="windows", stride=10), model) == ids(
        Corpus([text], context=12, long="windows"), model
    )
    assert ids(Corpus([text], context=12, long="cut_left"), model) == [front + body[-10:] + back]
    with pytest.raises(InputError, match="leaves out text between windows of 10 tokens"):
        ids(Corpus([text], context=12, long="windows", stride=11), model)
    with pytest.raises(InputError, match="goes with long='windows'"):
        Corpus([text], long="cut", stride=3)


def test_pairs_rows_of_data_sets_and_streams_are_texts_too():
    from datasets import Dataset

    model = zoo("bert")
    pair = model.tokenizer("the cat", "a dog")["input_ids"]
    assert ids(Corpus([pl.Pair("the cat", "a dog")]), model) == [pair]
    whole = [model.tokenizer(t)["input_ids"] for t in ("the cat", "a dog")]
    data = Dataset.from_dict({"text": ["the cat", "a dog"], "label": [0, 1]})
    for texts in (data, data["text"], data.to_iterable_dataset(), (t for t in ["the cat", "a dog"])):
        assert ids(Corpus(texts), model) == whole
