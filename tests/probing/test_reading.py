"""Reading: words find their tokens, padding and order do not matter, stores give what runs give, treebanks are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pellucid.errors import InputError
from pellucid.probing import (
    Examples,
    Inlp,
    Leace,
    LogisticProbe,
    RidgeProbe,
    Spans,
    Treebank,
    read,
    ridge,
    roc,
    statements,
)
from pellucid.store import store_activations
from tests.probing.trees import CONLLU, tiny

TEXTS = ["The capital of France is Paris", "he drank", "When John went home Mary cried bitterly", "a bc def"]


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_a_word_is_its_tokens_pooled_as_a_run_of_its_text_alone_has_them(model, pool):
    spans = Spans.words(TEXTS)
    features = read(model, spans, pool=pool, batch=3)
    assert features.layers == [-1, 0, 1]
    for i, (text, start, stop) in enumerate(spans.where):
        run = model.run(TEXTS[text], keep=list(features.sites))
        offsets = model.tokenizer(TEXTS[text], return_offsets_mapping=True)["offset_mapping"]
        inside = [t for t, (a, b) in enumerate(offsets) if a < stop and b > start]
        inside = {"first": inside[:1], "last": inside[-1:], "mean": inside}[pool]
        for layer, site in enumerate(features.sites):
            expected = run.tensor(site)[0, inside].mean(0)
            torch.testing.assert_close(features.values[layer, i], expected, atol=1e-5, rtol=1e-4)


def test_neither_padding_nor_order_nor_batch_size_matters(model):
    one, many = (read(model, Spans.words(TEXTS), batch=b).values for b in (1, 4))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-4)
    turned = read(model, Spans.words(TEXTS[::-1]), batch=2)
    first = [i for i, (text, _, _) in enumerate(turned.spans.where) if text == len(TEXTS) - 1]
    torch.testing.assert_close(turned.values[:, first], one[:, : len(first)], atol=1e-5, rtol=1e-4)


def test_an_encoder_reads_the_same_with_and_without_padding(minilm):
    texts = ["Dogs bark.", "The unbelievably old dog barked at the postman."]
    both = read(minilm, Spans.words(texts), batch=2).values
    alone = torch.cat([read(minilm, Spans.words([t])).values for t in texts], 1)
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-3)


def test_a_store_of_the_same_texts_gives_what_running_gives_and_refuses_others(model, tmp_path):
    spans = Spans.words(TEXTS)
    store = store_activations(model, TEXTS, ["layers.*.resid_post"], tmp_path, batch=2, shard_rows=9, dtype=torch.float32)  # fmt: skip
    run = read(model, spans, sites="layers.*.resid_post")
    torch.testing.assert_close(read(model, spans, store=store).values, run.values, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="another text"):
        read(model, Spans.words(["he drank", *TEXTS[1:]]), store=store)


def test_pairs_are_both_vectors_and_their_product(model):
    spans = Spans.words(TEXTS[:1])
    features = read(model, spans)
    pair = features.of(Examples(spans, ["x"], first=[1], second=[4]), 1)
    a, b = features.values[1, [1, 4]]
    torch.testing.assert_close(pair[0], torch.cat([a, b, a * b]))


def test_what_cannot_be_read_is_named(model):
    with pytest.raises(InputError, match="outside the 1 texts"):
        Spans(("abc",), ((0, 1, 9),))
    with pytest.raises(InputError, match="expected one for each"):
        Examples(Spans.words(["a b"]), ["x"])
    with pytest.raises(InputError, match="cannot pool"):
        read(model, Spans.words(["a"]), pool="max")
    with pytest.raises(InputError, match="no value at every token"):
        read(model, Spans.words(["a"]), sites="layers.0.attn.pattern")


def test_a_treebank_knows_the_characters_of_every_word():
    bank = Treebank.parse(CONLLU)
    assert [s.text for s in bank.sentences] == ["Mary can't sing.", "The cat slept"]
    assert [bank.spans.surface(i) for i in range(8)] == ["Mary", "ca", "n't", "sing", ".", "The", "cat", "slept"]
    assert bank.tags().labels.tolist() == ["PROPN", "AUX", "PART", "VERB", "PUNCT", "DET", "NOUN", "VERB"]
    relations = bank.relations()
    assert relations.labels.tolist() == ["nsubj", "aux", "advmod", "punct", "det", "nsubj"]
    assert (relations.first.tolist(), relations.second.tolist()) == ([0, 1, 2, 4, 5, 6], [3, 3, 3, 3, 6, 7])
    assert bank.relations(subtypes=True).labels[2] == "advmod:neg"


def test_arcs_come_with_as_many_pairs_that_are_none():
    bank = Treebank.parse(CONLLU)
    arcs = bank.arcs()
    assert (arcs.labels == "head").sum() == (arcs.labels == "other").sum() == 6
    heads = set(zip(bank.relations().first, bank.relations().second, strict=True))
    pairs = list(zip(arcs.first, arcs.second, arcs.labels, strict=True))
    assert all(((a, b) in heads) == (label == "head") and a != b for a, b, label in pairs)


def test_damaged_treebanks_are_refused_by_line():
    with pytest.raises(InputError, match="line 2 is no CoNLL-U"):
        Treebank.parse("# text = a\n1\ta\n")
    with pytest.raises(InputError, match="outside its 3 words"):
        Treebank.parse(CONLLU.replace("NN\t_\t3", "NN\t_\t7"))
    with pytest.raises(InputError, match="not in the text"):
        Treebank.parse(CONLLU.replace("text = Mary", "text = Mark"))
    with pytest.raises(InputError, match="no sentence"):
        Treebank.parse("")


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), float("inf")])
def test_a_missing_label_is_named_by_its_row(missing):
    """A16: NaN fitted a probe with R2 .90, None became the class "None"."""
    spans, numbers = Spans.words(["a b c"]), isinstance(missing, float | np.floating)
    labels = [0.5, 1.0, missing] if numbers else ["x", "y", missing]
    with pytest.raises(InputError, match="row 2 has no label"):
        Examples(spans, labels)
    x = torch.randn(6, 2)
    for fit in (LogisticProbe().fit, RidgeProbe().fit, Leace().fit, Inlp().fit):
        with pytest.raises(InputError, match="row 5 has no label"):
            fit(x, [0.0, 1.0, 0.0, 1.0, 0.0, missing])
    x[3, 0] = float("nan")
    with pytest.raises(InputError, match="row 3 of the features"):
        LogisticProbe().fit(x, list("ababab"))
    with pytest.raises(InputError, match="row 1 has no label"):
        roc([0.1, 0.2, 0.3], [True, missing, False])
    with pytest.raises(InputError, match="row 0 has no label"):
        statements(["a", "b"], [missing, True], ["x", "x"])
    if numbers:
        with pytest.raises(InputError, match="row 2 has no label"):
            Examples(spans, torch.tensor(labels))
        with pytest.raises(InputError, match="missing or infinite"):
            ridge(torch.ones(3, 2), torch.tensor(labels), 1.0)


def test_whole_numbers_are_classes_only_where_asked():
    """A27: counts became classes."""
    spans = Spans.words(["a b c"])
    depth = Examples(spans, [1, 2, 10])
    assert depth.numeric and depth.labels.tolist() == [1.0, 2.0, 10.0]
    with pytest.raises(InputError, match="kind='classes'"):
        depth.classes  # noqa: B018
    assert Examples(spans, [1, 2, 10], kind="classes").classes == ("1", "10", "2")
    assert Examples(spans, [True, False, True]).classes == ("False", "True")
    assert Examples(spans, np.array(["x", "y", "x"])).classes == ("x", "y")
    again = Examples(spans, [1, 2, 10], kind="classes")[[0, 2]]
    assert again.classes == ("1", "10")


def test_a_text_the_model_cannot_hold_is_named(model):
    """B9: one long text ended the reading at its batch, unnamed."""
    limit = model.module.config.max_position_embeddings
    with pytest.raises(InputError, match=rf"text 1 of the corpus has {limit + 1} tokens, more than {limit}"):
        read(model, Spans.whole(["a b", " ".join(["the"] * (limit + 1)), "c"]))


def test_what_holds_much_prints_little(model):
    """B14."""
    spans, bank = Spans.words(TEXTS), Treebank.parse(CONLLU)
    for thing in (spans, Examples(spans, ["x"] * len(spans)), read(model, spans), bank):
        assert len(repr(thing)) < 160, repr(thing)
