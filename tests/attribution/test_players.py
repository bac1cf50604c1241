"""Players are tokens, words, sentences or spans; together they hold every token that may get credit, once."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pellucid
from pellucid.attribution import continuation
from pellucid.attribution.case import Case
from pellucid.attribution.players import Players, sentences, words
from pellucid.errors import InputError
from pellucid.metrics import logit
from tests.attribution.hand import PROMPT, opened
from tests.zoo import build

TEXT = "The capital of Italy is Rome. Mary went to the city, and John gave Mary a drink!"


@given(
    text=st.lists(
        st.sampled_from(["The", "Paris", "don't", "x-ray", "A1", ".", "!", ",", "store's", "?!"]),
        min_size=1,
        max_size=12,
    ).map(" ".join),
    unit=st.sampled_from(["token", "word", "sentence"]),
    family=st.sampled_from(["gpt2", "bert"]),
)
@settings(max_examples=40, deadline=None)
def test_each_free_token_has_one_player_and_players_stand_in_order(text, unit, family):
    case = Case.of(opened(family), text, logit(9))
    players = Players.of(case, unit)
    taken = [i for group in players.members for i in group]
    assert taken == np.flatnonzero(~case.fixed).tolist()
    values = np.random.default_rng(0).normal(size=(2, len(case.tokens)))
    np.testing.assert_allclose(players.pool(values).sum(-1), values[:, ~case.fixed].sum(-1))


def test_words_keep_their_subwords_and_marks_stand_alone():
    words = Players.of(Case.of(opened("gpt2"), "Tokenizers don't, he said.", 9), "word").labels
    assert words == ("Tokenizers", "don't", ",", "he", "said", ".")


def test_sentences_end_at_their_marks():
    labels = Players.of(Case.of(opened("bert"), TEXT, logit(9)), "sentence").labels
    assert labels == ("The capital of Italy is Rome.", "Mary went to the city, and John gave Mary a drink!")


def test_spans_are_texts_or_positions_and_all_occurrences_play_together():
    case = Case.of(opened("gpt2"), TEXT, 9)
    players = Players.of(case, ["Mary", "capital of Italy", (0, 1)])
    assert len(players.members[0]) == 2
    assert players.labels[2] == "The"


def test_the_same_word_twice_is_two_players():
    assert Players.of(Case.of(opened("gpt2"), "Mary gave Mary", 9), "word").labels == ("Mary", "gave", "Mary")


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ("words", "unknown players 'words'.*did you mean 'word'"),
        (["Mary", "Mary went"], "the spans overlap"),
        (["Berlin"], "the span 'Berlin' is not in the prompt"),
        ([(3, 3)], "has no tokens of the text"),
    ],
)
def test_bad_players_are_one_clear_error(units, message):
    with pytest.raises(InputError, match=message):
        Players.of(Case.of(opened("gpt2"), TEXT, 9), units)


def test_a_prompt_of_special_tokens_alone_has_nobody_to_credit():
    model = opened("bert")
    with pytest.raises(InputError, match="only special ones"):
        Players.of(Case.of(model, [[1, 2]], logit(9)), "token")
    assert len(Players.of(Case.of(model, PROMPT, logit(9)), "token")) == 5


# ---- in the text as typed


def minilm_case(minilm, text):
    return Case.of(minilm, text, lambda h: h[:, 0, 0])


def test_players_are_named_as_typed_on_an_uncased_model(minilm):
    case = minilm_case(minilm, "Berlin isn't Paris; don't go to BERLIN in 3.6 hours.")
    players = Players.of(case, ["Berlin", re.compile(r"don.t|\d[.]\d"), slice(13, 18)])
    said = [[case.tokens[i].strip() for i in group] for group in players.members]
    assert said == [["berlin"], ["don", "'", "t", "3", ".", "6"], ["paris"]]
    assert Players.of(case, ["berlin"]).members != () and players.labels[0] == "Berlin"
    words = Players.of(case, "word").labels
    assert words == ("Berlin", "isn't", "Paris", ";", "don't", "go", "to", "BERLIN", "in", "3.6", "hours", ".")


def test_words_and_sentences_of_other_scripts():
    said = {
        "नमस्ते दुनिया। यह ठीक है।": (["नमस्ते", "दुनिया", "।", "यह", "ठीक", "है", "।"], 2),
        "สวัสดี ครับ": (["สวัสดี", "ครับ"], 1),
        "你好。再见！": (["你", "好", "。", "再", "见", "！"], 2),
        "cafe\u0301 au 🎉 lait": (["cafe\u0301", "au", "🎉", "lait"], 1),
        'It cost 3.6 e.g. in the U.S. of Mr. J. Smith. "No!" he said...\nYes': (None, 4),
    }
    for text, (expected, count) in said.items():
        if expected is not None:
            assert [text[a:b] for a, b in words(text)] == expected
        assert len(sentences(text)) == count, [text[a:b] for a, b in sentences(text)]


def test_every_token_of_bytes_has_one_player():
    from tests.attribution.test_case import byte_level

    model = pellucid.load(build("gpt2", vocab_size=300), tokenizer=byte_level())
    for text in ("नमस्ते दुनिया", "go 🎉 now", "cafe\u0301 3.6!", "你好。再见！"):
        case = Case.of(model, text, 5)
        for unit in ("word", "sentence"):
            players = Players.of(case, unit)
            assert [i for g in players.members for i in g] == np.flatnonzero(~case.fixed).tolist()
            assert "".join(players.labels).replace(" ", "") == text.replace(" ", "")
    assert Players.of(Case.of(model, "go 🎉 now", 5), ["🎉"]).labels == ("🎉",)


def test_words_of_a_continuation_are_those_of_its_text():
    players = Players.of(Case.of(opened("gpt2"), PROMPT, continuation(" Paris and Rome")), "word")
    assert players.labels == ("The", "capital", "of", "France", "is", "Paris", "and")


@pytest.mark.parametrize("bad", [None, 1, [], {}, [(0, 99)], [None], [(1, 2, 3)], [("a", "b")]])
def test_what_is_no_players_is_one_clear_error(bad):
    with pytest.raises(InputError, match="span|players"):
        Players.of(Case.of(opened("gpt2"), TEXT, 9), bad)
