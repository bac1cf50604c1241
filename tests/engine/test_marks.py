"""Special tokens are one notion, and a text that holds its own gets each once."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

from pellucid.engine.marks import ordinary_ids, special_ids, token_ids, trailing_marks
from pellucid.tasks.tokens import encode

WORDS = ["<unk>", "<s>", "</s>", "the", "capital", "of"]


def tokenizer(template: str, **roles: str) -> PreTrainedTokenizerFast:
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", **roles)


def test_the_unknown_token_is_a_word_unless_it_has_another_role():
    plain = tokenizer("$A", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    assert special_ids(plain) == {1, 2}
    assert ordinary_ids(plain, 100) == [3, 4, 5]
    like_gpt2 = tokenizer("$A")
    like_gpt2.add_special_tokens({"unk_token": "</s>", "bos_token": "</s>", "eos_token": "</s>"})
    assert 2 in special_ids(like_gpt2)
    assert special_ids(None) == frozenset()


def test_headers_that_were_added_as_special_tokens_are_marks():
    made = tokenizer("<s> $A", bos_token="<s>")
    made.add_tokens([AddedToken("<|header|>", special=True), AddedToken("<word>", special=False)])
    assert made.convert_tokens_to_ids("<|header|>") in special_ids(made)
    assert made.convert_tokens_to_ids("<word>") not in special_ids(made)


@pytest.mark.parametrize(
    ("template", "text", "ids"),
    [
        ("<s> $A", "the capital", [1, 3, 4]),
        ("<s> $A", "<s> the capital", [1, 3, 4]),
        ("<s> $A </s>", "<s> the capital", [1, 3, 4, 2]),
        ("<s> $A </s>", "<s> the capital </s>", [1, 3, 4, 2]),
        ("$A </s>", "the </s>", [3, 2]),
        ("<s> $A", "<s> <s> the", [1, 1, 3]),  # what the text says twice stays
        ("$A", "<s> the", [1, 3]),
    ],
)
def test_marks_that_a_text_holds_already_are_not_put_there_again(template, text, ids):
    made = tokenizer(template, bos_token="<s>", eos_token="</s>")
    assert token_ids(made, text) == ids
    assert encode(made, text)[0] == ids
    offsets = encode(made, text)[1]
    assert [text[a:b] for a, b in offsets if a < b] == text.split()


def test_only_the_tokenizers_own_marks_at_the_end_are_trailing():
    made = tokenizer("<s> $A </s>", bos_token="<s>", eos_token="</s>")
    assert trailing_marks(made, [1, 3, 2]) == 1
    assert trailing_marks(made, [1, 3]) == 0
    assert trailing_marks(tokenizer("<s> $A", bos_token="<s>", eos_token="</s>"), [1, 3, 2]) == 0
