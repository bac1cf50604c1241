"""What people bring: A8, A9, A11, B4 to B7, B9, B10, B15."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError, PellucidError
from tests.zoo import build, tokenizer

from .cases import CLEAN, DIFFERENCE, LONG, OTHER, close, opened

CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>a: {% endif %}"


def chatting():
    made = tokenizer(build("bert"))  # which puts <s> and </s> around every text
    made.chat_template = CHAT
    return made


def test_marks_that_are_there_are_not_put_again() -> None:
    """A8: a rendered conversation with a tokenizer that adds its own marks."""
    words = chatting()
    model = pl.load(build("llama"), tokenizer=words)
    messages = [{"role": "user", "content": "Paris is"}]
    text = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = model.inputs(text).tensors["input_ids"][0].tolist()
    wanted = words(text, add_special_tokens=False)["input_ids"]
    assert ids in (wanted, [*wanted, 2])  # the closing mark is the tokenizer's own, and stands once
    assert ids[:2] != [1, 1]
    by_messages = model.inputs(messages).tensors["input_ids"][0].tolist()
    assert by_messages == wanted


def test_marks_that_are_also_unknown_are_no_words() -> None:
    """A8: GPT-2's end of text is unk, bos and eos; it plays no part in a game of words."""
    words = tokenizer()
    words.unk_token = words.bos_token = words.eos_token = "<s>"
    model = pl.load(build("gpt2"), tokenizer=words)
    data = pl.attribution.occlusion(model, "<s>The city of Paris", 7, baseline=" the").data
    assert bool(data["special"].values[0]) and not data["special"].values[1:].any()


def test_a_forced_first_token_stands_before_a_given_text() -> None:
    """A9: generation's forced token is part of what the decoder is given."""
    module = build("bart")
    module.generation_config.forced_bos_token_id = module.config.forced_bos_token_id = 9
    model = pl.load(module, tokenizer=tokenizer(module))
    found = pl.attribution.occlusion(model, CLEAN, pl.attribution.continuation("Paris"), baseline="mask")
    ids = torch.tensor([model.tokenizer(CLEAN)["input_ids"]])
    text = model.tokenizer("Paris", add_special_tokens=False)["input_ids"]
    start = module.config.decoder_start_token_id
    with torch.no_grad():
        z = module(ids, decoder_input_ids=torch.tensor([[start, 9, *text]])).logits[0].log_softmax(-1)
    assert close(found.data["score"].values.ravel()[: len(text)], [float(z[1 + i, t]) for i, t in enumerate(text)])


def test_rows_of_tokens_begin_once() -> None:
    """A11: one mark in front of each row, none inside."""
    words = tokenizer(build("bert"))
    model = pl.load(build("llama"), tokenizer=words)
    rows = list(pl.Corpus([CLEAN, LONG] * 5, context=8, packed=True).rows(model))
    assert len(rows) > 3
    assert all(row.ids[0] == 1 and 1 not in list(row.ids[1:]) for row in rows)


def test_a_model_without_a_tokenizer() -> None:
    """B4: ids go in; what needs text says so."""
    module = build("llama")
    model = pl.load(module)
    with torch.no_grad():
        wanted = module(torch.tensor([[7, 8, 9]])).logits
    assert close(model.run([7, 8, 9]).logits, wanted)
    with pytest.raises(InputError, match="tokenizer"):
        model.run("text")


def test_what_a_tokenizer_gives_goes_in() -> None:
    """B5: its lists, its encoding, a conversation's ids; an explicit pair; a line break is a prompt."""
    words = chatting()
    module = build("llama")
    model = pl.load(module, tokenizer=words)
    encoded = words(CLEAN)
    with torch.no_grad():
        wanted = module(torch.tensor([encoded["input_ids"]])).logits
    for given in (
        encoded,
        encoded["input_ids"],
        [encoded["input_ids"]],
        dict(encoded),
        words(CLEAN, return_tensors="pt"),
    ):
        assert close(model.run(given).logits, wanted)
    ids = words.apply_chat_template([{"role": "user", "content": "Paris"}], tokenize=True)
    assert model.run(ids).logits.shape[1] == len(ids["input_ids"] if hasattr(ids, "keys") else ids)
    with pytest.raises(InputError):
        model.run(("a", "b"))
    assert len(model.inputs(["a", "b"])) == 2
    assert model.inputs("\n").tensors["input_ids"].numel() > 0


@pytest.mark.parametrize("text", ["don't", "नमस्ते", "3.6", "Paris"])
def test_players_are_words_as_typed(text: str) -> None:
    """B6: a word is one player, with its subwords and combining marks."""
    model = opened("gpt2")
    data = pl.attribution.occlusion(model, f"The {text} is", 7, players="word", baseline=" the").data
    assert data["player"].size == 3 if "player" in data.dims else False


def test_a_sentence_ends_at_its_mark_in_any_script() -> None:
    """B6: not in "3.6", and at the full-width stop."""
    model = opened("gpt2")
    data = pl.attribution.occlusion(model, "It is 3.6 in Paris. He went", 7, players="sentence", baseline=" the").data
    assert data["player"].size == 2
    data = pl.attribution.occlusion(model, "It is in Paris。He went", 7, players="sentence", baseline=" the").data
    assert data["player"].size == 2


def test_tokens_by_their_characters() -> None:
    """B6: a character the tokenizer cuts or does not know can be named in the text."""
    model = opened("gpt2")
    run = model.run("The city Paris is", keep=["layers.0.resid_post@'city'"])
    whole = model.run("The city Paris is", keep=["layers.0.resid_post"])
    at = model.tokenizer.tokenize("The city Paris is").index("▁city")
    assert close(run.tensor("layers.0.resid_post@'city'")[:, 0], whole.tensor("layers.0.resid_post")[:, at])


def test_past_a_table_of_positions_is_one_error() -> None:
    """B7: generating past the end of a table; RoBERTa's table begins behind its padding index."""
    model = opened("gpt2")
    with pytest.raises(InputError):
        model.generate([5] * 60, max_new_tokens=10)
    roberta = opened("roberta")
    size = roberta.module.config.max_position_embeddings
    with pytest.raises(InputError):
        roberta.run([[5] * size])
    assert roberta.run([[1, *[5] * (size - 5), 2]]).logits.shape[1] == size - 3


def test_rotary_models_run_as_the_native_model_runs() -> None:
    """B7: no table, no limit."""
    model = opened("llama")
    ids = [5, 6, 7, 8] * 20
    assert len(ids) > model.module.config.max_position_embeddings
    with torch.no_grad():
        wanted = model.module(torch.tensor([ids])).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert close(model.run([ids]).logits, wanted)


def test_a_long_text_in_a_corpus_is_named() -> None:
    """B9: refused before the work, by name, or cut as asked; generators and rows of data sets are texts."""
    model = opened("gpt2")
    texts = [CLEAN, "a " * 100, LONG]
    try:
        rows = list(pl.Corpus(texts, context=16, packed=False, long="refuse").rows(model))
    except PellucidError as error:
        assert "1" in str(error)
    else:
        raise AssertionError(f"{len(rows)} rows of a text that does not fit")
    assert len(list(pl.Corpus(texts, context=16, packed=False, long="cut").rows(model))) == 3
    made = pl.neurons.harvest(model, (t for t in [CLEAN, LONG]), ["layers.0.mlp.neurons"], top=2, sample=4)
    assert made.count > 10


def test_options_in_another_form() -> None:
    """B10: lists of positions, a lens's own words, an unknown `by`, and numpy's numbers in messages."""
    model = opened("gpt2")
    assert pl.lenses.logit_lens(model, CLEAN, positions=[1, 2]).data.sizes["position"] == 2
    with pytest.raises(InputError) as error:
        model.run(np.int64(7))
    assert "np." not in str(error.value)
    divergence = pl.metrics.kl_divergence(torch.zeros(1, 2, 97), positions=np.array([5, 6]))
    with torch.no_grad():
        log_p = model.module(torch.tensor([model.tokenizer(CLEAN)["input_ids"]])).logits[0, 5:7].log_softmax(-1)
    wanted = float((-log_p.mean(-1) - math.log(97)).mean())  # of a uniform reference
    assert float(model.score(model.run(CLEAN), divergence)) == pytest.approx(wanted, abs=1e-5)
    by_head = pl.lenses.direct_logit_attribution(model, CLEAN, 7, by="head").data
    assert "head" in by_head.dims or "head" in str(by_head.coords)


@pytest.mark.parametrize("given", [np.array([5, 6]), torch.ones(2, 2), ["a"], {"a"}], ids=lambda g: type(g).__name__)
def test_several_things_where_one_word_is_expected(given: Any) -> None:
    """B10: an array is compared with no word, a list looked up in no table; found by fuzzing, and by looking for its kind."""
    model, spans = opened("gpt2"), pl.probing.Spans.whole([CLEAN])
    for call in (
        lambda: pl.attention.rollout(model, CLEAN, residual=given),
        lambda: pl.attribution.similarity(OTHER, pooling=given),
        lambda: pl.attribution.owen(model, CLEAN, 7, draws=1, hierarchy=given),
        lambda: pl.attribution.word_importance(model, [CLEAN], method=given),
        lambda: pl.safety.confidence(model, [CLEAN], score=given),
        lambda: pl.probing.Examples(spans, [1], kind=given),
        lambda: pl.tasks.indirect_objects(model.tokenizer, 1, corruption=given),
        lambda: pl.load(model.module, task=given),
        lambda: pl.metrics.kl_divergence(torch.zeros(97), direction=given),
        lambda: model.sites("layers.-:1.resid_pre"),
    ):
        with pytest.raises(PellucidError):
            call()


def test_every_reading_takes_edits() -> None:
    """B11: the lens under an edit is the lens of the edited run: its last row is what the hooks give."""
    model = opened("llama")
    vector = torch.linspace(-1, 1, 32)
    data = pl.lenses.logit_lens(model, CLEAN, positions=-1, edits=[pl.Steer("layers.0.resid_post", vector)], top=3).data
    ids = torch.tensor([model.tokenizer(CLEAN)["input_ids"]])
    handle = model.module.model.layers[0].register_forward_hook(
        lambda m, a, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
    )
    with torch.no_grad():
        wanted = model.module(ids).logits[0, -1].softmax(-1).topk(3).values
    handle.remove()
    assert close(data["probability"].values[-1, 0], wanted)
    occluded = pl.attribution.occlusion(
        model, CLEAN, 7, edits=[pl.Steer("layers.0.resid_post", vector)], baseline=" the"
    ).data
    assert float(occluded["score"]) != pytest.approx(
        float(pl.attribution.occlusion(model, CLEAN, 7, baseline=" the").data["score"])
    )


def test_a_bad_input_is_one_clear_line() -> None:
    """B15: and an unknown name prints no client's traceback."""
    with pytest.raises(PellucidError) as error:
        pl.load("no-such-model-anywhere")
    assert "\n" not in str(error.value) and len(str(error.value)) <= 600
    with pytest.raises(PellucidError):
        opened("gpt2").sweep(CLEAN, [pl.Ablate("layers.9.mlp.out")], DIFFERENCE)


def test_credit_is_not_given_to_embeddings():
    model = opened("gpt2")
    vectors = model.module.get_input_embeddings()(torch.tensor([[5, 6, 7]])).detach()
    with pytest.raises(InputError, match="given as embeddings, and credit is given to tokens"):
        pl.attribution.saliency(model, {"inputs_embeds": vectors}, 7)


def test_a_byte_level_tokenizer_has_no_unknown_words():
    """SmolLM2's unknown token is its end of text, with no other role: a mark, since no text becomes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pellucid.engine.marks import special_ids

    letters = {c: i for i, c in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(letters, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<|endoftext|>")
    assert words.unk_token_id in special_ids(words)
    small = tokenizer()
    assert small.unk_token_id not in special_ids(small)


def test_all_of_a_text_is_removed_before_a_closing_mark() -> None:
    """A tokenizer that ends texts with a mark and begins them with none: with every word gone the mark alone is left."""
    from transformers import ByT5Tokenizer

    words = ByT5Tokenizer()
    model = pl.load(build("llama", vocab_size=384), tokenizer=words)
    found = pl.attribution.occlusion(model, "ab", 7, baseline="remove")
    ids = words("ab")["input_ids"]
    assert len(ids) == 3
    whole, shorter = (float(model.run(each).logits[0, -2, 7]) for each in (ids, ids[1:]))
    assert float(found.values[0]) == pytest.approx(whole - shorter, abs=1e-5)


def test_an_array_where_a_word_is_meant_is_one_clear_line() -> None:
    """Found by the fuzz test: an array cannot be asked whether it is one of the words."""
    import numpy as np

    for given in (np.array([5, 6]), torch.ones(2)):
        with pytest.raises(InputError, match="norm"):
            pl.attribution.saliency(opened("gpt2"), CLEAN, 7, norm=given)
