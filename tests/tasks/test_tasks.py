"""Every task, on every tokenizer: pairs are aligned, answers are what would follow, refusals are clear."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch

from pellucid.errors import InputError
from pellucid.tasks import (
    RELATIONS,
    Prompts,
    capitals,
    facts,
    gendered_professions,
    greater_than,
    indirect_objects,
    subject_verb_agreement,
)
from pellucid.tasks.agreement import NOUNS
from pellucid.tasks.ioi import NAMES
from pellucid.tasks.professions import STEREOTYPES
from pellucid.tasks.world import COUNTRIES
from tests.tasks.tokenizers import KINDS, tokenizer

# task -> the spans whose text differs between clean and corrupted
TASKS: dict[str, tuple[Callable[..., Prompts], set[str]]] = {
    "indirect_objects": (indirect_objects, {"S2"}),
    "indirect_objects, new names": (partial(indirect_objects, corruption="names"), {"IO", "S1", "S2"}),
    "greater_than": (greater_than, {"year"}),
    "agreement": (subject_verb_agreement, {"subject"}),
    "agreement, no attractor": (partial(subject_verb_agreement, attractor=False), {"subject"}),
    "capitals": (capitals, {"subject"}),
    "opposites": (lambda tok, n=50, seed=0, **more: facts(tok, "opposite", n, seed, **more), {"subject"}),
    "gendered_professions": (gendered_professions, {"profession"}),
}
everywhere = pytest.mark.parametrize("kind", KINDS)
each_task = pytest.mark.parametrize("task", TASKS)


@everywhere
@each_task
def test_pairs_have_equal_length_and_differ_only_inside_their_changed_spans(task: str, kind: str) -> None:
    make, changed = TASKS[task]
    tok = tokenizer(kind)
    prompts = make(tok, n=20)
    assert len(prompts) == len(set(zip(prompts.clean, prompts.corrupted, strict=True))) == 20
    for i, (clean, corrupted) in enumerate(zip(prompts.clean, prompts.corrupted, strict=True)):
        a, b = tok(clean).input_ids, tok(corrupted).input_ids
        differ = {j for j, (x, y) in enumerate(zip(a, b, strict=True)) if x != y}
        allowed = set(chain.from_iterable(range(*prompts.spans[name][i]) for name in changed))
        assert differ
        assert differ <= allowed


@everywhere
@each_task
def test_each_answer_is_the_one_token_that_continues_the_prompt(task: str, kind: str) -> None:
    tok = tokenizer(kind)
    prompts = TASKS[task][0](tok, n=5)
    assert prompts.single_token
    for i, clean in enumerate(prompts.clean):
        head = tok(clean, add_special_tokens=False).input_ids
        for texts, ids in (
            (prompts.answers[i], prompts.answer_ids[i]),
            (prompts.wrong[i], prompts.wrong_ids[i]),
        ):
            for text, answer in zip([texts] if isinstance(texts, str) else texts, ids, strict=True):
                assert tok(clean + text, add_special_tokens=False).input_ids == head + answer
                assert answer != [tok.unk_token_id]


@each_task
def test_a_masked_prompt_has_its_mask_where_the_metric_reads(task: str) -> None:
    tok = tokenizer("minilm")
    prompts = TASKS[task][0](tok, n=20, masked=True)
    for clean, corrupted in zip(prompts.clean, prompts.corrupted, strict=True):
        for text in (clean, corrupted):
            assert tok(text).input_ids[prompts.position] == tok.mask_token_id
    assert prompts.metric().bind(tok, 20).positions == (prompts.position,)


@everywhere
def test_spans_cover_exactly_their_words(kind: str) -> None:
    tok = tokenizer(kind)
    for prompt in indirect_objects(tok, n=10):
        ids = tok(prompt.clean[0]).input_ids
        cover = {name: tok.decode(ids[slice(*span[0])]).strip().lower() for name, span in prompt.spans.items()}
        assert cover["IO"] == str(prompt.answers[0]).strip().lower()
        assert cover["S1"] == cover["S2"] == str(prompt.wrong[0]).strip().lower()
        assert prompt.spans["S2"][0][0] > max(prompt.spans["S1"][0][0], prompt.spans["IO"][0][0])


@each_task
def test_the_seed_decides(task: str) -> None:
    make, tok = TASKS[task][0], tokenizer("minilm")
    assert make(tok, n=10, seed=1) == make(tok, n=10, seed=1)
    assert make(tok, n=10, seed=1).clean != make(tok, n=10, seed=2).clean


@each_task
def test_the_metric_is_higher_for_a_model_that_answers_right(task: str) -> None:
    tok = tokenizer("minilm")
    prompts = TASKS[task][0](tok, n=6)
    logits = torch.zeros(6, 4, len(tok))
    for row, answers in enumerate(prompts.answer_ids):
        logits[row, -1, [ids[0] for ids in answers]] = 9.0
    assert (prompts.metric().bind(tok, 6).score(logits) > 0.5).all()
    assert (prompts.metric(position=-2).bind(tok, 6).score(logits).abs() < 0.5).all()


@pytest.mark.parametrize(
    ("kind", "prompt_end", "answer"),
    [
        ("digits-1", "to the year 17", r"\d"),
        ("digits-2", "to the year 17", r"\d\d"),
        ("digits-3", "to the year ", r"7\d\d"),
        ("byte-bpe", "to the year", r" 17\d\d"),
    ],
)
def test_greater_than_asks_in_the_form_that_the_tokenizer_has(kind: str, prompt_end: str, answer: str) -> None:
    import re

    for prompt in greater_than(tokenizer(kind), n=10):
        year = re.findall(r"\d+", prompt.clean[0])[0][-2:]
        later, rest = prompt.answers[0], prompt.wrong[0]
        assert prompt.clean[0].endswith(prompt_end)
        assert all(re.fullmatch(answer, text) for text in [*later, *rest])
        digits = len(re.sub(r"\D", "", later[0]))
        number = [int(text[-2:]) * (10 if digits == 1 else 1) for text in [*later]]
        assert min(number) > int(year) >= max(int(text[-2:]) * (10 if digits == 1 else 1) for text in rest)


def test_an_indirect_object_swap_turns_the_answer_around() -> None:
    for prompt in indirect_objects(tokenizer("minilm"), n=10):
        io, s = str(prompt.answers[0]), str(prompt.wrong[0])
        assert (prompt.clean[0].count(io), prompt.clean[0].count(s)) == (1, 2)
        assert (prompt.corrupted[0].count(io), prompt.corrupted[0].count(s)) == (2, 1)


def test_both_name_orders_numbers_and_stereotypes_occur() -> None:
    tok = tokenizer("minilm")
    names = indirect_objects(tok, n=40).spans
    assert {io < s for (io, _), (s, _) in zip(names["IO"], names["S1"], strict=True)} == {True, False}
    assert set(gendered_professions(tok, n=40).answers) == {" he", " she"}
    assert set(subject_verb_agreement(tok, n=40).answers) == {" is", " are", " was", " were", " has", " have"}


def test_a_character_tokenizer_is_refused_with_what_is_missing() -> None:
    tok = tokenizer("characters")
    with pytest.raises(InputError, match=r"0 of \d+ names are one token here"):
        indirect_objects(tok)
    with pytest.raises(InputError, match="answer of several tokens"):
        gendered_professions(tok)
    with pytest.raises(InputError, match="try single_token=False"):
        capitals(tok)


def test_answers_of_several_tokens_say_so_and_are_scored_by_teacher_forcing() -> None:
    tok = tokenizer("characters")
    prompts = capitals(tok, n=5, single_token=False)
    assert not prompts.single_token
    with pytest.raises(InputError, match=r"use prompts\.teacher_forced\(\)"):
        prompts.metric()
    forced = prompts.teacher_forced()
    ids = [tok(text).input_ids for text in forced.clean]
    longest = max(map(len, ids))
    torch.manual_seed(0)
    logits = torch.randn(5, longest, len(tok), dtype=torch.float64)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    expected = []
    for row, (text, answer) in enumerate(zip(forced.clean, prompts.answers, strict=True)):
        log_p = logits[row].log_softmax(-1)
        assert text.endswith(str(answer))
        places = range(longest - len(answer), longest)
        expected.append(sum(log_p[p - 1, ids[row][p - longest]] for p in places))
    scores = forced.metric().bind(tok, 5).score(logits, mask)
    torch.testing.assert_close(scores, torch.stack(expected))


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relation_works_on_a_real_vocabulary(relation: str) -> None:
    prompts = facts(tokenizer("smollm2"), relation)
    assert len(prompts) == 50
    assert all(right != wrong for right, wrong in zip(prompts.answers, prompts.wrong, strict=True))


def test_wrong_arguments_get_one_clear_sentence() -> None:
    tok = tokenizer("minilm")
    with pytest.raises(InputError, match="no relation 'capitol'; did you mean 'capital'"):
        facts(tok, "capitol")
    with pytest.raises(InputError, match=r"allows only \d+ of 100000 prompts .* ask for fewer"):
        facts(tok, "capital", n=100_000)
    with pytest.raises(InputError, match="at least 1"):
        capitals(tok, n=0)
    with pytest.raises(InputError, match="'swap' or 'names'"):
        indirect_objects(tok, corruption="noise")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="11 to 19"):
        greater_than(tok, century=3)
    for make, _ in TASKS.values():
        with pytest.raises(InputError, match="has none: leave it out"):
            make(tokenizer("smollm2"), masked=True)
    with pytest.raises(InputError, match="one mask holds one token"):
        capitals(tok, masked=True, single_token=False)


def test_word_lists_are_large_and_without_repetition() -> None:
    professions = [p for side in STEREOTYPES.values() for p in side]
    for words, least in ((NAMES, 40), (professions, 40), (NOUNS, 30), ([row[0] for row in COUNTRIES], 30)):
        assert len(words) == len(set(words)) >= least


def test_importing_tasks_does_not_import_torch() -> None:
    code = "import sys, pellucid.tasks; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_two_documented_examples_on_smollm2() -> None:
    def first(prompts: Prompts) -> dict[str, Any]:
        return {name: getattr(prompts, name)[0] for name in ("clean", "corrupted", "answers", "wrong")}

    assert first(capitals(tokenizer("smollm2"), n=4)[3]) == {
        "clean": "The capital of Spain is the city of",
        "corrupted": "The capital of France is the city of",
        "answers": " Madrid",
        "wrong": " Paris",
    }
