"""A case knows its tokens: their text, which are special, and which may get credit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

import pellucid
from pellucid.attribution import continuation, integrated_gradients, occlusion, saliency
from pellucid.attribution.case import Case
from pellucid.attribution.players import Players
from pellucid.errors import PellucidError
from pellucid.metrics import logit
from pellucid.results import Result
from tests.attribution.hand import PROMPT, opened
from tests.zoo import build


def byte_level():
    """Byte-level BPE with every byte, some merges, and <s> in front as RoBERTa has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<mask>", *alphabet, "Ġc", "Ġca", "Ġcaf"])}
    fast = Tokenizer(models.BPE(vocabulary, [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "f")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


def word_piece(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cap", "##ital", "of", "france", "'", "s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"))


def test_the_text_of_tokens_adds_up_to_the_prompt_in_byte_level_bpe():
    model = pellucid.load(build("gpt2", vocab_size=300), tokenizer=byte_level())
    case = Case.of(model, "a café au lait", 5)
    assert "".join(t for t, s in zip(case.tokens, case.special, strict=True) if not s) == "a café au lait"
    assert case.special.tolist() == [True, *[False] * (len(case.tokens) - 2), True]
    assert Players.of(case, "word").labels == ("a", "café", "au", "lait")


def test_subwords_join_to_words_as_typed_and_the_unknown_token_is_one_in_wordpiece(tmp_path):
    model = pellucid.load(build("bert"), tokenizer=word_piece(tmp_path))
    case = Case.of(model, "The capital of Freedonia", logit(5))
    assert case.special.tolist() == [True, False, False, False, False, False, True]
    assert Players.of(case, "word").labels == ("The", "capital", "of", "Freedonia")  # as typed
    assert Players.of(case, "word").members[1] == (2, 3)


def test_minilm_words_are_words(minilm):
    case = Case.of(minilm, "Tokenization isn't trivial, he said.", lambda h: h[:, 0, 0])
    assert Players.of(case, "word").labels[0].lower() == "tokenization"
    assert case.special[[0, -1]].all() and not case.special[1:-1].any()
    assert "trivial" in Players.of(case, "word").labels and "," in Players.of(case, "word").labels


def test_ids_without_a_tokenizer_are_shown_as_numbers():
    model = opened("gpt2")
    bare = pellucid.load(build("gpt2"), tokenizer=model.tokenizer)
    bare.tokenizer = None
    ids = model.inputs(PROMPT).stream("").ids
    case = Case.of(bare, ids, 9)
    assert case.tokens[0] == f"#{int(ids[0, 0])}"
    assert not case.special.any()
    with_it, without = (integrated_gradients(m, ids, 9, baseline="mean") for m in (model, bare))
    np.testing.assert_allclose(with_it.values, without.values, atol=1e-6)
    with pytest.raises(PellucidError, match="needs a tokenizer"):
        integrated_gradients(bare, ids, 9, baseline="pad")


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta", "llama", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [saliency, occlusion])
def test_padding_changes_nothing_and_gets_nothing_or_is_refused(family, side, method):
    model = opened(family)
    plain = method(model, PROMPT, logit(" Paris"))
    ids = model.inputs(PROMPT)
    ids = ids.streams.get("encoder", ids.stream("")).ids
    padding, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)
    order = (padding, ids) if side == "left" else (ids, padding)
    mask = (padding, ones) if side == "left" else (ones, padding)
    try:
        padded = method(
            model, {"input_ids": torch.cat(order, 1), "attention_mask": torch.cat(mask, 1)}, logit(" Paris")
        )
    except PellucidError as refused:
        assert "padded" in str(refused) or "padding" in str(refused)
        return
    real = slice(3, None) if side == "left" else slice(0, -3)
    np.testing.assert_allclose(padded.values[real], plain.values, atol=2e-5)
    assert padded.special.values[: 3 if side == "left" else None].any()
    assert (np.delete(padded.values, np.arange(ids.shape[1] + 3)[real]) == 0).all()


def test_source_and_target_tokens_of_a_continuation_are_told_apart():
    case = Case.of(opened("t5"), PROMPT, continuation(" Paris and"))
    found = saliency(opened("t5"), PROMPT, continuation(" Paris and"))
    source = len(case.lengths) and case.lengths[0]
    assert found.stream.values.tolist() == ["source"] * source + ["target"] * case.lengths[1]
    assert found.main.dims == ("output", "position")
    assert found.output_token.values.tolist()[0].strip() == "Paris"
    assert case.special[source]  # what the decoder starts with


def test_a_row_of_the_outputs_is_not_taken_for_one_of_the_players():
    model = opened("gpt2")
    case = Case.of(model, "The", continuation(" of is"))  # two outputs, two tokens in all
    found = case.result("t", {"attribution": np.eye(2), "score": [1.0, 2.0]})
    assert found.attribution.dims == ("output", "position")
    assert found.score.dims == ("output",)


def test_results_of_every_form_come_back_from_their_files(tmp_path):
    for i, target in enumerate((" Paris", continuation(" Paris and"))):
        found = occlusion(opened("t5"), PROMPT, target, players="word")
        assert Result.load(found.save(tmp_path / f"{i}.zip")) == found
