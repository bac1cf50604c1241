"""Prompts as tensors, and positions as people name them.

Positions are counted on a prompt's real tokens: 0 is the first token that is not padding, -1 the last, whichever side
the padding is on. Every stack has a stream of its own: an encoder counts source tokens, a decoder target tokens.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.sites import Position
from pellucid.errors import InputError, nearest

Spans = Mapping[str, Sequence[tuple[int, int]]]


@dataclass(frozen=True, eq=False)
class Stream:
    """The tokens one stack sees: ids [batch, length], and where each row's real tokens start and how many there are."""

    ids: Tensor
    mask: Tensor
    labels: tuple[tuple[str, ...], ...]
    spans: Spans = field(default_factory=dict)

    @property
    def starts(self) -> Tensor:
        return self.mask.long().argmax(1)

    @property
    def lengths(self) -> Tensor:
        return self.mask.long().sum(1)

    @property
    def padded(self) -> bool:
        return not bool(self.mask.all())

    def find(self, at: Position) -> Tensor | None:
        """Columns [batch, n] of the positions `at` names in each row; None for every position."""
        if at is None or at == "*":
            return None
        rows = [self._row(at, b) for b in range(len(self.ids))]
        if len({len(r) for r in rows}) > 1:
            raise InputError(
                f"'@{at}' names {', '.join(str(len(r)) for r in rows)} positions in the prompts of this batch: "
                "expected the same number in each; run them one at a time or name single positions"
            )
        return torch.tensor(rows, device=self.ids.device) + self.starts[:, None]

    def _row(self, at: Position, b: int) -> list[int]:
        length = int(self.lengths[b])
        if isinstance(at, int):
            if not -length <= at < length:
                raise InputError(f"'@{at}' is outside the prompt, which has {length} tokens: {self._shown(b)}")
            return [at % length]
        assert isinstance(at, str)
        if at[0] in "'\"":
            return [self._token(ast.literal_eval(at), b)]
        if at.replace("-", "").replace(",", "").isdigit():
            return [self._row(int(word), b)[0] for word in at.split(",")]
        if ":" in at:
            start, _, stop = at.partition(":")
            return list(range(length))[slice(int(start) if start else None, int(stop) if stop else None)]
        if at in self.spans:
            return list(range(*self.spans[at][b]))
        raise InputError(f"'@{at}' is no position: expected an index, a slice, 'token' or a span{nearest(at, self.spans)}")

    def _token(self, text: str, b: int) -> int:
        """The last occurrence of a token, by its text with or without the leading space."""
        row = self.labels[b]
        for wanted in (text, text.strip()):
            found = [i for i, label in enumerate(row) if label == wanted or label.strip() == wanted]
            if found:
                return found[-1]
        raise InputError(f"the token {text!r} is not in the prompt; its tokens are {self._shown(b)}{nearest(text, row)}")

    def _shown(self, b: int) -> str:
        return " ".join(repr(t) for t in self.labels[b])


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a forward pass is called with, and the streams its positions are counted on."""

    tensors: dict[str, Any]
    streams: dict[str, Stream]  # stack name -> stream; "" is the only or the last stack
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.stream("").ids)

    def stream(self, stack: str) -> Stream:
        return self.streams.get(stack) or self.streams[""]

    def rows(self, index: list[int]) -> Inputs:
        """Some of the prompts, as inputs of their own."""

        def cut(stream: Stream) -> Stream:
            spans = {k: [v[i] for i in index] for k, v in stream.spans.items()}
            return Stream(stream.ids[index], stream.mask[index], tuple(stream.labels[i] for i in index), spans)

        batch = len(self)
        tensors = {
            k: v[index] if isinstance(v, Tensor) and v.ndim and len(v) == batch else v for k, v in self.tensors.items()
        }
        return Inputs(tensors, {k: cut(s) for k, s in self.streams.items()}, tuple(self.texts[i] for i in index))


def read_inputs(
    module: nn.Module, tokenizer: Any, prompt: Any, *, target: str | Sequence[str] | None = None, spans: Spans | None = None
) -> Inputs:
    """Tokenise prompts (a string, several, token ids, or a mapping of tensors) for this model.

    `target` is what an encoder-decoder's decoder is given after its start token. Unequal prompts are padded on the
    right, where no real token of a causal model can see the padding.
    """
    if isinstance(prompt, Inputs):
        return prompt
    if isinstance(prompt, Mapping):
        tensors = {k: v for k, v in prompt.items() if v is not None}
        if "input_ids" not in tensors:
            raise InputError(f"the inputs have no 'input_ids' (they have {', '.join(tensors)}); give a prompt or token ids")
    elif isinstance(prompt, Tensor):
        tensors = {"input_ids": prompt if prompt.ndim == 2 else prompt[None]}
    else:
        tensors = _tokenise(tokenizer, prompt)
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
    tensors = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tensors.items()}
    _check_length(module, tensors["input_ids"])
    accepted = inspect.signature(module.forward).parameters
    ids = tensors["input_ids"]
    mask = tensors.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None or mask.ndim != 2 else mask
    tensors["attention_mask"] = mask
    if not bool(mask[:, 0].all()) and "position_ids" in accepted and "position_ids" not in tensors:
        tensors["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    first = Stream(ids, mask, _labels(tokenizer, ids, mask), dict(spans or {}))
    streams = {"": first}
    if getattr(module.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        given = tensors.get("decoder_input_ids")
        decoder_ids, decoder_mask = (given, torch.ones_like(given)) if given is not None else _target(module, tokenizer, target, ids)
        tensors["decoder_input_ids"] = decoder_ids
        if not bool(decoder_mask.all()):
            tensors["decoder_attention_mask"] = decoder_mask
        decoder = Stream(decoder_ids, decoder_mask, _labels(tokenizer, decoder_ids, decoder_mask))
        streams = {"encoder": first, "decoder": decoder, "": decoder}
    elif target is not None:
        raise InputError("only encoder-decoder models take a target; append it to the prompt instead")
    tensors = {k: v for k, v in tensors.items() if k in accepted or "kwargs" in accepted}
    texts = tuple("".join(row) for row in first.labels)
    return Inputs(tensors, streams, texts)


def _tokenise(tokenizer: Any, prompt: Any) -> dict[str, Any]:
    if tokenizer is None:
        raise InputError("this model was opened without a tokenizer: give token ids, or open it with tokenizer=...")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise InputError("no prompt was given: expected a string or a list of strings")
    if isinstance(prompts[0], int):
        return {"input_ids": torch.tensor([prompts])}
    rows = []
    for text in prompts:
        if not isinstance(text, str):
            raise InputError(f"a prompt must be a string or token ids, not {type(text).__name__}")
        ids = tokenizer(text)["input_ids"]
        if not text.strip() or not ids:
            raise InputError("the prompt is empty: give at least one word")
        rows.append(ids)
    return pad(rows, tokenizer.pad_token_id or 0)


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """Rows of token ids as one right-padded batch with its mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*r, *[pad_id] * (longest - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _target(module: nn.Module, tokenizer: Any, target: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    start = getattr(module.config, "decoder_start_token_id", None)
    start = start if start is not None else getattr(module.config, "bos_token_id", None) or 0
    targets = [""] * len(ids) if target is None else [target] * len(ids) if isinstance(target, str) else list(target)
    if len(targets) != len(ids):
        raise InputError(f"{len(ids)} prompts but {len(targets)} targets: give one target per prompt")
    rows = [[start, *(tokenizer(t, add_special_tokens=False)["input_ids"] if t else [])] for t in targets]
    padded = pad(rows, (tokenizer.pad_token_id or 0) if tokenizer is not None else 0)
    return padded["input_ids"].to(ids.device), padded["attention_mask"].to(ids.device)


def _labels(tokenizer: Any, ids: Tensor, mask: Tensor) -> tuple[tuple[str, ...], ...]:
    """The text of every real token, as decoding it alone gives it."""
    rows = [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    if tokenizer is None:
        return tuple(tuple(f"#{i}" for i in row) for row in rows)
    text = {i: tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in {i for row in rows for i in row}}
    return tuple(tuple(text[i] for i in row) for row in rows)


def _check_length(module: nn.Module, ids: Tensor) -> None:
    config = module.config.get_text_config() if hasattr(module.config, "get_text_config") else module.config
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 1 and ids.shape[1] > limit:
        raise InputError(f"the prompt has {ids.shape[1]} tokens but the model's context holds {limit}: shorten the prompt")
