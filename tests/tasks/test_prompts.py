"""Prompts of one's own: checked pairs, slices, tables; and how texts are cut into answers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from pellucid.errors import InputError
from pellucid.tasks import Prompts, indirect_objects
from pellucid.tasks.tokens import answer_ids, encode, pieces, single_id
from tests.tasks.tokenizers import KINDS, tokenizer

everywhere = pytest.mark.parametrize("kind", KINDS)


def test_own_pairs_are_checked_and_their_change_is_a_span() -> None:
    tok = tokenizer("smollm2")
    clean, corrupted = ["The dog is", "My cat was"], ["The cat is", "My dog was"]
    prompts = Prompts.from_pairs(clean, corrupted, [" big", " old"], [[" small", " thin"], " new"], tok)
    assert prompts.spans == {"changed": [(1, 2), (1, 2)]}
    assert prompts.metric().bind(tok, 2).tokens.shape == (2, 3)  # type: ignore[union-attr]
    assert (prompts.position, prompts.single_token, prompts.name) == (-1, True, "pairs")


def test_a_pair_that_does_not_align_shows_where_it_parts() -> None:
    with pytest.raises(InputError) as caught:
        Prompts.from_pairs(
            ["The dog is", "The dog is very"],
            ["The cat is", "The rhinoceros is very"],
            [" big"] * 2,
            [" small"] * 2,
            tokenizer("smollm2"),
        )
    message = str(caught.value)
    assert message.startswith("pair 1 does not align: clean has 4 tokens and corrupted 5; from token 1 on")
    assert "' dog' ' is'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("clean", "corrupted", "answers", "expected"),
    [
        (["a dog"], ["a dog"], [" is"], "are the same 2 tokens"),
        (["a dog"], ["a cat", "a bird"], [" is"], "got 1 clean, 2 corrupted, 1 answers, 1 wrong"),
        ([], [], [], "got 0 clean"),
        (["a do"], ["a ca"], ["g"], "'g' has no tokens of its own after 'a do'"),
    ],
)
def test_unusable_pairs_are_refused(clean: list[str], corrupted: list[str], answers: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Prompts.from_pairs(clean, corrupted, answers, [" was"] * len(answers), tokenizer("smollm2"))


def test_a_mask_in_own_pairs_is_where_the_answer_goes() -> None:
    tok = tokenizer("minilm")
    prompts = Prompts.from_pairs(["The dog is [MASK]."], ["The cat is [MASK]."], ["big"], [" small"], tok)
    assert prompts.position == -3
    assert prompts.answer_ids == [[[tok.convert_tokens_to_ids("big")]]]
    with pytest.raises(InputError, match="not equally far from the end"):
        Prompts.from_pairs(
            ["The dog is [MASK].", "The dog is [MASK] here."],
            ["The cat is [MASK].", "The cat is [MASK] here."],
            [" big"] * 2,
            [" small"] * 2,
            tok,
        )


def test_one_mask_does_not_hold_several_tokens() -> None:
    tok = tokenizer("minilm")
    with pytest.raises(InputError, match="and one mask holds one"):
        Prompts.from_pairs(["The dog is [MASK]."], ["The cat is [MASK]."], [" ouagadougou"], [" small"], tok)


def test_slicing_keeps_everything_together() -> None:
    tok = tokenizer("minilm")
    prompts = indirect_objects(tok, n=6)
    part = prompts[2:5]
    assert len(part) == 3
    assert part[0] == prompts[2]
    assert prompts[-1].clean == prompts.clean[-1:]
    assert part.spans["IO"] == prompts.spans["IO"][2:5]
    assert [each.clean[0] for each in prompts] == prompts.clean
    with pytest.raises(IndexError):
        prompts[6]


def test_the_table_has_a_row_per_pair() -> None:
    table = indirect_objects(tokenizer("minilm"), n=6).table()
    assert len(table) == 6
    assert list(table.columns)[:5] == ["clean", "corrupted", "answers", "wrong", "IO"] or "IO" in table.columns


def test_teacher_forcing_is_refused_where_it_means_nothing() -> None:
    prompts = indirect_objects(tokenizer("minilm"), n=2, masked=True)
    with pytest.raises(InputError, match="causal prompts"):
        prompts.teacher_forced()
    forced = indirect_objects(tokenizer("minilm"), n=2).teacher_forced()
    with pytest.raises(InputError, match="not yet forced"):
        forced.teacher_forced()


@everywhere
def test_an_answer_is_cut_as_in_running_text(kind: str) -> None:
    tok = tokenizer(kind)
    prompt = "The capital of France is"
    head = tok(prompt, add_special_tokens=False).input_ids
    assert head + answer_ids(tok, " Paris") == tok(prompt + " Paris", add_special_tokens=False).input_ids


def test_text_without_a_space_is_cut_as_it_continues_a_word_or_number() -> None:
    tok = tokenizer("digits-2")
    assert answer_ids(tok, "32") == tok("in 1732", add_special_tokens=False).input_ids[-1:]
    metaspace = tokenizer("unigram")
    assert metaspace.convert_ids_to_tokens(answer_ids(metaspace, " Paris")) == ["▁Paris"]
    assert not metaspace.convert_ids_to_tokens(answer_ids(metaspace, "Paris"))[0].startswith("▁")


def test_an_answer_of_several_tokens_is_refused_with_its_pieces_and_the_way_out() -> None:
    tok = tokenizer("smollm2")
    with pytest.raises(InputError) as caught:
        single_id(tok, " Ouagadougou")
    cut = " ".join(map(repr, pieces(tok, " Ouagadougou", specials=False)))
    assert f"({cut})" in str(caught.value)
    assert "use sequence_log_probability(' Ouagadougou')" in str(caught.value)
    with pytest.raises(InputError, match="or ' Copenhagen', which is one token"):
        single_id(tok, "Copenhagen")
    with pytest.raises(InputError, match="unknown to this tokenizer"):
        single_id(tokenizer("word"), " Ouagadougou")
    with pytest.raises(InputError, match="empty string"):
        single_id(tok, "")


def test_a_tokenizer_without_offsets_is_read_by_decoding() -> None:
    ids, offsets = encode(ByT5Tokenizer(), "é b")
    assert len(ids) == 5 and [("é b")[a:b] for a, b in offsets] == ["é", "é", "", "b", ""]


def test_a_metric_from_texts_equals_the_one_from_the_prompts_ids() -> None:
    tok = tokenizer("smollm2")
    prompts = indirect_objects(tok, n=4)
    from pellucid.metrics import logit_difference

    logits = torch.randn(4, 3, len(tok))
    by_text = logit_difference(prompts.answers, prompts.wrong).bind(tok, 4).score(logits)
    assert torch.equal(by_text, prompts.metric().bind(None, 4).score(logits))


def test_a_word_that_is_another_token_after_a_space_is_said(smollm2: Any) -> None:
    with pytest.warns(UserWarning, match="'Paris' and ' Paris' are different tokens"):
        one = single_id(smollm2.tokenizer, "Paris")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert single_id(smollm2.tokenizer, " Paris") != one
        single_id(smollm2.tokenizer, one)
