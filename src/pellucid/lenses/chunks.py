"""Text as the batches a lens is fitted on.

A causal model reads one stream of tokens, cut into chunks of equal length; an encoder reads every text with its
special tokens, cut at the context; an encoder-decoder reads pairs of source and target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError
from pellucid.model import Model


def chunks(model: Model, texts: Sequence[Any], tokens: int, context: int, batch: int) -> list[Inputs]:
    """Batches of at most `batch` rows of `context` tokens, the first `tokens` tokens of the texts in all."""
    if isinstance(texts, str):
        raise InputError("expected several texts, or pairs of source and target: put the one text into a list")
    if model.tokenizer is None:
        raise InputError("this model was opened without a tokenizer, which is needed to read text")
    if len(model.anatomy.stacks) > 1:
        return _pairs(model, texts, tokens, batch)
    rows = (
        _packed(model, texts, tokens, context)
        if model.anatomy.stacks[-1].causal
        else _whole(model, texts, tokens, context)
    )
    return [model.inputs([list(row) for row in group]) for group in _groups(rows, batch)]


def _packed(model: Model, texts: Sequence[str], tokens: int, context: int) -> list[list[int]]:
    """The texts behind one another, each ended by the tokenizer's end token, cut into whole chunks."""
    end = [i for i in (model.tokenizer.eos_token_id,) if i is not None]
    stream: list[int] = []
    for text in texts:
        if len(stream) >= tokens:
            break
        stream += [*model.tokenizer(text)["input_ids"], *end]
    stream = stream[:tokens]
    return [stream[i : i + context] for i in range(0, len(stream) - context + 1, context)]


def _whole(model: Model, texts: Sequence[str], tokens: int, context: int) -> list[list[int]]:
    rows, used = [], 0
    for text in texts:
        row = model.tokenizer(text, truncation=True, max_length=context)["input_ids"]
        if used + len(row) > tokens:
            break
        if row:
            rows.append(row)
            used += len(row)
    return rows


def _pairs(model: Model, texts: Sequence[Any], tokens: int, batch: int) -> list[Inputs]:
    made, used = [], 0
    for group in _groups(texts, batch):
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in group):
            raise InputError("an encoder-decoder reads pairs: give a list of (source, target)")
        inputs = model.inputs([source for source, _ in group], decoder=[target for _, target in group])
        used += int(inputs.stream("").mask.sum())
        if used > tokens:
            break
        made.append(inputs)
    return made


def _groups(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
