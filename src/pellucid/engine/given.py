"""What people give as one prompt, read into tokens: a text, a pair, a conversation, token ids, a row of a data set.

"text"                            as the tokenizer frames it, its marks once
Pair("first", "second")           two texts in one prompt, for models that compare them
[{"role": ..., "content": ...}]   a conversation through the model's chat template; Chat(...) where it needs options
[5, 17, 3]                        token ids, as they are
{"text": ...}                     a row of a data set: its text, messages or token ids
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.engine.marks import added_marks, once, special_ids
from pellucid.engine.text_map import NO_TOKENIZER, Offsets, TextMap, legible
from pellucid.errors import InputError

Truncate = str | int | tuple[str, int]  # "left" or "right" to what the model holds, a number of tokens, or both


@dataclass(frozen=True)
class Pair:
    """Two texts in one prompt, as cross-encoders and models of entailment read them.

    >>> Pair("A man eats.", "Someone eats.")
    Pair(first='A man eats.', second='Someone eats.')
    """

    first: str
    second: str

    def __post_init__(self) -> None:
        for text in (self.first, self.second):
            if not isinstance(text, str):
                raise InputError(f"a pair is two texts, not {text!r:.60}: pl.Pair('first', 'second')")


@dataclass(frozen=True)
class Chat:
    """A conversation: `messages` with role and content, `tools` (functions or schemas) and further `options` of the template.

    Where the last message is the assistant's, it is continued; otherwise the assistant's turn begins (`begin=False`: it does
    not). The template is applied once, with the marks it writes itself.

    >>> Chat([{"role": "user", "content": "Hi"}]).last
    'user'
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    begin: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_messages(self.messages):
            raise InputError(
                "a conversation is a list of messages such as {'role': 'user', 'content': 'Hi'}, not "
                f"{self.messages!r:.80}"
            )

    @property
    def last(self) -> str:
        return str(self.messages[-1]["role"])

    def render(self, tokenizer: Any, contents: Sequence[Any] | None = None) -> str:
        """The conversation as one text, by the tokenizer's chat template. InputError where that does not take it."""
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "this tokenizer has no chat template: write the conversation as one text, or set tokenizer.chat_template"
            )
        messages = [dict(m) for m in self.messages]
        for message, content in zip(messages, contents or [], strict=False):
            message["content"] = content
        on = self.last == "assistant"
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, tools=list(self.tools) if self.tools else None, tokenize=False,
                    add_generation_prompt=self.begin and not on, continue_final_message=self.begin and on, **self.options,
                )
            )  # fmt: skip
        except Exception as error:  # jinja's errors and whatever a template raises itself
            raise InputError(f"the chat template does not take this conversation: {error}") from error

    def turns(self, tokenizer: Any, text: str) -> tuple[tuple[str, int, int], ...]:
        """Who says what where in the rendered `text`: (role, start, stop) in characters; silent turns are left out."""
        found, at = [], 0
        for message, start in zip(self.messages, self._starts(tokenizer, text), strict=True):
            said = [part.strip() for part in _parts(message.get("content")) if part.strip()]
            at, begin = max(at, start), -1
            for part in said:
                place = text.find(part, at)
                if place < 0:
                    break
                begin, at = place if begin < 0 else begin, place + len(part)
            else:
                if said:
                    found.append((str(message["role"]), begin, at))
        return tuple(found)

    def _starts(self, tokenizer: Any, text: str) -> list[int]:
        """Where each content can begin at the earliest: after what the template writes before it, not inside that."""
        marker = "⁂{}⁂"
        try:
            shown = self.render(tokenizer, [marker.format(i) for i in range(len(self.messages))])
        except InputError:
            return [0] * len(self.messages)
        starts, extra = [], 0
        for i, message in enumerate(self.messages):
            place = shown.find(marker.format(i))
            content = "".join(_parts(message.get("content")))
            start = place + extra if place >= 0 else 0
            starts.append(start if text[start:].lstrip().startswith(content.strip()[:40]) else 0)
            extra += len(content.strip()) - len(marker.format(i))
        return starts


def _parts(content: Any) -> list[str]:
    """The texts of a message's content, which may be a list with images or sound between them."""
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list | tuple) else []
    return [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def is_messages(given: Any) -> bool:
    """Whether this is a conversation: several mappings with a role."""
    return (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and len(given) > 0
        and all(isinstance(m, Mapping) and "role" in m for m in given)
    )


@dataclass(frozen=True)
class Row:
    """One prompt as tokens: ids, token types where the tokenizer tells sentences apart, and which characters they are.

    `parts` are the tokens of its texts, which may be cut; the marks around them may not.
    """

    ids: list[int]
    map: TextMap
    types: list[int] | None = None
    parts: tuple[range, ...] = ()

    def cut(self, room: int, side: str) -> Row:
        """At most `room` tokens: the longer text loses tokens at this side, marks stay."""
        over = len(self.ids) - room
        if over <= 0:
            return self
        parts = list(self.parts)
        if over > sum(map(len, parts)) - 1:
            raise InputError(
                f"truncate={room}: a prompt needs {len(self.ids) - sum(map(len, parts))} tokens for marks alone"
            )
        for _ in range(over):
            longest = max(range(len(parts)), key=lambda i: len(parts[i]))
            parts[longest] = parts[longest][1:] if side == "left" else parts[longest][:-1]
        inside = {i for part in self.parts for i in part}
        kept = {i for part in parts for i in part}
        keep = [i for i in range(len(self.ids)) if i in kept or i not in inside]
        try:
            offsets: Offsets | None = [self.map.offsets[i] for i in keep]
        except InputError:
            offsets = None
        ids = [self.ids[i] for i in keep]
        return Row(
            ids,
            replace(self.map, ids=tuple(ids), known=offsets),
            None if self.types is None else [self.types[i] for i in keep],
        )


def read_row(tokenizer: Any, prompt: Any) -> Row:
    """One prompt as tokens. InputError for what is none."""
    if isinstance(prompt, Tensor | np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, Mapping):
        prompt = _field(prompt)
    if isinstance(prompt, Row):
        return prompt
    if isinstance(prompt, list | tuple) and all(is_id(i) for i in prompt):
        ids = [int(i) for i in prompt]
        if not ids:
            raise InputError("the prompt is empty: give at least one word")
        return Row(ids, TextMap(tokenizer, tuple(ids)), parts=(range(len(ids)),))
    if is_messages(prompt):
        prompt = Chat(prompt)
    if not isinstance(prompt, str | Pair | Chat):
        if isinstance(prompt, tuple) and len(prompt) == 2 and all(isinstance(text, str) for text in prompt):
            raise InputError(
                f"{prompt!r:.80} may be two prompts or a pair: write [a, b] for two, pl.Pair(a, b) for a pair"
            )
        raise InputError(f"a prompt must be a string or token ids, not {type(prompt).__name__}")
    if tokenizer is None:
        raise InputError(NO_TOKENIZER)
    row = _pair(tokenizer, prompt) if isinstance(prompt, Pair) else _text(tokenizer, prompt)
    if not row.ids or not any(map(len, row.parts)):
        raise InputError("the prompt is empty: give at least one word")
    return row


def is_id(value: Any) -> bool:
    """Whether this is a whole number (True and False are none)."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_)


def _field(row: Mapping[str, Any]) -> Any:
    """What to read of a row of a data set."""
    if "input_ids" in row:
        ids = torch.as_tensor(row["input_ids"]).tolist()
        mask = row.get("attention_mask")
        return ids if mask is None else [i for i, real in zip(ids, torch.as_tensor(mask).tolist(), strict=True) if real]
    if is_messages(row.get("messages")):
        return Chat(row["messages"], row.get("tools"))
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in texts or len(texts) == 1:
        return row["text" if "text" in texts else texts[0]]
    raise InputError(
        f"a row has no column 'text', and of its columns {', '.join(map(str, row))} "
        f"{'several are' if texts else 'none is'} text: give one column, such as [row['...'] for row in rows]"
    )


def _text(tokenizer: Any, prompt: str | Chat) -> Row:
    turns: tuple[tuple[str, int, int], ...] = ()
    if isinstance(prompt, Chat):
        text = prompt.render(tokenizer)
        turns = prompt.turns(tokenizer, text)
        ids = list(tokenizer(legible(text), add_special_tokens=False)["input_ids"])
        marked = bool(ids) and ids[0] in special_ids(tokenizer)
        return Row(ids, TextMap(tokenizer, tuple(ids), text, turns), parts=(range(int(marked), len(ids)),))
    made = tokenizer(legible(prompt))
    bare = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    whole, types = list(made["input_ids"]), made.get("token_type_ids")
    kept = once(whole, bare)
    ids = whole[kept]
    front, back = added_marks(ids, bare) if len(ids) >= len(bare) else (0, 0)
    row = Row(ids, TextMap(tokenizer, tuple(ids), prompt), parts=(range(front, len(ids) - back),))
    return replace(row, types=list(types)[kept]) if types and any(types) else row


def _pair(tokenizer: Any, pair: Pair) -> Row:
    """The tokenizer's own frame around two texts; they stand in one text with a space between them."""
    fast = getattr(tokenizer, "is_fast", False)
    options: dict[str, Any] = {"return_offsets_mapping": True} if fast else {}
    made = tokenizer(legible(pair.first), legible(pair.second), **options)
    ids, types = list(made["input_ids"]), made.get("token_type_ids")
    text, shift = f"{pair.first} {pair.second}", len(pair.first) + 1
    if not fast:
        row = Row(ids, TextMap(tokenizer, tuple(ids), text), parts=(range(len(ids)),))
    else:
        sides = made.sequence_ids()
        known = [(a + shift * (s == 1), b + shift * (s == 1)) if s is not None else (0, 0) for (a, b), s in
                 zip(made["offset_mapping"], sides, strict=True)]  # fmt: skip
        parts = tuple(range(at[0], at[-1] + 1) for n in (0, 1) if (at := [i for i, s in enumerate(sides) if s == n]))
        row = Row(ids, TextMap(tokenizer, tuple(ids), text, known=known), parts=parts)
    return replace(row, types=list(types)) if types and any(types) else row


def target_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text for a decoder, without marks; some tokenizers cut the target's language otherwise."""
    made = tokenizer(text_target=legible(text), add_special_tokens=False)
    return list(made["input_ids"])
