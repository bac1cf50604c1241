"""How do tests give text to a tiny model?

One real fast tokenizer over the tiny vocabulary: some whole words, then single characters, so that plain
English has tokens and a few answers are one token.
"""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]  # ids 0 to 4, as in every zoo config
_WORDS = "the of is in and to a The When city capital France Italy Paris Rome Mary John went gave drink store he"
WORDS = [f"▁{word}" for word in _WORDS.split()]
CHARACTERS = [*string.ascii_letters, *string.digits, *".,!?'-:", "▁"]


def tokenizer(module: PreTrainedModel | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer for any zoo model.

    Masked models get <s> text </s>, encoder-decoders text </s>, all others (and None) the bare text.

    >>> tokenizer().tokenize("The capital of France")
    ['▁The', '▁capital', '▁of', '▁France']
    """
    pieces = SPECIAL + WORDS + CHARACTERS
    # Every piece costs the same, so one whole word beats its letters.
    fast = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=pieces.index("<unk>")))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.post_processor = processors.TemplateProcessing(
        single=_template(module), special_tokens=[(token, pieces.index(token)) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def _template(module: PreTrainedModel | None) -> str:
    if type(module).__name__.endswith("ForMaskedLM"):
        return "<s> $A </s>"
    return "$A </s>" if module is not None and module.config.is_encoder_decoder else "$A"
