"""How does this tokenizer cut that text?

Everything here asks the tokenizer itself, through offset mappings, and assumes nothing about its family:
byte-level BPE, WordPiece, sentencepiece-like and word-level ones all answer. No torch.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from pellucid.engine.text_map import covering as covering
from pellucid.engine.text_map import encode as encode
from pellucid.errors import InputError

# What may stand before an answer when no prompt is at hand. A text that begins with a space follows a word;
# any other is tried after marks that hardly any tokenizer glues to what comes next.
ANCHORS = {True: ("a", "."), False: (".", "\n", ":", "a")}


def pieces(tokenizer: Any, text: str, *, specials: bool = True) -> list[str]:
    """The text of every token, a special token by its name: how to show a cut to a person."""
    ids, offsets = encode(tokenizer, text, specials=specials)
    names = tokenizer.convert_ids_to_tokens(ids)
    return [text[a:b] if a < b else name for name, (a, b) in zip(names, offsets, strict=True)]


def continuation(tokenizer: Any, head: str, answer: str, tail: str = "") -> list[int]:
    """The ids of `answer` between `head` and `tail`; empty if it has no tokens of its own there.

    That is so when a token straddles a border, or when the answer changes how `head` is cut: a model that has
    read `head` cannot give this answer.
    """
    ids, offsets = encode(tokenizer, head + answer + tail, specials=False)
    start, stop = len(head), len(head) + len(answer)
    first, last = covering(offsets, start, stop)
    if first == last or offsets[first][0] < start or offsets[last - 1][1] > stop:
        return []
    return ids[first:last] if ids[:first] == encode(tokenizer, head, specials=False)[0] else []


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """The ids of `answer` as it stands in running text: " Paris" after a word, "53" right after other marks.

    Encoding the text alone would differ: sentencepiece-like tokenizers put a space of their own before it.
    """
    if not answer:
        raise InputError("an answer is an empty string: give the text that should come next, e.g. ' Paris'")
    anchored = (continuation(tokenizer, anchor, answer) for anchor in ANCHORS[answer.startswith(" ")])
    return next(filter(None, anchored), None) or encode(tokenizer, answer, specials=False)[0]


def single_id(tokenizer: Any, answer: str | int) -> int:
    """The id of `answer` (an id is its own). InputError if it is not one known token, with its pieces.

    Warns where a word has another token after a space, which is what follows a prompt that ends in a word.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < 2**31:
            raise InputError(f"token id {answer} is {'negative' if answer < 0 else 'too large'}; ids count from 0")
        return answer
    if not isinstance(answer, str):
        raise InputError(f"{answer!r} is no answer: give a text such as ' Paris' or a token id")
    ids = answer_ids(tokenizer, answer)
    if len(ids) == 1 and (ids != [tokenizer.unk_token_id] or answer == tokenizer.unk_token):
        if answer[0].isalnum() and len(after := answer_ids(tokenizer, f" {answer}")) == 1 and after != ids:
            warnings.warn(
                f"{answer!r} and {' ' + answer!r} are different tokens: after a word it is the second", stacklevel=2
            )
        return ids[0]
    if len(ids) == 1:
        raise InputError(f"{answer!r} is unknown to this tokenizer; choose a word of its vocabulary")
    cut = " ".join(map(repr, pieces(tokenizer, answer, specials=False)))
    respaced = answer[1:] if answer.startswith(" ") else f" {answer}"
    fits = respaced and len(answer_ids(tokenizer, respaced)) == 1
    other = f", or {respaced!r}, which is one token" if fits else ""
    raise InputError(
        f"{answer!r} is {len(ids)} tokens here ({cut}) where one is read: "
        f"use sequence_log_probability({answer!r}) on the prompt with the answer appended{other}"
    )


def texts(tokenizer: Any, ids: Any) -> np.ndarray:
    """What each id says by itself, in the shape of `ids`; its number where there is no tokenizer.

    >>> texts(None, [[3, 17]]).tolist()
    [['#3', '#17']]
    """
    ids = np.asarray(ids, dtype=int)
    text = {i: f"#{i}" if tokenizer is None else str(tokenizer.decode([i])) for i in np.unique(ids).tolist()}
    return np.array([text[i] for i in ids.ravel().tolist()], dtype=object).reshape(ids.shape)
