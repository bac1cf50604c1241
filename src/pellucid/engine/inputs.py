"""Prompts as tensors, and positions as people name them.

A mask that is not given is inferred only where it is certain: rows of texts and of unequal ids know their padding; in a
rectangle of ids, several padding tokens at an edge mark it, if that token is nothing else; where it is the end-of-text
token too, or stands there alone as any token may, a row that may be padded is an error that asks for the mask.

Positions are counted on a prompt's real tokens: 0 is the first token that is not padding, -1 the last, whichever side
the padding is on. Every stack has a stream of its own: an encoder counts source tokens, a decoder target tokens.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pellucid.anatomy.heads import check_ends, given_decoder, reads_both_ends
from pellucid.anatomy.modes import accepted_by, evaluating, ordinary
from pellucid.anatomy.sites import Position
from pellucid.engine.given import Chat, Pair, Truncate, is_id, is_messages, read_row, target_ids
from pellucid.engine.limits import check_length, claimed, limit
from pellucid.engine.marks import ROLES
from pellucid.engine.text_map import TextMap
from pellucid.errors import InputError, nearest

Spans = Mapping[str, Any]  # name -> text, pattern, or one per prompt of these, of characters or of tokens


@dataclass(frozen=True, eq=False)
class Stream:
    """The tokens one stack sees: ids [batch, length], mask (1 on real tokens, which stand together) and their texts.

    `spans` are named [first, last + 1) positions of each row; `maps` say which characters of its text a token stands for.
    Ids and mask are on the model's device. Where positions are is told on the host, from the mask that is fetched once: what
    is decided by it, for a variant of a sweep or a generated token, does not wait for the device.
    """

    ids: Tensor
    mask: Tensor
    labels: tuple[tuple[str, ...], ...]
    spans: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    maps: tuple[TextMap, ...] = field(default=(), repr=False)
    _found: dict[Position, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def real(self) -> Tensor:
        """[batch, length] which tokens are real, on the host."""
        real = self.mask.bool().cpu()
        return everywhere(real) if bool(real.all()) else real

    @cached_property
    def starts(self) -> Tensor:
        """[batch] the column of each row's first real token, on the host."""
        return self.real.long().argmax(1)

    @cached_property
    def lengths(self) -> Tensor:
        """[batch] how many real tokens each row has, on the host."""
        return self.real.long().sum(1)

    @cached_property
    def padded(self) -> bool:
        return not bool(self.real.all())

    @cached_property
    def placed(self) -> dict[Any, Any]:
        """Where edits of it are written, as `engine.writing` found it."""
        return {}

    def find(self, at: Position) -> Tensor | None:
        """Columns [batch, n] of the positions `at` names in each row, on the host; None for every position."""
        if at is None or (isinstance(at, str) and at == "*"):
            return None
        if not (isinstance(at, str) and at.strip()) and not is_id(at):
            raise InputError(f"'@{at}' is no position: expected an index, a slice such as '1:4', 'text' or a span")
        if at not in self._found:
            rows = [self._row(at, b) for b in range(len(self.ids))]
            if len({len(r) for r in rows}) > 1:
                raise InputError(
                    f"'@{at}' names {', '.join(str(len(r)) for r in rows)} positions in the prompts of this batch: "
                    "expected the same number in each; run them one at a time or name single positions"
                )
            self._found[at] = torch.tensor(rows) + self.starts[:, None]
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
        if not isinstance(wanted, str):
            raise InputError(
                f"{wanted!r:.80} is no place: expected a text of the prompt, a pattern or a slice of characters"
            )
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
        """Some of the prompts, any of them several times, as a batch of their own.

        InputError where some tensor has no row for each prompt, as images cut into patches have not.
        """
        n, index = len(self), list(index)

        def cut(stream: Stream) -> Stream:
            spans = {name: [span[i] for i in index] for name, span in stream.spans.items()}
            labels, maps = tuple(stream.labels[i] for i in index), tuple(stream.maps[i] for i in index if stream.maps)
            return Stream(stream.ids[index], stream.mask[index], labels, spans, maps)

        tensors = dict(self.tensors)
        for name, value in tensors.items():
            if not isinstance(value, Tensor) or not value.ndim or index == list(range(n)):
                continue
            if len(value) == n:
                tensors[name] = value[index]
            elif name in ("input_ids", "decoder_input_ids") and len(value) % n == 0:  # a row for each codebook
                tensors[name] = value.unflatten(0, (n, -1))[index].flatten(0, 1)
            elif value.ndim > 1 and value.shape[1] == n and value.shape[2:] == self.stream("").ids.shape[1:]:
                tensors[name] = value[:, index]  # position ids of several axes
            elif n > 1 or len(value) > 1:
                raise InputError(
                    f"{name!r} {list(value.shape)} has no row for each of the {n} prompts, so they cannot be taken apart: "
                    "run the prompts one at a time"
                )
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
            ids, mask = stream.ids[row : row + 1, columns], stream.mask[row : row + 1, columns]
            return Stream(ids, mask, (stream.labels[row],), spans, stream.maps[row : row + 1])

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
        most = max(v.shape[1] for v in values) if name.startswith("decoder_") else width
        fill = pad_id if name.endswith("input_ids") else 0
        values = [nn.functional.pad(v, (0, most - v.shape[1]), value=fill) for v in values]
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
    module: Any,
    tokenizer: Any,
    prompt: Any,
    *,
    decoder: str | Sequence[str] | None = None,
    spans: Spans | None = None,
    truncate: Truncate | None = None,
) -> Inputs:
    """Read prompts for this model: one or several of what `engine.given` lists, a tensor of token ids, or a mapping of
    tensors as the forward pass takes them (what a tokenizer or processor gives).

    `decoder` is what an encoder-decoder's decoder is given after its start token. Unequal prompts are padded on the right,
    where no real token of a causal model can see the padding. `truncate` cuts what is too long on the "left" or "right", to
    what the model holds, to a number of tokens, or to both: ("left", 128). InputError says what cannot be read.
    """
    if isinstance(prompt, Inputs):
        return _again(prompt, decoder, spans, truncate)
    accepted = accepted_by(module)
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
    if isinstance(prompt, Tensor) or (isinstance(prompt, np.ndarray) and prompt.dtype.kind in "iufb"):
        prompt = {"input_ids": prompt}
    is_tensors = isinstance(prompt, Mapping) and bool(set(prompt) & {*MAIN, getattr(module, "main_input_name", "")})
    if is_tensors:
        if truncate is not None:
            raise InputError(
                "truncate= is for texts and lists of token ids: cut tensors yourself, all that belong together"
            )
        tensors, maps = _tensors(module, tokenizer, prompt), None
    else:
        tensors, maps = _read(module, tokenizer, prompt, truncate, accepted)
    tensors = {k: ordinary(v).to(device) if isinstance(v, Tensor) else v for k, v in tensors.items()}
    ids = _ids(module, tensors)
    mask = tensors.get("attention_mask")
    if mask is None or mask.ndim != 2 or ("input_ids" not in tensors and mask.shape != ids.shape):
        mask = everywhere(ids)  # a 4-D mask is the model's business, and one of sound or pixels is no token's
    if "input_ids" in tensors or "inputs_embeds" in tensors:
        tensors.setdefault("attention_mask", mask)
    ids = ids[:: max(1, len(ids) // len(mask))]  # music decoders have a row of tokens per codebook
    paired = (
        bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False)) and "decoder_input_ids" in accepted
    )
    _check(module, ids, mask, "encoder" if paired else "", known="input_ids" in tensors)
    first = labelled(tokenizer, ids, mask, maps, spans)
    streams = {"": first}
    if paired:
        if "input_ids" in tensors and reads_both_ends(module):
            check_ends(module, ids)
            if decoder is None and "decoder_input_ids" not in tensors:  # the text itself, as the forward pass gives it
                tensors |= {"decoder_input_ids": given_decoder(module, ids), "decoder_attention_mask": mask}
        given: Any = tensors.get("decoder_input_ids")
        given_mask: Any = None
        if given is None:
            given, given_mask, maps = _decoder(module, tokenizer, decoder, ids)
        else:
            if decoder is not None:
                raise InputError("decoder= and decoder_input_ids say the same: give one of them")
            maps, given_mask = None, tensors.get("decoder_attention_mask")
            if given_mask is None:
                given_mask = inferred_mask(module, tokenizer, given, first=1)
        _check(module, given, given_mask, "decoder")
        tensors["decoder_input_ids"] = given
        if not bool(given_mask.all()):
            tensors["decoder_attention_mask"] = given_mask
        second = labelled(tokenizer, given, given_mask, maps)
        streams = {"encoder": first, "decoder": second, "": second}
    elif decoder is not None:
        raise InputError("only encoder-decoder models take decoder=; append the text to the prompt instead")
    tensors = {k: v for k, v in tensors.items() if k in accepted or ("kwargs" in accepted and k not in EXTRAS)}
    return Inputs(tensors, streams, tuple(each.text for each in first.maps))


MAIN = ("input_ids", "inputs_embeds", "attention_mask")
# What tokenizers and data sets give beside the ids, for models that name it; others would be asked for what they have not.
EXTRAS = {"token_type_ids", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length", "labels"}


def _again(inputs: Inputs, decoder: Any, spans: Spans | None, truncate: Truncate | None) -> Inputs:
    """Prompts that were read before; new spans may be named on them."""
    if decoder is not None or truncate is not None:
        raise InputError("these prompts were read before: give decoder= and truncate= to model.inputs")
    if not spans:
        return inputs
    old = inputs.stream("encoder")
    new = replace(old, spans={**old.spans, **_spans(spans, old)})
    return replace(inputs, streams={k: new if s is old else s for k, s in inputs.streams.items()})


def _read(
    module: Any, tokenizer: Any, prompt: Any, truncate: Truncate | None, accepted: Mapping[str, Any]
) -> tuple[dict[str, Any], list[TextMap]]:
    """Prompts one by one as a padded batch, and which characters their tokens stand for."""
    rows = [read_row(tokenizer, each) for each in one_by_one(prompt)]
    if truncate is not None:
        side, room = _room(module, tokenizer, truncate)
        rows = [row.cut(room, side) for row in rows]
    try:
        tensors = pad([row.ids for row in rows], pad_index(module, tokenizer))
    except (RuntimeError, OverflowError, ValueError) as error:
        raise InputError(f"token ids must be whole numbers of this model's vocabulary: {error}") from error
    if any(row.types is not None for row in rows) and "token_type_ids" in accepted:
        tensors["token_type_ids"] = pad([row.types or [0] * len(row.ids) for row in rows], 0)["input_ids"]
    if tensors["attention_mask"].all() and any(row.map.given is None for row in rows):
        tensors["attention_mask"] = mask = inferred_mask(module, tokenizer, tensors["input_ids"])
        if not mask.all():
            kept = (row[m.bool()].tolist() for row, m in zip(tensors["input_ids"], mask, strict=True))
            return tensors, [TextMap(tokenizer, tuple(ids)) for ids in kept]
    return tensors, [row.map for row in rows]


def one_by_one(prompt: Any) -> list[Any]:
    """The prompts one by one."""
    if isinstance(prompt, np.ndarray | np.generic):
        prompt = prompt.tolist()
    if isinstance(prompt, str | Pair | Chat | Mapping):
        if isinstance(prompt, Mapping) and not prompt:
            raise InputError("no prompt was given: expected a string or a list of strings")
        return [prompt]
    if not isinstance(prompt, Iterable):
        raise InputError(f"a prompt must be a string or token ids, not {prompt!r:.80}")
    if isinstance(prompt, tuple) and len(prompt) == 2 and all(isinstance(text, str) for text in prompt):
        return [read_row(None, prompt)]  # refused there
    prompts = list(prompt)
    if not prompts:
        raise InputError("no prompt was given: expected a string or a list of strings")
    if is_messages(prompts) or all(is_id(i) for i in prompts):
        return [prompts]
    if not isinstance(prompt, list | tuple) or all(isinstance(p, Tensor) and not p.ndim for p in prompts):
        plain = [p.item() if isinstance(p, Tensor) and not p.ndim else p for p in prompts]
        return [plain] if all(is_id(i) for i in plain) else plain
    return prompts


def _room(module: Any, tokenizer: Any, truncate: Truncate) -> tuple[str, int]:
    """Which side is cut, and how many tokens are left."""
    side: Any
    room: Any
    side, room = truncate if isinstance(truncate, tuple) and len(truncate) == 2 else (truncate, None)
    if is_id(side) and room is None:
        side, room = "right", side
    if side not in ("left", "right") or not (room is None or (is_id(room) and room > 0)):
        raise InputError(f"truncate={truncate!r}: expected 'left', 'right', a number of tokens, or ('left', 128)")
    if room is None:
        room = limit(module, "encoder") or claimed(module) or getattr(tokenizer, "model_max_length", None) or NEVER
        if room >= NEVER:
            raise InputError(f"this model has no longest prompt: give a number, such as truncate=({side!r}, 512)")
    return str(side), int(room)


NEVER = 10**9  # tokenizers without a limit say some such number


def _tensors(module: Any, tokenizer: Any, prompt: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping of tensors as the forward pass takes them; lists, and rows of unequal length, become padded tensors."""
    given = {k: _tensor(k, v) for k, v in prompt.items() if v is not None and k != "offset_mapping"}
    ragged = {k: v for k, v in given.items() if isinstance(v, list)}
    if ragged and "input_ids" in ragged:
        wrong = [k for k in ragged if [*map(len, ragged[k])] != [*map(len, ragged["input_ids"])]]
        if wrong:
            raise InputError(
                f"{wrong[0]!r} has rows of other lengths than 'input_ids': expected one number for each token"
            )
        for name, rows in ragged.items():
            made = pad(rows, pad_index(module, tokenizer) if name == "input_ids" else 0)
            given[name] = made["input_ids"]
            given.setdefault("attention_mask", made["attention_mask"])
    elif ragged:
        raise InputError(f"the rows of {next(iter(ragged))!r} differ in length: pad them")
    ids = given.get("input_ids")
    if ids is not None and ids.ndim == 1:  # one prompt, without the dimension of the batch
        given = {k: v[None] if isinstance(v, Tensor) and v.shape[:1] == ids.shape else v for k, v in given.items()}
        ids = given["input_ids"]
    for name in ("input_ids", "decoder_input_ids"):
        value = given.get(name)
        if value is not None and (
            value.ndim != 2 or not value.numel() or value.is_floating_point() or value.dtype == torch.bool
        ):
            raise InputError(
                f"token ids must be whole numbers [batch, length], not {list(value.shape)} of {value.dtype} ({name})"
            )
        if value is not None:
            given[name] = value.long()
    if ids is not None and "attention_mask" not in given:
        given["attention_mask"] = inferred_mask(module, tokenizer, ids.long())
    for name in ("attention_mask", "decoder_attention_mask"):
        if name in given and not isinstance(given[name], Tensor):
            raise InputError(f"{name!r} must be numbers, 1 on tokens and 0 on padding, not {given[name]!r:.60}")
    return given


def _tensor(name: str, value: Any) -> Any:
    """A value as a tensor; rows of unequal length stay lists. InputError for token ids that are no numbers."""
    number = name.endswith(("ids", "mask"))
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) or (isinstance(value, list | tuple) and value):
        rows = [list(row) for row in value if isinstance(row, list | tuple)]
        if len(rows) == len(value) and len({*map(len, rows)}) > 1 and all(is_id(i) for row in rows for i in row):
            return rows
        try:
            if isinstance(value, np.ndarray) and value.dtype == np.uint64:
                value = value.astype(np.int64)
            return torch.stack(list(value)) if all(isinstance(v, Tensor) for v in value) else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            if number:
                raise InputError(f"{name!r} must be whole numbers [batch, length], not {value!r:.60}") from error
            return value
    if number:
        raise InputError(f"{name!r} must be whole numbers [batch, length], not {value!r:.60}")
    return value


def _ids(module: Any, tensors: dict[str, Any]) -> Tensor:
    """The ids whose positions are counted; where there are none, a zero for each position of what stands in for them."""
    if "input_ids" in tensors:
        if "inputs_embeds" in tensors:
            raise InputError("input_ids and inputs_embeds say the same: give one of them")
        return tensors["input_ids"]
    made = tensors.get("inputs_embeds")
    if isinstance(made, Tensor):
        if made.ndim != 3 or not made.is_floating_point() or not made.numel():
            raise InputError(
                f"inputs_embeds must be numbers [batch, length, d_model], not {list(made.shape)} of {made.dtype}"
            )
        return torch.zeros(made.shape[:2], dtype=torch.long, device=made.device)
    name = getattr(module, "main_input_name", "input_ids")
    features = tensors.get(name)
    if not isinstance(features, Tensor) or name == "input_ids":
        raise InputError(f"the inputs have no 'input_ids' (they have {', '.join(tensors)}); give a prompt or token ids")
    return torch.zeros(len(features), _frames(module, name, features), dtype=torch.long, device=features.device)


def _frames(module: Any, name: str, features: Tensor) -> int:
    """How many positions an encoder makes of sound or pixels: it says so itself."""
    part = module.get_encoder() if hasattr(module, "get_encoder") else None
    if part is None or part is module:
        raise InputError(f"{type(module).__name__} reads {name!r}, and not text: there are no tokens to count")
    with torch.no_grad(), evaluating(part):
        out = part(features[:1])
    return int((out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]).shape[1])


def everywhere(like: Tensor) -> Tensor:
    """One for each of these, in the memory of a single one: what is kept of a run must not hold a mask that says nothing."""
    return torch.ones((), dtype=like.dtype, device=like.device).expand(like.shape)


def inferred_mask(module: Any, tokenizer: Any, ids: Tensor, first: int = 0) -> Tensor:
    """The mask of ids that came without one, [batch, length]. InputError where padding cannot be told from text.

    `first` tokens of a row are real whatever they are, as a decoder's start token is.
    """
    pads, size = getattr(tokenizer, "pad_token_id", None), vocabulary(module)
    if pads is not None and size is not None and len(tokenizer) > size:
        return everywhere(ids)  # a tokenizer with words that the model has not is not this model's
    sure = pads is not None and pads not in {getattr(tokenizer, f"{role}_token_id", None) for role in (*ROLES, "unk")}
    if pads is None:
        pads = getattr(_text_config(module), "pad_token_id", None)
    whole = everywhere(ids)
    if not isinstance(pads, int) or ids.ndim != 2:
        return whole
    real = ids != pads
    real[:, :first] = True
    left, right = (rows.cumsum(1) == 0 for rows in (real, real.flip(1)))
    edges = left.sum(1) * (first == 0), right.sum(1)
    if not any(bool(n.any()) for n in edges):
        return whole
    if sure and max(int(n.max()) for n in edges) > 1:
        if not bool(real.any(1).all()):
            raise InputError("a prompt has only padding: give at least one token")
        return (~(left | right.flip(1))).long() if first == 0 else (~right.flip(1)).long()
    if (
        ids.shape[1] > 1
        and ((sure and len(ids) > 1) or not sure)
        and any(int(n.max()) > 1 or len(set(n.tolist())) > 1 for n in edges)
    ):
        raise InputError(
            f"token {pads} at the edge of these ids may be padding or text: give the mask too, as in "
            "{'input_ids': ids, 'attention_mask': mask}, or a list of unequal rows"
        )
    return whole


def labelled(
    tokenizer: Any, ids: Tensor, mask: Tensor, maps: Sequence[TextMap] | None = None, spans: Spans | None = None
) -> Stream:
    """The stream of a batch; of ids without text, the text is what they say."""
    if maps is None:
        rows = (row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True))
        maps = [TextMap(tokenizer, tuple(row)) for row in rows]
    made = Stream(ids, mask, _labels(tokenizer, ids, mask), {}, tuple(maps))
    if spans is None or (isinstance(spans, Mapping) and not spans):
        return made
    return replace(made, spans=_spans(spans, made))


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """Rows of token ids as one right-padded batch with its mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*r, *[pad_id] * (longest - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


def left_padded(inputs: Inputs) -> Inputs:
    """The same prompts with the padding moved to the left, where generation needs it (encoders stay as they are).

    Whatever has a value for each token moves with it: token types, position ids, visual masks, embeddings.
    """
    stream = inputs.stream("")
    if not stream.padded:
        return inputs
    if "decoder" in inputs.streams:
        raise InputError(
            "the texts for the decoder differ in length, and generation needs them alike: give one at a time"
        )
    order = torch.argsort(stream.mask.long(), dim=1, stable=True)  # padding first, real tokens in their order
    if bool((order == torch.arange(order.shape[1], device=order.device)).all()):
        return inputs
    shape = stream.ids.shape

    def moved(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or (value.is_floating_point() and name != "inputs_embeds"):
            return value
        if value.ndim == 4 and value.shape[-1] == shape[1]:
            raise InputError(
                f"{name!r} {list(value.shape)} cannot be moved to the left with its tokens: pad on the left"
            )
        at = next((d for d in range(value.ndim - 1) if value.shape[d : d + 2] == shape), None)
        if at is None and len(value) != shape[0] and value.ndim == 2 and len(value) % shape[0] == 0:
            return value.gather(1, order.repeat_interleave(len(value) // shape[0], 0))  # a row for each codebook
        if at is None:
            return value
        index = order.reshape(*[1] * at, *shape, *[1] * (value.ndim - at - 2)).expand(value.shape)
        return value.gather(at + 1, index)

    tensors = {k: moved(k, v) for k, v in inputs.tensors.items()}
    made = replace(stream, ids=moved("ids", stream.ids), mask=moved("mask", stream.mask), _found={})
    return Inputs(tensors, {"": made}, inputs.texts)


def _text_config(module: Any) -> Any:
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def pad_index(module: Any, tokenizer: Any) -> int:
    """What padding is written as: some models find it by its id, so the model's own word counts most."""
    named = (getattr(_text_config(module), "pad_token_id", None), getattr(tokenizer, "pad_token_id", None), 0)
    return next(n for n in named if isinstance(n, int) and n >= 0)


def _decoder(module: Any, tokenizer: Any, decoder: Any, ids: Tensor) -> tuple[Tensor, Tensor, list[TextMap] | None]:
    """The decoder's ids: the start token, what generation is made to begin with, then the text given."""
    config, settings = module.config, getattr(module, "generation_config", None)

    def named(name: str) -> Any:
        found = getattr(settings, name, None)
        return found if found is not None else getattr(config, name, None)

    start, forced = named("decoder_start_token_id"), named("forced_bos_token_id")
    start = start if start is not None else getattr(config, "bos_token_id", None) or 0
    texts = [""] * len(ids) if decoder is None else [decoder] * len(ids) if isinstance(decoder, str) else decoder
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"decoder= is what the decoder is given: expected a text, or one for each prompt, not {decoder!r:.60}"
        )
    if len(texts) != len(ids):
        raise InputError(f"{len(ids)} prompts but {len(texts)} texts for the decoder: give one per prompt")
    if tokenizer is None and any(texts):
        raise InputError("this model was opened without a tokenizer: give decoder_input_ids instead of decoder=")
    said = [target_ids(tokenizer, text) if text else [] for text in texts]
    front = [*(start if isinstance(start, list) else [start])]
    front += [forced] if isinstance(forced, int) and forced != front[-1] else []
    rows = [[*front, *(row[1:] if row[:1] == front[1:] and row[:1] else row)] for row in said]
    padded = pad(rows, pad_index(module, tokenizer))
    maps = [TextMap(tokenizer, tuple(row), text) for row, text in zip(rows, texts, strict=True)] if any(texts) else None
    return padded["input_ids"].to(ids.device), padded["attention_mask"].to(ids.device), maps


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


def _check(module: Any, ids: Tensor, mask: Tensor, stack: str = "", known: bool = True) -> None:
    """InputError for ids the embedding does not have, prompts beyond the context, and masks that are no padding."""
    if mask.shape != ids.shape:
        raise InputError(f"the attention mask is {list(mask.shape)}, but the token ids are {list(ids.shape)}")
    edges = mask.long().diff(dim=1, prepend=torch.zeros_like(mask[:, :1]).long())
    if bool(((edges == 1).sum(1) != 1).any()):
        raise InputError(
            "each row of the attention mask must be 1 on one stretch of tokens and 0 on the padding around it"
        )
    if not known:
        return
    size = vocabulary(module)
    if size is not None and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise InputError(
            f"token id {int(ids.max()) if ids.min() >= 0 else int(ids.min())} is unknown: this model has 0 to {size - 1}"
        )
    longest = f"prompt {int(mask.sum(1).argmax())} has" if len(ids) > 1 else "the prompt has"
    check_length(module, ids.shape[1], stack, longest)


def vocabulary(module: Any) -> int | None:
    """How many tokens the embedding has; None for families that embed in ways of their own."""
    try:
        size = getattr(module.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None
    return size if isinstance(size, int) else None
