"""Prompts become tensors, positions can be named, and what cannot be read is said in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pellucid import metrics
from pellucid.engine.inputs import Stream
from pellucid.errors import InputError, SiteError
from tests.engine.hand import PROMPTS, ids, opened


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    at=st.integers(-6, 5),
)
def test_positions_are_counted_on_real_tokens(lengths: list[int], side: str, at: int) -> None:
    width = max(lengths)
    tokens = [list(range(10 * b, 10 * b + n)) for b, n in enumerate(lengths)]
    gap = [[99] * (width - n) for n in lengths]
    rows = [g + t if side == "left" else t + g for t, g in zip(tokens, gap, strict=True)]
    stream = Stream(torch.tensor(rows), (torch.tensor(rows) != 99).long(), tuple(tuple(map(str, t)) for t in tokens))
    if not all(-n <= at < n for n in lengths):
        with pytest.raises(InputError, match="outside the prompt"):
            stream.find(at)
        return
    columns = stream.find(at)
    assert columns is not None
    assert stream.ids.gather(1, columns).flatten().tolist() == [t[at] for t in tokens]


def columns(at: Any, **options: Any) -> list[list[int]]:
    found = opened("llama").inputs(PROMPTS[:1], **options).stream("").find(at)
    assert found is not None
    return found.tolist()


def test_positions_can_be_indices_slices_lists_tokens_and_spans() -> None:
    assert columns(-1) == [[4]]
    assert columns("1:3") == columns("1,2") == columns("-4:-2") == [[1, 2]]
    assert columns(":2") == [[0, 1]]
    assert columns("'France'") == columns("' France'") == columns('"France"') == [[3]]
    assert columns("subject", spans={"subject": [(1, 4)]}) == [[1, 2, 3]]
    assert opened("llama").inputs(PROMPTS).stream("").find("*") is None


def test_the_last_of_equal_tokens_is_meant() -> None:
    inputs = opened("llama").inputs("the city of the king")
    assert inputs.stream("").find("'the'") == torch.tensor([[3]])


def test_encoder_and_decoder_count_their_own_tokens() -> None:
    inputs = opened("t5").inputs(PROMPTS[:2], decoder=["Paris", "John went"])
    assert inputs.stream("encoder").lengths.tolist() == [6, 11]
    assert inputs.stream("decoder").lengths.tolist() == [2, 3]  # the start token comes first
    assert inputs.tensors["decoder_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    run = opened("t5").run(inputs, keep=["encoder.layers.0.resid_pre", "decoder.layers.0.cross.k"])
    assert run.tensor("encoder.layers.0.resid_pre@-1").shape == (2, 1, 32)
    assert run.tensor("decoder.layers.0.cross.k@'</s>'").shape[1] == 1


def test_prompts_may_be_texts_ids_or_tensors() -> None:
    model = opened("llama")
    tokens = model.tokenizer(PROMPTS[0])["input_ids"]
    wanted = model.run(PROMPTS[0]).logits
    ready = model.inputs(PROMPTS[0])
    for given_as in (
        tokens,
        [tokens],
        torch.tensor(tokens),
        {"input_ids": [tokens]},
        model.tokenizer([PROMPTS[0]]),
        ready,
    ):
        assert torch.equal(model.run(given_as).logits, wanted)
    mixed = model.run([PROMPTS[0], tokens[:3]])
    assert mixed.inputs.stream("").lengths.tolist() == [5, 3]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        (["John", ""], "the prompt is empty"),
        ([], "no prompt was given"),
        ([[]], "the prompt is empty"),
        ([3.5], "a prompt must be a string or token ids, not float"),
        (None, "a prompt must be a string or token ids, not None"),
        (5, "a prompt must be a string or token ids, not 5"),
        (torch.zeros(1, 0, dtype=torch.long), r"whole numbers \[batch, length\], not \[1, 0\]"),
        (torch.zeros(1, 3), "not .* of torch.float32"),
        ([5, 97], "token id 97 is unknown: this model has 0 to 96"),
        ([5, -1], "token id -1 is unknown"),
        ({"attention_mask": ids()}, "have no 'input_ids'"),
        ({"input_ids": ids(), "attention_mask": torch.ones(2, 3)}, r"the attention mask is \[2, 3\], but .* \[2, 7\]"),
        ({"input_ids": ids(1, 3), "attention_mask": torch.tensor([[1, 0, 1]])}, "on one stretch of tokens"),
        ({"input_ids": ids(1, 3), "attention_mask": torch.zeros(1, 3).long()}, "on one stretch of tokens"),
    ],
)
def test_a_bad_prompt_is_one_clear_error(prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened("llama").run(prompt)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (5, "'@5' is outside the prompt, which has 5 tokens: 'The' 'capital'"),
        (-6, "outside the prompt"),
        ("3:3", "names no tokens of the prompt"),
        ("::2", "is no position: expected an index"),
        ("subject", "is no position: .* or a span$"),
        ("'Rome'", "'Rome' is not in the prompt; its tokens are 'The' 'capital'"),
        ("'Paris", "expected quotes on both sides"),
        ("1,9", "outside the prompt"),
    ],
)
def test_a_bad_position_is_one_clear_error(at: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        columns(at)


def test_spans_and_targets_are_checked() -> None:
    model = opened("llama")
    with pytest.raises(InputError, match=r"the span 'x' needs one \(first, last \+ 1\) per prompt: expected 2"):
        model.inputs(PROMPTS[:2], spans={"x": [(0, 1)]})
    with pytest.raises(InputError, match="names no tokens"):
        columns("x", spans={"x": [(3, 9)]})
    with pytest.raises(InputError, match="did you mean 'subject'"):
        columns("subjekt", spans={"subject": [(1, 4)]})
    with pytest.raises(InputError, match="names 5, 10 positions"):
        model.inputs(PROMPTS[:2]).stream("").find(":")
    with pytest.raises(InputError, match="only encoder-decoder models take decoder="):
        model.inputs(PROMPTS[0], decoder="Paris")
    with pytest.raises(InputError, match="2 prompts but 1 texts for the decoder"):
        opened("t5").inputs(PROMPTS[:2], decoder=["Paris"])
    with pytest.raises(SiteError, match="ends in '@' without a position"):
        model.run(PROMPTS[0], keep=["layers.0.resid_pre@"])


def test_a_metric_at_a_position_the_prompt_does_not_have_is_an_error() -> None:
    model = opened("llama")
    for use in (
        lambda m: model.score(model.run(PROMPTS), m),
        lambda m: model.sweep(PROMPTS, [[]], m),
    ):
        with pytest.raises(InputError, match=r"reads.*\(3,\).*but a prompt has 3 tokens"):
            use(metrics.logit(7, position=3))


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "t5"])
def test_texts_are_what_was_given(family: str) -> None:
    model = opened(family)
    assert model.inputs(PROMPTS[0]).texts == (PROMPTS[0],)
    assert model.inputs(PROMPTS).texts == tuple(PROMPTS)
    ids = model.inputs(PROMPTS[:2]).tensors
    again = model.inputs({k: v for k, v in ids.items() if k in ("input_ids", "attention_mask")}).texts
    said = [model.tokenizer.decode(row, skip_special_tokens=True) for row in model.tokenizer(PROMPTS[:2])["input_ids"]]
    assert again == tuple(said)


def test_rows_are_the_prompts_chosen_and_repeated() -> None:
    model = opened("llama")
    whole = model.inputs(PROMPTS[:3], spans={"x": [(0, 1), (0, 2), (1, 2)]})
    some = whole.rows([2, 0, 2])
    assert some.texts == (PROMPTS[2], PROMPTS[0], PROMPTS[2])
    assert torch.equal(some.tensors["input_ids"], whole.tensors["input_ids"][[2, 0, 2]])
    assert some.stream("").spans["x"] == [(1, 2), (0, 1), (1, 2)]
    assert torch.equal(model.run(some).logits, model.run(whole).logits[[2, 0, 2]])


def test_a_decoder_goes_on_from_what_it_is_given() -> None:
    model = opened("t5")
    whole = model.generate(PROMPTS[0], max_new_tokens=4)
    first = model.tokenizer.decode(whole.tokens[0, :1])
    begun = model.generate(PROMPTS[0], decoder=first, max_new_tokens=3)
    ids = model.inputs(PROMPTS[0], decoder=first).stream("").ids[0, 1:].tolist()
    if ids == whole.tokens[0, :1].tolist():  # the text is read as the token it came from
        assert begun.tokens[0].tolist() == whole.tokens[0, 1:].tolist()
    with pytest.raises(InputError, match="differ in length"):
        model.generate(PROMPTS[:2], decoder=["Paris", "Paris Paris Paris"])
