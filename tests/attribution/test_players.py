"""Players are tokens, words, sentences or spans; together they hold every token that may get credit, once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.attribution.case import Case
from pellucid.attribution.players import Players
from pellucid.errors import InputError
from pellucid.metrics import logit
from tests.attribution.hand import PROMPT, opened

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
