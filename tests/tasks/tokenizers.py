"""Tokenizers of every family: two real ones, and small ones trained on the words of the tasks."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pellucid.tasks import agreement, comparison, ioi, professions, world
from tests.models import minilm_path, smollm2_path

SPECIALS = ["<unk>", "<s>", "</s>"]
KINDS = ("smollm2", "minilm", "byte-bpe", "unigram", "word")


@cache
def tokenizer(kind: str) -> Any:
    """One of KINDS, "characters", or "digits-<n>": numbers in groups of n."""
    if kind == "smollm2":
        path = smollm2_path()
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if kind == "minilm":
        return AutoTokenizer.from_pretrained(minilm_path())
    if kind == "byte-bpe":  # begins every text with a special token
        return _byte_bpe(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+", "<s> $A")
    if kind.startswith("digits-"):
        return _byte_bpe(rf" ?\p{{L}}+|\p{{N}}{{1,{kind[-1]}}}| ?[^\s\p{{L}}\p{{N}}]+|\s+", "$A")
    if kind == "characters":
        alone = pre_tokenizers.Split("", "isolated")
        return _trained(models.BPE(), trainers.BpeTrainer, alone, None, "$A")
    if kind == "unigram":  # ends every text with a special token
        words = sorted({f"▁{word}" for line in _corpus() for word in line.split()})
        letters = sorted({letter for word in words for letter in word})
        scores = dict.fromkeys(SPECIALS, 0.0) | dict.fromkeys(letters, -15.0) | dict.fromkeys(words, -9.0)
        backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
        return _wrapped(backend, pre_tokenizers.Metaspace(), decoders.Metaspace(), "$A </s>")
    model = models.WordLevel(unk_token="<unk>")
    return _trained(model, trainers.WordLevelTrainer, pre_tokenizers.Whitespace(), None, "$A")


def _byte_bpe(pattern: str, template: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    cut = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return _trained(models.BPE(), trainers.BpeTrainer, cut, decoders.ByteLevel(), template)


def _trained(model: Any, trainer: Any, cut: Any, decoder: Any, template: str) -> Any:
    backend = Tokenizer(model)
    backend.pre_tokenizer = cut
    options = trainer(vocab_size=2500, special_tokens=SPECIALS, show_progress=False)
    backend.train_from_iterator(_corpus() * 20, options)
    return _wrapped(backend, cut, decoder, template)


def _wrapped(backend: Tokenizer, cut: Any, decoder: Any, template: str) -> Any:
    backend.pre_tokenizer = cut
    if decoder:
        backend.decoder = decoder
    specials = [(token, i) for i, token in enumerate(SPECIALS)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _corpus() -> list[str]:
    words = [*ioi.NAMES, *ioi.PLACES, *ioi.THINGS, *comparison.EVENTS]
    words += [form for noun in agreement.NOUNS + agreement.ATTRACTORS for form in noun]
    words += [p for side in professions.STEREOTYPES.values() for p in side] + list(professions.EVENTS)
    words += [word for table in (world.COUNTRIES, world.OPPOSITES) for row in table for word in row]
    words += [word for verbs in agreement.VERBS for word in verbs] + [" he", " she", *agreement.PLACES]
    words += [f"{n:0{digits}d}" for digits in (1, 2, 3) for n in range(10**digits)]
    words += [f"17{n:02d}" for n in range(100)]
    sentences = list(ioi.TEMPLATES) + [relation.template for relation in world.RELATIONS.values()]
    sentences += ["The lasted from the year to the year", "because was happy. a problem. Today the"]
    return [f"the {word.strip()} ." for word in words] + sentences * 3
