"""Prompts become tensors, positions can be named, and what cannot be read is said in one sentence."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import pellucid
from pellucid import metrics
from pellucid.engine.inputs import Stream, left_padded
from pellucid.errors import InputError, SiteError
from tests.engine.hand import PROMPTS, ids, opened
from tests.engine.test_text_map import byte_level
from tests.tasks.tokenizers import tokenizer as tokenizer_of
from tests.zoo import build, inputs, tokenizer


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


# ---- whatever people bring, held against transformers alone

CHATML = (
    "{% if messages[0]['role'] == 'narrator' %}{{ raise_exception('no narrators') }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] | trim + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "the system of the user"},
    {"role": "user", "content": " the capital of France "},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "the city"},
]


@cache
def chatting() -> pellucid.Model:
    """A byte-level model with a chat template that writes the BOS itself, and a tokenizer that would add one more."""
    made = copy.deepcopy(byte_level())
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.bos_token_id)])
    made.backend_tokenizer.post_processor = template
    made.chat_template = "{{ '<s>' }}" + CHATML
    torch.manual_seed(0)
    module = LlamaForCausalLM(
        LlamaConfig(vocab_size=310, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    return pellucid.load(module.eval(), tokenizer=made)


def test_messages_go_through_the_chat_template_once() -> None:
    model = chatting()
    ids = model.tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    inputs = model.inputs(TALK)
    assert inputs.stream("").ids[0].tolist() == ids and ids.count(model.tokenizer.bos_token_id) == 1
    rendered = model.tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert inputs.texts == (rendered,)
    assert model.inputs(rendered).stream("").ids[0].tolist() == ids  # as one text: no second BOS either (A8)
    begun = [*TALK, {"role": "assistant", "content": "It is"}]
    ids = model.tokenizer.apply_chat_template(begun, continue_final_message=True, return_dict=False)
    assert model.inputs(begun).stream("").ids[0].tolist() == ids
    several = model.inputs([TALK, TALK[1:2]])
    assert several.stream("").lengths.tolist() == [
        len(inputs.stream("").ids[0]),
        len(model.inputs(TALK[1:2]).stream("").ids[0]),
    ]
    plain = pellucid.Chat(TALK, begin=False)
    assert not model.inputs(plain).texts[0].endswith("<|assistant|>\n")
    with pytest.raises(InputError, match="no chat template"):
        opened("llama").inputs(TALK)
    with pytest.raises(InputError, match="does not take this conversation"):
        model.inputs(pellucid.Chat([{"role": "narrator", "content": "x"}]))


def test_turns_are_named_by_role() -> None:
    stream = chatting().inputs(TALK).stream("")

    def said(at: str) -> str:
        found = stream.find(at)
        assert found is not None
        return str(chatting().tokenizer.decode(stream.ids[0, found[0]]))

    assert said("user") == said("user[-1]") == said("user[1]") == "the city"
    assert said("user[0]") == "the capital of France"
    assert said("system") == "the system of the user"
    assert said("assistant") == "Paris"
    with pytest.raises(InputError, match=r"has 2 turns here"):
        stream.find("user[2]")
    with pytest.raises(InputError, match="nobody speaks as 'tool' here"):
        stream.find("tool")
    run = chatting().run(TALK, keep="layers.0.resid_post@user[0]")
    assert run.tensor("layers.0.resid_post@user[0]").shape[1] == stream.find("user[0]").shape[1]  # type: ignore[union-attr]


@cache
def minilm_like() -> pellucid.Model:
    made = tokenizer_of("minilm")
    torch.manual_seed(0)
    module = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(made), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    return pellucid.load(module.eval(), tokenizer=made)


def test_a_pair_is_said_and_two_prompts_are_a_list() -> None:
    model, pair = minilm_like(), pellucid.Pair("A man eats.", "He dines.")
    call = model.tokenizer("A man eats.", "He dines.", return_tensors="pt")
    assert torch.equal(model.run(pair).logits, model.module(**call).logits)
    both = model.inputs([pair, "He dines."])
    wanted = model.tokenizer([("A man eats.", "He dines."), ("He dines.",)][:1], return_tensors="pt")
    assert torch.equal(both.tensors["token_type_ids"][:1], wanted["token_type_ids"])
    assert (
        float((model.run(both).logits - torch.cat([model.run(pair).logits, model.run("He dines.").logits])).abs().max())
        < 1e-5
    )
    stream = both.stream("")
    assert stream.maps[0].tokens(*stream.maps[0].find("dines")) == range(7, 9)  # type: ignore[misc]
    with pytest.raises(InputError, match=r"write \[a, b\] for two, pl.Pair\(a, b\) for a pair"):
        model.run(("A man eats.", "He dines."))
    assert len(model.inputs(["A man eats.", "He dines."])) == 2
    with pytest.raises(InputError, match=r"pl.Pair\('first', 'second'\)"):
        pellucid.Pair("a", 3)  # type: ignore[arg-type]


def test_what_a_tokenizer_gives_is_a_prompt() -> None:
    model = chatting()
    tokens = model.tokenizer("the capital")["input_ids"]
    wanted = model.run("the capital").logits
    ragged = model.tokenizer(["the capital", "the"])
    for given_as in (model.tokenizer("the capital"), dict(model.tokenizer("the capital")), np.array(tokens),
                     {"input_ids": np.array([tokens])}, torch.tensor([tokens]), [torch.tensor(i) for i in tokens],
                     {"input_ids": torch.tensor(tokens), "attention_mask": [1] * len(tokens)}):  # fmt: skip
        assert torch.equal(model.run(given_as).logits, wanted)
    assert model.inputs(ragged).stream("").lengths.tolist() == [len(row) for row in ragged["input_ids"]]
    ended = model.inputs("\n")
    assert ended.texts == ("\n",) and ended.stream("").ids[0].tolist() == model.tokenizer("\n")["input_ids"]


def test_rows_columns_and_generators_are_prompts() -> None:
    from datasets import Dataset

    model, texts = chatting(), ["the capital", "of France is"]
    data = Dataset.from_dict({"text": texts, "label": [0, 1]})
    wanted = model.inputs(texts)
    for given_as in (data, data["text"], (t for t in texts), list(data), data.to_iterable_dataset(), np.array(texts)):
        again = model.inputs(given_as)
        assert again.texts == tuple(texts) and torch.equal(again.stream("").ids, wanted.stream("").ids)
    assert model.inputs(data[0]).texts == ("the capital",)
    assert model.inputs({"messages": TALK, "n": 3}).texts == model.inputs(TALK).texts
    with pytest.raises(InputError, match="a row has no column 'text', and of its columns a, b several are text"):
        model.inputs({"a": "x", "b": "y"})


def test_embeddings_are_a_prompt() -> None:
    model = chatting()
    ids = model.tokenizer("the capital", return_tensors="pt")["input_ids"]
    embeds = model.module.get_input_embeddings()(ids).detach()
    run = model.run({"inputs_embeds": embeds}, keep="layers.0.resid_pre@-1")
    assert float((run.logits - model.run("the capital").logits).detach().abs().max()) < 1e-6
    assert torch.allclose(run.tensor("layers.0.resid_pre@-1")[:, 0], embeds[:, -1])
    with pytest.raises(InputError, match=r"inputs_embeds must be numbers \[batch, length, d_model\]"):
        model.run({"inputs_embeds": embeds[0]})
    with pytest.raises(InputError, match="say the same"):
        model.run({"inputs_embeds": embeds, "input_ids": ids})


@pytest.mark.parametrize("truncate", ["left", "right", 6, ("left", 6), ("right", 6)])
def test_truncating_is_the_tokenizers_own(truncate: Any) -> None:
    model = minilm_like()
    text = "the capital of France is a city of many people " * (60 if isinstance(truncate, str) else 1)
    side, room = (truncate if isinstance(truncate, str) else "right" if isinstance(truncate, int) else truncate[0],
                  512 if isinstance(truncate, str) else 6)  # fmt: skip
    own = copy.deepcopy(model.tokenizer)
    own.truncation_side = side
    inputs = model.inputs([text, "a city"], truncate=truncate)
    stream = inputs.stream("")
    assert stream.ids[0].tolist() == own(text, truncation=True, max_length=room)["input_ids"]
    assert stream.ids[1, stream.mask[1].bool()].tolist() == own("a city")["input_ids"]
    for (a, b), label in zip(stream.maps[0].offsets[1:-1], stream.labels[0][1:-1], strict=True):
        assert text[a:b].lower() == label.removeprefix("##")
    assert inputs.texts[0] == text  # as it was given
    if not isinstance(truncate, str):
        pair = model.inputs(pellucid.Pair(text, "a city"), truncate=("right", 9)).stream("").ids[0].tolist()
        assert pair == own(text, "a city", truncation=True, max_length=9)["input_ids"] or side == "left"


@pytest.mark.parametrize("truncate", ["middle", 0, True, ("left", "x"), 2.5, ("left", 0), 2])
def test_a_bad_truncation_is_one_clear_error(truncate: Any) -> None:
    with pytest.raises(InputError, match="truncate="):
        minilm_like().inputs("the capital of France", truncate=truncate)


# ---- masks


def padding(pad: str, **roles: str) -> Any:
    made = copy.deepcopy(byte_level())
    made.add_special_tokens({"eos_token": "</s>", "pad_token": pad, **roles})
    return made


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_that_were_padded_without_a_mask_are_read_as_with_it(side: str) -> None:
    """A4: where the padding token is nothing else, the mask is certain."""
    made = padding("<pad>")
    model = pellucid.load(chatting().module, tokenizer=made)
    batch = made(["the capital of France", "the"], padding=True, padding_side=side, return_tensors="pt")
    wanted = model.generate(dict(batch), max_new_tokens=4).tokens
    alone = [model.generate(text, max_new_tokens=4).tokens[0].tolist() for text in ["the capital of France", "the"]]
    assert model.generate(batch["input_ids"], max_new_tokens=4).tokens.tolist() == wanted.tolist() == alone
    for given_as in (batch["input_ids"].tolist(), {"input_ids": batch["input_ids"]}, batch["input_ids"].numpy()):
        assert model.inputs(given_as).stream("").mask.tolist() == batch["attention_mask"].tolist()
    assert model.inputs(batch["input_ids"].tolist()).texts == ("the capital of France", "the")


def test_a_padding_token_that_ends_texts_too_asks_for_the_mask() -> None:
    made = padding("</s>")
    model = pellucid.load(chatting().module, tokenizer=made)
    end = made.eos_token_id
    batch = made(["the capital of France", "the"], padding=True, return_tensors="pt")
    for given_ids in (batch["input_ids"], batch["input_ids"].tolist(), [[5, 6, end], [5, 6, 7]], [[5, end, end]]):
        with pytest.raises(InputError, match="may be padding or text: give the mask too"):
            model.inputs(given_ids)
    assert model.inputs(dict(batch)).stream("").lengths.tolist() == batch["attention_mask"].sum(1).tolist()
    for plain in ([[5, 6, end]], [[end, 5], [end, 6]], [[5, end, 6], [5, 6, 7]], [[5, 6, 7], [5, 6]], [[end]]):
        assert model.inputs(plain).stream("").lengths.tolist() == [len(row) for row in plain]


def test_everything_that_belongs_to_a_token_moves_with_it() -> None:
    """A14: padding on the left, whatever there is for each token."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
    whole = opened("llama").inputs({"input_ids": ids, "attention_mask": mask})
    extra = {
        "token_type_ids": ids * 10, "position_ids": (ids + 1).repeat(3, 1, 1), "inputs_embeds": ids[..., None].float(),
        "visual_pos_masks": ids > 5, "pixel_values": torch.rand(2, 3, 4, 4), "bbox": ids[..., None].repeat(1, 1, 4),
    }  # fmt: skip
    moved = left_padded(replace(whole, tensors={**whole.tensors, **extra}))
    left = torch.tensor([[0, 5, 6], [7, 8, 9]])
    assert moved.tensors["input_ids"].tolist() == moved.stream("").ids.tolist() == left.tolist()
    assert torch.equal(moved.tensors["token_type_ids"], left * 10)
    assert torch.equal(moved.tensors["position_ids"], (left + 1).repeat(3, 1, 1))
    assert torch.equal(moved.tensors["inputs_embeds"], left[..., None].float())
    assert torch.equal(moved.tensors["visual_pos_masks"], left > 5)
    assert torch.equal(moved.tensors["bbox"], left[..., None].repeat(1, 1, 4))
    assert torch.equal(moved.tensors["pixel_values"], extra["pixel_values"])
    patches = replace(whole, tensors={**whole.tensors, "pixel_values": torch.rand(7, 4)})
    with pytest.raises(InputError, match="'pixel_values' .7, 4. has no row for each of the 2 prompts"):
        patches.rows([1])


# ---- decoders that are made to begin


def test_a_forced_first_token_is_part_of_the_decoder() -> None:
    """A9: a continuation is scored after the language token that generation is made to write."""
    module = build("m2m_100")
    made = tokenizer(module)
    module.generation_config.forced_bos_token_id = 7
    model = pellucid.load(module, tokenizer=made, probe=inputs(module))
    start = module.generation_config.decoder_start_token_id or module.config.decoder_start_token_id
    given_ids = model.inputs(PROMPTS[0], decoder="Paris").tensors
    said = made("Paris", add_special_tokens=False)["input_ids"]
    assert given_ids["decoder_input_ids"].tolist() == [[start, 7, *said]]
    with torch.no_grad():
        logits = module(input_ids=given_ids["input_ids"], decoder_input_ids=torch.tensor([[start, 7, *said]])).logits
        native = module.generate(given_ids["input_ids"], max_new_tokens=5, do_sample=False, num_beams=1)
    assert torch.equal(model.run(PROMPTS[0], decoder="Paris").logits, logits)
    assert native[0, :2].tolist() == [start, 7]
    assert model.generate(PROMPTS[0], max_new_tokens=4).tokens[0].tolist() == native[0, 2:].tolist()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"input_ids": "text"}, "'input_ids' must be whole numbers"),
        ([True, False], "must be a string or token ids"),
        (torch.ones(1, 3).bool(), "whole numbers"),
        ([5, 2**70], "whole numbers"),
        ([[5], 3.5], "must be a string or token ids, not float"),
        ({"input_ids": ids(), "attention_mask": "yes"}, "'attention_mask' must be"),
        ({}, "no prompt was given"),
        ([("a", "b"), ("c", "d")], "may be two prompts or a pair"),
    ],
)
def test_what_is_no_prompt_is_one_clear_error(prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened("llama").run(prompt)


@pytest.mark.parametrize("decoder", [5, True, [], [5], {"a": 1}])
def test_a_decoder_that_is_no_text_is_one_clear_error(decoder: Any) -> None:
    with pytest.raises(InputError, match="decoder"):
        opened("t5").run(PROMPTS[0], decoder=decoder)
