"""Prompts as tensors, and positions as people name them.

Positions are counted on a prompt's real tokens: 0 is the first token that is not padding, -1 the last, whichever side
the padding is on. Every stack has a stream of its own: an encoder counts source tokens, a decoder target tokens.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.modes import ordinary
from pellucid.anatomy.sites import Position
from pellucid.engine.marks import token_ids
from pellucid.errors import InputError, nearest

Spans = Mapping[str, Sequence[tuple[int, int]]]


@dataclass(frozen=True, eq=False)
class Stream:
    """The tokens one stack sees: ids [batch, length], mask (1 on real tokens, which stand together) and their texts."""

    ids: Tensor
    mask: Tensor
    labels: tuple[tuple[str, ...], ...]
    spans: Spans = field(default_factory=dict)
    _found: dict[Position, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def starts(self) -> Tensor:
        """[batch] the column of each row's first real token."""
        return self.mask.long().argmax(1)

    @cached_property
    def lengths(self) -> Tensor:
        """[batch] how many real tokens each row has."""
        return self.mask.long().sum(1)

    @cached_property
    def padded(self) -> bool:
        return not bool(self.mask.all())

    def find(self, at: Position) -> Tensor | None:
        """Columns [batch, n] of the positions `at` names in each row; None for every position."""
        if at is None or at == "*":
            return None
        if at not in self._found:
            rows = [self._row(at, b) for b in range(len(self.ids))]
            if len({len(r) for r in rows}) > 1:
                raise InputError(
                    f"'@{at}' names {', '.join(str(len(r)) for r in rows)} positions in the prompts of this batch: "
                    "expected the same number in each; run them one at a time or name single positions"
                )
            self._found[at] = torch.tensor(rows, device=self.ids.device) + self.starts[:, None]
        return self._found[at]

    def _row(self, at: Position, b: int) -> list[int]:
        length = int(self.lengths[b])
        if isinstance(at, int):
            if not -length <= at < length:
                raise InputError(f"'@{at}' is outside the prompt, which has {length} tokens: {self._shown(b)}")
            return [at % length]
        assert isinstance(at, str)
        if at[0] in "'\"":
            return [self._token(at, b)]
        if re.fullmatch(r"-?\d+(,-?\d+)+", at):
            return [self._row(int(word), b)[0] for word in at.split(",")]
        if at in self.spans:
            named = range(*self.spans[at][b])
        elif bounds := re.fullmatch(r"(-?\d+)?:(-?\d+)?", at):
            named = range(length)[slice(*(int(n) if n else None for n in bounds.groups()))]
        else:
            known = nearest(at, self.spans) if self.spans else ""
            raise InputError(
                f"'@{at}' is no position: expected an index, a slice such as '1:4', 'token' or a span{known}"
            )
        if not named or named[-1] >= length:
            raise InputError(f"'@{at}' names no tokens of the prompt, which has {length}: {self._shown(b)}")
        return list(named)

    def _token(self, quoted: str, b: int) -> int:
        """The last occurrence of a token, by its text with or without the leading space."""
        try:
            text = str(ast.literal_eval(quoted))
        except (SyntaxError, ValueError) as error:
            raise InputError(
                f"cannot read the token in '@{quoted}': expected quotes on both sides, such as @'Paris'"
            ) from error
        row = self.labels[b]
        for wanted in (text, text.strip()):
            found = [i for i, label in enumerate(row) if wanted in (label, label.strip())]
            if found:
                return found[-1]
        raise InputError(
            f"the token {text!r} is not in the prompt; its tokens are {self._shown(b)}{nearest(text, row)}"
        )

    def _shown(self, b: int) -> str:
        return " ".join(repr(t) for t in self.labels[b])


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a forward pass is called with, the streams its positions are counted on, and the prompts as they were given."""

    tensors: dict[str, Any]
    streams: dict[str, Stream]  # stack name -> stream; "" is the only or the last stack
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.stream("").ids)

    def stream(self, stack: str) -> Stream:
        return self.streams.get(stack) or self.streams[""]

    def rows(self, index: Sequence[int]) -> Inputs:
        """Some of the prompts, any of them several times, as a batch of their own."""
        n, index = len(self), list(index)

        def cut(stream: Stream) -> Stream:
            spans = {name: [span[i] for i in index] for name, span in stream.spans.items()}
            return Stream(stream.ids[index], stream.mask[index], tuple(stream.labels[i] for i in index), spans)

        tensors = {
            k: v[index] if isinstance(v, Tensor) and v.ndim and len(v) == n else v for k, v in self.tensors.items()
        }
        return Inputs(tensors, {k: cut(s) for k, s in self.streams.items()}, tuple(self.texts[i] for i in index))

    def repeated(self, times: int) -> Inputs:
        """The same prompts several times over, in order, as one batch."""
        return self.rows(list(range(len(self))) * times)


def read_inputs(
    module: Any, tokenizer: Any, prompt: Any, *, decoder: str | Sequence[str] | None = None, spans: Spans | None = None
) -> Inputs:
    """Tokenise prompts (a string, several, token ids, or a mapping of tensors) for this model.

    `decoder` is what an encoder-decoder's decoder is given after its start token. Unequal prompts are padded on the
    right, where no real token of a causal model can see the padding.
    """
    if isinstance(prompt, Inputs):
        return prompt
    accepted = inspect.signature(module.forward).parameters
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
    tensors = _tensors(module, tokenizer, prompt)
    tensors = {k: ordinary(v).to(device) if isinstance(v, Tensor) else v for k, v in tensors.items()}
    ids = tensors["input_ids"]
    mask = tensors.setdefault("attention_mask", torch.ones_like(ids))
    mask = mask if mask.ndim == 2 else torch.ones_like(ids)  # a 4-D mask is the model's business
    ids = ids[:: max(1, len(ids) // len(mask))]  # music decoders have a row of tokens per codebook
    _check(module, ids, mask)
    first = Stream(ids, mask, _labels(tokenizer, ids, mask), _spans(spans or {}, len(ids)))
    streams = {"": first}
    if getattr(module.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        given = tensors.get("decoder_input_ids")
        if given is None:
            given, given_mask = _decoder(module, tokenizer, decoder, ids)
        else:
            given_mask = tensors.get("decoder_attention_mask", torch.ones_like(given))
        _check(module, given, given_mask)
        tensors["decoder_input_ids"] = given
        if not bool(given_mask.all()):
            tensors["decoder_attention_mask"] = given_mask
        second = Stream(given, given_mask, _labels(tokenizer, given, given_mask))
        streams = {"encoder": first, "decoder": second, "": second}
    elif decoder is not None:
        raise InputError("only encoder-decoder models take decoder=; append the text to the prompt instead")
    tensors = {k: v for k, v in tensors.items() if k in accepted or "kwargs" in accepted}
    return Inputs(tensors, streams, _texts(tokenizer, prompt, first))


def _texts(tokenizer: Any, prompt: Any, stream: Stream) -> tuple[str, ...]:
    """The prompts as they were given; of ids, what they say without special tokens."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(prompts, Sequence) and prompts and all(isinstance(each, str) for each in prompts):
        return tuple(prompts)
    if tokenizer is None:
        return tuple(" ".join(row) for row in stream.labels)
    rows = (row[m.bool()].tolist() for row, m in zip(stream.ids, stream.mask, strict=True))
    return tuple(tokenizer.decode(row, skip_special_tokens=True) for row in rows)


def _tensors(module: Any, tokenizer: Any, prompt: Any) -> dict[str, Any]:
    """The prompt as keyword arguments of the forward pass, `input_ids` [batch, length] among them."""
    if isinstance(prompt, Mapping):
        given = {k: torch.as_tensor(v) if isinstance(v, list) else v for k, v in prompt.items() if v is not None}
        if "input_ids" not in given:
            raise InputError(
                f"the inputs have no 'input_ids' (they have {', '.join(given)}); give a prompt or token ids"
            )
    elif isinstance(prompt, Tensor):
        given = {"input_ids": prompt if prompt.ndim > 1 else prompt[None]}
    else:
        given = pad(_rows(tokenizer, prompt), _pad_id(module, tokenizer))
    ids = given["input_ids"]
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise InputError(f"token ids must be whole numbers [batch, length], not {list(ids.shape)} of {ids.dtype}")
    return given


def _rows(tokenizer: Any, prompt: Any) -> list[list[int]]:
    """Token ids of every prompt, each a text or already a list of ids."""
    if not isinstance(prompt, Iterable):
        raise InputError(f"a prompt must be a string or token ids, not {prompt!r}")
    prompts: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    prompts = [
        p.tolist() if isinstance(p, (np.ndarray, np.generic)) else p for p in prompts
    ]  # numbers as Python has them
    if not prompts:
        raise InputError("no prompt was given: expected a string or a list of strings")
    if all(isinstance(p, int) for p in prompts):
        return [prompts]
    rows = []
    for each in prompts:
        if isinstance(each, str) and tokenizer is None:
            raise InputError("this model was opened without a tokenizer: give token ids, or open it with tokenizer=...")
        if isinstance(each, str):
            ids = token_ids(tokenizer, each) if each.strip() else []
        elif isinstance(each, (list, tuple)) and all(isinstance(i, (int, np.integer)) for i in each):
            ids = [int(i) for i in each]
        else:
            raise InputError(f"a prompt must be a string or token ids, not {type(each).__name__}")
        if not ids:
            raise InputError("the prompt is empty: give at least one word")
        rows.append(ids)
    return rows


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """Rows of token ids as one right-padded batch with its mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*r, *[pad_id] * (longest - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _pad_id(module: Any, tokenizer: Any) -> int:
    """What padding is written as: some models find it by its id, so the model's own word counts most."""
    config = module.config.get_text_config() if hasattr(module.config, "get_text_config") else module.config
    named = (getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None), 0)
    return next(n for n in named if isinstance(n, int) and n >= 0)


def _decoder(module: Any, tokenizer: Any, decoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    start = getattr(module.config, "decoder_start_token_id", None)
    start = start if start is not None else getattr(module.config, "bos_token_id", None) or 0
    texts = [""] * len(ids) if decoder is None else [decoder] * len(ids) if isinstance(decoder, str) else list(decoder)
    if len(texts) != len(ids):
        raise InputError(f"{len(ids)} prompts but {len(texts)} texts for the decoder: give one per prompt")
    if tokenizer is None and any(texts):
        raise InputError("this model was opened without a tokenizer: give decoder_input_ids instead of decoder=")
    rows = [[start, *(tokenizer(t, add_special_tokens=False)["input_ids"] if t else [])] for t in texts]
    padded = pad(rows, _pad_id(module, tokenizer))
    return padded["input_ids"].to(ids.device), padded["attention_mask"].to(ids.device)


def _spans(spans: Spans, batch: int) -> Spans:
    for name, rows in spans.items():
        if len(rows) != batch or any(len(tuple(row)) != 2 for row in rows):
            raise InputError(
                f"the span {name!r} needs one (first, last + 1) per prompt: expected {batch}, got {rows!r}"
            )
    return dict(spans)


def _labels(tokenizer: Any, ids: Tensor, mask: Tensor) -> tuple[tuple[str, ...], ...]:
    """The text of every real token, as decoding it alone gives it."""
    rows = [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    if tokenizer is None:
        return tuple(tuple(f"#{i}" for i in row) for row in rows)
    text = {i: tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in {i for row in rows for i in row}}
    return tuple(tuple(text[i] for i in row) for row in rows)


def _check(module: Any, ids: Tensor, mask: Tensor) -> None:
    """InputError for ids the embedding does not have, prompts beyond the context, and masks that are no padding."""
    if mask.shape != ids.shape:
        raise InputError(f"the attention mask is {list(mask.shape)}, but the token ids are {list(ids.shape)}")
    edges = mask.long().diff(dim=1, prepend=torch.zeros_like(mask[:, :1]).long())
    if bool(((edges == 1).sum(1) != 1).any()):
        raise InputError(
            "each row of the attention mask must be 1 on one stretch of tokens and 0 on the padding around it"
        )
    config = module.config.get_text_config() if hasattr(module.config, "get_text_config") else module.config
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and 1 < limit < ids.shape[1]:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens but the model's context holds {limit}: shorten the prompt"
        )
    try:
        known = getattr(module.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # families that embed in ways of their own
        return
    if isinstance(known, int) and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise InputError(
            f"token id {int(ids.max()) if ids.min() >= 0 else int(ids.min())} is unknown: this model has 0 to {known - 1}"
        )
