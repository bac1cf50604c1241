"""How does a corpus become what a model reads? Texts -> rows of token ids -> batches -> inputs.

    packed      the texts behind one another, each with its end token, cut into rows of `context` tokens: for causal models
    one a row   every text by itself, as the tokenizer gives it; what to do with one that is too `long` is said, never guessed

Every row begins with what the tokenizer puts in front of a text (BOS, [CLS]), once; none stands inside a row. Texts are read
as they come, from lists, generators, lines of a file and `datasets` (streamed ones too). A `Place` says how far that came, and
knows a digest of every text up to there, so that what goes on later goes on in the same corpus, or fails.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from pellucid.engine.given import Chat, Pair, is_messages, read_row
from pellucid.engine.inputs import Inputs, one_by_one
from pellucid.engine.limits import check_length, claimed, exceeded, limit
from pellucid.errors import InputError, among, at_least, nearest
from pellucid.model import Model

Long = Literal["refuse", "cut", "cut_left", "windows"]
CONTEXT = 256  # tokens of a packed row, where nothing else is said and the model holds as many
SEGMENT = 32_768  # tokens that are sorted by length together


@dataclass(frozen=True)
class Place:
    """How far a corpus was read: texts begun, what of the last one is used, rows and tokens given, a digest of the texts."""

    texts: int = 0
    used: int = 0
    rows: int = 0
    tokens: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Row:
    """One row of token ids: its number, the `text` it ends in, and the decoder's text in an encoder-decoder."""

    number: int
    ids: tuple[int, ...]
    text: int
    decoder: str | None = None
    place: Place = field(default_factory=Place, repr=False)  # after this row


@dataclass(frozen=True, repr=False)
class Corpus:
    """Texts and how they are cut into rows.

    `texts` are strings, lists of token ids, pairs (source, target) for an encoder-decoder, or mappings (rows of `datasets`) with
    these under `column` (two columns for pairs): a list, anything else that is iterated, or the Path of a file of lines.
    `context` tokens a row (None: 256 packed, as many as the model holds otherwise); `packed` by default for a causal model.
    A text longer than a row, one a row: "refuse" (an error that names it), "cut" off at the end, "cut_left" at its beginning,
    or "windows", rows one after
    another that each have the special tokens and begin `stride` tokens of text after the one before (None: where that ends).
    At most `tokens` tokens in all. None is what the reader of the corpus chooses.

    >>> Corpus(["a b", "c"], context=4, tokens=100)
    <Corpus of 2 texts, context 4, 100 tokens>
    """

    texts: Any
    context: int | None = None
    packed: bool | None = None
    long: Long | None = None
    tokens: int | None = None
    column: str | tuple[str, str] = "text"
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.stride is not None:
            at_least(1, stride=self.stride)
            if self.packed or self.long not in (None, "windows"):
                raise InputError("stride= is how far windows move: it goes with long='windows', one text a row")
        if isinstance(self.texts, str) or not isinstance(self.texts, Iterable | Path):
            raise InputError(
                "expected several texts: put the one text into a list, or give the Path of a file of lines"
            )
        if self.long is not None and not among(self.long, Long):
            raise InputError(f"unknown long={self.long!r}{nearest(self.long, get_args(Long))}")

    def __repr__(self) -> str:
        known = f"{len(self.texts):,} texts" if hasattr(self.texts, "__len__") else type(self.texts).__name__
        words = [f"<Corpus of {known}", *([f"context {self.context}"] if self.context else [])]
        return ", ".join([*words, *([f"{self.tokens:,} tokens"] if self.tokens else [])]) + ">"

    @classmethod
    def of(cls, texts: Any, **defaults: Any) -> Corpus:
        """A corpus as it is, with `defaults` for what it leaves open; or one made of texts."""
        if not isinstance(texts, Corpus):
            return cls(texts, **defaults)
        return replace(texts, **{k: v for k, v in defaults.items() if getattr(texts, k) is None})

    # ---- rows

    def rows(self, model: Model, after: Place | None = None) -> Iterator[Row]:
        """The rows in order, those that follow `after` if that is given: InputError where its texts were others.

        InputError too for a text that is none, or too long, by its number; blank texts give no row of a packed corpus, and an
        empty one otherwise.
        """
        place, read, number = after or Place(), hashlib.sha256(), -1
        held: list[int] = []
        frame = _Frame.of(model)
        one, *more = model.anatomy.stacks
        packed = bool(one.causal and not more) if self.packed is None else self.packed
        context = self._context(model, packed)
        for number, given in enumerate(self._texts()):
            value, decoder = self._parted(model, given, number)
            read.update(repr((value, decoder)).encode())
            if number + 1 < place.texts:
                continue
            if number + 1 == place.texts and read.hexdigest() != place.digest:
                raise InputError(f"the first {place.texts} texts are others than those that were read before")
            used = place.used if number + 1 == place.texts else 0
            if packed:
                body = frame.stream(value)
                room, held = context - len(frame.front), held + body[used:]
                ends = range(room, len(held) + 1, room)
                pieces = [(frame.front + held[i - room : i], len(body) - len(held) + i) for i in ends]
                held = held[len(ends) * room :]
            else:
                pieces = [p for p in self._alone(frame, value, context, number) if p[1] > used]
            for ids, used in pieces:
                place = Place(number + 1, used, place.rows + 1, place.tokens + len(ids), read.hexdigest())
                if self.tokens is not None and place.tokens > self.tokens:
                    return
                yield Row(place.rows - 1, tuple(ids), number, decoder, place)
        if number + 1 < place.texts:
            raise InputError(f"the corpus ends after {number + 1} texts; {place.texts} of it were read before")

    def _context(self, model: Model, packed: bool) -> int:
        if self.context is None:
            return min(CONTEXT, longest(model)) if packed else longest(model)
        first = "encoder" if len(model.anatomy.stacks) > 1 else ""
        if (holds := exceeded(model.module, self.context, first)) is not None:
            raise InputError(
                f"a context of {self.context} tokens is more than {model.name} holds, {holds}: give a smaller one"
            )
        return self.context

    def read(self) -> Iterator[str]:
        """The texts themselves, for what reads them by its own tokenizer. InputError for token ids, which have none."""
        for number, given in enumerate(self._texts()):
            if isinstance(given, Mapping) and isinstance(self.column, str):
                given = given.get(self.column)
            if not isinstance(given, str):
                raise InputError(
                    f"text {number} of the corpus is no text: two tokenizers read strings, not {given!r:.60}"
                )
            yield given

    def _texts(self) -> Iterator[Any]:
        if isinstance(self.texts, Path):
            with self.texts.open(encoding="utf-8") as file:
                yield from (line.rstrip("\r\n") for line in file)
        else:
            yield from self.texts

    def _parted(self, model: Model, given: Any, number: int) -> tuple[str | list[int], str | None]:
        """What the (first) stack reads, a text or ids, and the decoder's text."""
        if isinstance(given, Mapping):
            names = [self.column] if isinstance(self.column, str) else list(self.column)
            if missing := [name for name in names if name not in given]:
                raise InputError(
                    f"row {number} of the corpus has no {missing[0]!r}{nearest(missing[0], given)}: say column="
                )
            given = given[names[0]] if len(names) == 1 else tuple(given[name] for name in names)
        if isinstance(given, Pair | Chat) or is_messages(given):
            return read_row(model.tokenizer, given).ids, None
        decoder, pair = None, isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], str)
        if pair:
            given, decoder = given
        if pair and len(model.anatomy.stacks) == 1:
            raise InputError(f"text {number} of the corpus is a pair, which only an encoder-decoder reads: give texts")
        if isinstance(given, str):
            if model.tokenizer is None:
                raise InputError(
                    "this model was opened without a tokenizer, which is needed to read text: give token ids"
                )
            return given, decoder
        try:
            ids = torch.as_tensor(given)
            if ids.ndim != 1 or (ids.numel() and ids.is_floating_point()):
                raise ValueError
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"text {number} of the corpus is no text: expected a string or token ids, not {given!r:.60}"
            ) from None
        return ids.long().tolist(), decoder

    def _alone(
        self, frame: _Frame, value: str | list[int], context: int, number: int
    ) -> Iterator[tuple[list[int], int]]:
        """Rows of one text, each with how far in the text it ends (1 for an empty text)."""
        front, back, body = ([], [], value) if isinstance(value, list) else (frame.front, frame.back, frame.body(value))
        size = len(front) + len(body) + len(back)
        if not body:
            yield [], 1
        elif size <= context:
            yield front + body + back, len(body)
        elif self.long == "cut":
            yield front + body[: context - len(front) - len(back)] + back, len(body)
        elif self.long == "cut_left":
            yield front + body[len(body) - context + len(front) + len(back) :] + back, len(body)
        elif self.long == "windows":
            room = context - len(front) - len(back)
            step = room if self.stride is None else self.stride
            if step > room:
                raise InputError(
                    f"stride={step} leaves out text between windows of {room} tokens: expected at most {room}"
                )
            ends = range(0, max(len(body) - room + step, 1), step)  # the last window reaches the end
            for i in ends:
                yield front + body[i : i + room] + back, i + step if i != ends[-1] else len(body) + step
        else:
            raise InputError(f"text {number} of the corpus has {size} tokens, more than {context}: leave it out, or give a Corpus "
                             "with long='cut', 'cut_left' or 'windows'")  # fmt: skip


@dataclass(frozen=True)
class _Frame:
    """What the tokenizer puts around a text."""

    tokenizer: Any
    front: list[int]
    back: list[int]
    end: list[int]  # between texts that stand behind one another

    @classmethod
    def of(cls, model: Model) -> _Frame:
        tokenizer = model.tokenizer
        if tokenizer is None:
            return cls(None, [], [], [])
        for probe in ("a", ".", "The", "0"):
            bare, whole = (list(tokenizer(probe, add_special_tokens=s)["input_ids"]) for s in (False, True))
            starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
            if bare and starts:
                front, back = whole[: starts[0]], whole[starts[0] + len(bare) :]
                return cls(tokenizer, front, back, back or [i for i in (tokenizer.eos_token_id,) if i is not None])
        raise InputError("cannot tell what this tokenizer puts around a text: give token ids")

    def body(self, text: str) -> list[int]:
        """The ids of a text alone, without the front that it may already be written with."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text.strip() else []
        return ids[len(self.front) :] if self.front and ids[: len(self.front)] == self.front else ids

    def stream(self, value: str | list[int]) -> list[int]:
        """What a text adds to a packed corpus."""
        if isinstance(value, str):
            body = self.body(value)
        else:
            body = value[len(self.front) :] if self.front and value[: len(self.front)] == self.front else value
        return body if not body or (self.end and body[-len(self.end) :] == self.end) else body + self.end


def longest(model: Model) -> int:
    """How many tokens a row has at most, where nothing else is said: what a table holds, or what the config speaks of."""
    first = "encoder" if len(model.anatomy.stacks) > 1 else ""
    return limit(model.module, first) or claimed(model.module, first) or 1 << 30


def read_each(
    model: Model, prompts: Any, more: int = 0, what: str = "prompt", truncate: int | None = None
) -> list[Inputs]:
    """One prompt or several, each as inputs of its own, for what goes through them in turn or in batches: all are read first.

    InputError before anything runs for one that cannot be read, or is longer, with `more` tokens to come, than the model holds.
    """
    given = [prompts.alone(i) for i in range(len(prompts))] if isinstance(prompts, Inputs) else one_by_one(prompts)
    found = []
    for number, prompt in enumerate(given):
        try:
            found.append(model.inputs(prompt, truncate=truncate))
            if more and len(model.anatomy.stacks) == 1:  # they follow the prompt
                check_length(
                    model.module, found[-1].stream("").ids.shape[1] + more - 1, what=f"with {more} new tokens it has"
                )
        except InputError as error:
            if len(given) == 1:
                raise
            raise InputError(f"{what} {number}: {error}") from None
    return found


# ---- batches


def inputs(model: Model, rows: Sequence[Row]) -> Inputs:
    """Rows as one batch."""
    paired = any(row.decoder is not None for row in rows)
    return model.inputs(
        [list(row.ids) for row in rows], decoder=[row.decoder or "" for row in rows] if paired else None
    )


def batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """`size` rows at a time, in order; empty rows are left out."""
    group: list[Row] = []
    for row in rows:
        if row.ids:
            group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def segments(rows: Iterable[Row], tokens: int = SEGMENT) -> Iterator[list[Row]]:
    """Consecutive rows of about so many tokens, empty ones among them."""
    found: list[Row] = []
    size = 0
    for row in rows:
        found.append(row)
        size += len(row.ids)
        if size >= tokens:
            yield found
            found, size = [], 0
    if found:
        yield found


def by_length(segment: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Rows of like length together, at most `tokens` tokens with their padding (but one row at least)."""
    group: list[Row] = []
    for row in sorted((r for r in segment if r.ids), key=lambda r: len(r.ids)):
        if group and len(row.ids) * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def digest(rows: Iterable[Row]) -> str:
    """Of what a model is given, row by row."""
    made = hashlib.sha256()
    for row in rows:
        made.update(repr((row.ids, row.decoder)).encode())
    return made.hexdigest()
