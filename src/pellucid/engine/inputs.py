"""Prompts as tensors, and positions as people name them.

Positions are counted on a prompt's real tokens: 0 is the first token that is not padding, -1 the last, whichever side
the padding is on. Every stack has a stream of its own: an encoder counts source tokens, a decoder target tokens.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pellucid.anatomy.sites import Position
from pellucid.engine.marks import token_ids
from pellucid.engine.text_map import TextMap, legible
from pellucid.errors import InputError, nearest

Spans = Mapping[str, Any]  # name -> text, pattern, or one per prompt of these, of characters or of tokens


@dataclass(frozen=True, eq=False)
class Stream:
    """The tokens one stack sees: ids [batch, length], mask (1 on real tokens, which stand together) and their texts.

    `spans` are named [first, last + 1) positions of each row; `maps` say which characters of its text a token stands for.
    """

    ids: Tensor
    mask: Tensor
    labels: tuple[tuple[str, ...], ...]
    spans: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    maps: tuple[TextMap, ...] = field(default=(), repr=False)
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
            return list(self._text(at, b))
        if len(at) > 2 and at[0] == at[-1] == "/":
            return list(self.tokens(b, *self.maps[b].search(at[1:-1])))
        if place := re.fullmatch(r"chars\((\d+):(\d+)\)", at):
            return list(self.tokens(b, int(place[1]), int(place[2])))
        if re.fullmatch(r"-?\d+(,-?\d+)+", at):
            return [self._row(int(word), b)[0] for word in at.split(",")]
        if at in self.spans:
            named = range(*self.spans[at][b])
        elif bounds := re.fullmatch(r"(-?\d+)?:(-?\d+)?", at):
            named = range(length)[slice(*(int(n) if n else None for n in bounds.groups()))]
        elif self.maps and self.maps[b].turns and (turn := re.fullmatch(r"(\w+)(?:\[(-?\d+)\])?", at)):
            return list(self.tokens(b, *self.maps[b].turn(turn[1], int(turn[2] or -1))))
        else:
            known = nearest(at, self.spans) if self.spans else ""
            raise InputError(
                f"'@{at}' is no position: expected an index, a slice such as '1:4', 'text', /expression/, chars(3:9) or a "
                f"span{known}"
            )
        if not named or named[-1] >= length:
            raise InputError(f"'@{at}' names no tokens of the prompt, which has {length}: {self._shown(b)}")
        return list(named)

    def tokens(self, b: int, start: int, stop: int) -> range:
        """The positions of a row whose tokens touch characters [start, stop) of its text. InputError if none does."""
        found = self.maps[b].tokens(start, stop)
        if not found:
            raise InputError(
                f"no token stands for {self.maps[b].text[start:stop]!r}, which this tokenizer drops: the tokens are {self._shown(b)}"
            )
        return found

    def named(self, wanted: str | re.Pattern[str] | slice, b: int) -> range:
        """The positions of a row that a text, a compiled pattern or a slice of characters names, the last where several do."""
        if isinstance(wanted, re.Pattern):
            return self.tokens(b, *self.maps[b].search(wanted))
        if isinstance(wanted, slice):
            start, stop, _ = wanted.indices(len(self.maps[b].text))
            return self.tokens(b, start, stop)
        row = self.labels[b]
        for text in (wanted, wanted.strip()):
            for inside in (False, True):
                characters = self.maps[b].find(text, inside) if self.maps else None
                if characters is not None and (found := self.maps[b].tokens(*characters)):
                    return found
                alike = [i for i, label in enumerate(row) if text in (label, label.strip())]
                if alike:
                    return range(alike[-1], alike[-1] + 1)
        raise InputError(
            f"{wanted!r} is not in the prompt; its tokens are {self._shown(b)}{nearest(wanted, dict.fromkeys(row))}"
        )

    def _text(self, quoted: str, b: int) -> range:
        """The last occurrence of a text: whole words first, then a token, then anywhere."""
        try:
            text = str(ast.literal_eval(quoted))
        except (SyntaxError, ValueError) as error:
            raise InputError(
                f"cannot read the text in '@{quoted}': expected quotes on both sides, such as @'Paris'"
            ) from error
        return self.named(text, b)

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
            labels, maps = (tuple(each[i] for i in index) if each else () for each in (stream.labels, stream.maps))
            return Stream(stream.ids[index], stream.mask[index], labels, spans, maps)

        tensors = {
            k: v[index] if isinstance(v, Tensor) and v.ndim and len(v) == n else v for k, v in self.tensors.items()
        }
        return Inputs(tensors, {k: cut(s) for k, s in self.streams.items()}, tuple(self.texts[i] for i in index))

    def alone(self, row: int) -> Inputs:
        """One of the prompts, without its padding."""
        if not any(s.padded for s in self.streams.values()):
            return self.rows([row])
        real = {name: stream.mask[row].bool() for name, stream in self.streams.items()}

        def cut(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.ndim or len(value) != len(self):
                return value
            stream = "decoder" if name.startswith("decoder_") else "encoder" if "encoder" in real else ""
            fits = value.shape[1:2] == self.streams[stream].ids.shape[1:2]
            return value[row : row + 1, real[stream]] if fits else value[row : row + 1]

        def own(name: str, stream: Stream) -> Stream:
            spans = {span: [rows[row]] for span, rows in stream.spans.items()}
            columns = real[name]
            return Stream(
                stream.ids[row : row + 1, columns], stream.mask[row : row + 1, columns], (stream.labels[row],), spans,
                stream.maps[row : row + 1],
            )  # fmt: skip

        streams = {name: own(name, stream) for name, stream in self.streams.items()}
        if "decoder" in streams:
            streams[""] = streams["decoder"]
        tensors = {k: cut(k, v) for k, v in self.tensors.items() if k != "position_ids"}
        return Inputs(tensors, streams, (self.texts[row],))

    def repeated(self, times: int) -> Inputs:
        """The same prompts several times over, in order, as one batch."""
        return self.rows(list(range(len(self))) * times)


def beside(several: Sequence[Inputs], times: Sequence[int], pad_id: int) -> Inputs:
    """Prompts without padding as one batch, padded on the right; each as often as `times` says."""
    firsts = [each.streams.get("encoder", each.streams[""]) for each in several]
    width = max(stream.ids.shape[1] for stream in firsts)
    rows = torch.arange(len(several)).repeat_interleave(torch.tensor(times)).tolist()

    def column(name: str) -> Any:
        values = [each.tensors[name] for each in several]
        if not isinstance(values[0], Tensor) or not values[0].ndim or len(values[0]) != 1:
            return values[0]
        if not name.startswith("decoder_"):
            fill = pad_id if name == "input_ids" else 0
            values = [nn.functional.pad(v, (0, width - v.shape[1]), value=fill) for v in values]
        return torch.cat(values)[rows]

    def joined(name: str) -> Stream:
        streams = [each.streams[name] for each in several]
        most = max(s.ids.shape[1] for s in streams)
        ids = torch.cat([nn.functional.pad(s.ids, (0, most - s.ids.shape[1]), value=pad_id) for s in streams])[rows]
        mask = torch.cat([nn.functional.pad(s.mask, (0, most - s.mask.shape[1])) for s in streams])[rows]
        shared = [span for span in streams[0].spans if all(span in s.spans for s in streams)]
        spans = {span: [streams[i].spans[span][0] for i in rows] for span in shared}
        maps = tuple(streams[i].maps[0] for i in rows) if all(s.maps for s in streams) else ()
        return Stream(ids, mask, tuple(streams[i].labels[0] for i in rows), spans, maps)

    tensors = {name: column(name) for name in several[0].tensors}
    texts = tuple(several[i].texts[0] for i in rows)
    return Inputs(tensors, {name: joined(name) for name in several[0].streams}, texts)


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
    tensors = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tensors.items()}
    ids = tensors["input_ids"]
    mask = tensors.setdefault("attention_mask", torch.ones_like(ids))
    mask = mask if mask.ndim == 2 else torch.ones_like(ids)  # a 4-D mask is the model's business
    ids = ids[:: max(1, len(ids) // len(mask))]  # music decoders have a row of tokens per codebook
    _check(module, ids, mask)
    texts = _given(prompt)
    first = _stream(tokenizer, ids, mask, texts, spans)
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
        second = _stream(tokenizer, given, given_mask, None)
        streams = {"encoder": first, "decoder": second, "": second}
    elif decoder is not None:
        raise InputError("only encoder-decoder models take decoder=; append the text to the prompt instead")
    tensors = {k: v for k, v in tensors.items() if k in accepted or "kwargs" in accepted}
    return Inputs(tensors, streams, tuple(each.text for each in first.maps))


def _given(prompt: Any) -> list[str | None] | None:
    """The texts among the prompts as they were given."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not any(isinstance(each, str) for each in prompts):
        return None
    return [each if isinstance(each, str) else None for each in prompts]


def _stream(
    tokenizer: Any, ids: Tensor, mask: Tensor, texts: Sequence[str | None] | None, spans: Spans | None = None
) -> Stream:
    """The stream of a batch; of ids without text, the text is what they say."""
    rows = [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    maps = tuple(
        TextMap(tokenizer, tuple(row), text) for row, text in zip(rows, texts or [None] * len(rows), strict=True)
    )
    made = Stream(ids, mask, _labels(tokenizer, ids, mask), {}, maps)
    return made if not spans else replace(made, spans=_spans(spans, made))


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
        given = pad(_rows(tokenizer, prompt), pad_index(module, tokenizer))
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
            ids = token_ids(tokenizer, legible(each))
            if not each.strip() and not tokenizer(each, add_special_tokens=False)["input_ids"]:
                ids = []  # nothing but marks
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


def pad_index(module: Any, tokenizer: Any) -> int:
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
    padded = pad(rows, pad_index(module, tokenizer))
    return padded["input_ids"].to(ids.device), padded["attention_mask"].to(ids.device)


def _spans(spans: Spans, stream: Stream) -> dict[str, list[tuple[int, int]]]:
    """Named spans as positions of each row."""
    n = len(stream.ids)
    if not isinstance(spans, Mapping):
        raise InputError(f"spans= must be a mapping of names to places, not {spans!r:.60}")

    def place(name: str, one: Any, b: int) -> tuple[int, int]:
        if isinstance(one, str | re.Pattern | slice):
            found = stream.named(one, b)
            return found[0], found[-1] + 1
        pair = tuple(one) if isinstance(one, list | tuple) else ()
        if len(pair) != 2 or not all(isinstance(i, int | np.integer) for i in pair):
            raise InputError(
                f"the span {name!r} needs one (first, last + 1) per prompt, or a text, a compiled pattern, a slice of "
                f"characters: got {one!r:.60}"
            )
        return int(pair[0]), int(pair[1])

    made = {}
    for name, rows in spans.items():
        each = [rows] * n if isinstance(rows, str | re.Pattern | slice) else rows
        if not isinstance(each, list | tuple | np.ndarray) or len(each) != n:
            raise InputError(
                f"the span {name!r} needs one (first, last + 1) per prompt: expected {n}, got {rows!r:.60}"
            )
        made[name] = [place(name, one, b) for b, one in enumerate(each)]
    return made


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
