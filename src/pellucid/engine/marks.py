"""Which tokens are marks and no text, and how is a text that already holds some of them cut?

A mark is every token that the tokenizer calls special: by its role (bos, eos, pad, cls, sep, mask, ...) or as an added
token with `special=True`, as headers of chat templates are. The unknown token stands for a word, so it is no mark,
unless the tokenizer uses it for another role as well (in GPT-2's, unk = bos = eos = <|endoftext|>) or makes it of no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RARE = "ꙮ 𒀱 🜏"
ROLES = ("bos", "eos", "cls", "sep", "mask")  # what is padded with unk is still read as a word where it is not padding


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of all marks; none without a tokenizer."""
    if tokenizer is None:
        return frozenset()
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    found = {*getattr(tokenizer, "all_special_ids", ()), *(i for i, t in added.items() if getattr(t, "special", False))}
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown not in {getattr(tokenizer, f"{role}_token_id", None) for role in ROLES} and says_unknown(tokenizer):
        found.discard(unknown)
    return frozenset(int(i) for i in found)


def says_unknown(tokenizer: Any) -> bool:
    """Whether any text becomes the unknown token: letters that no small vocabulary has. Byte-level tokenizers spell
    everything, and what they name "unknown" (SmolLM2: its end of text) is a mark like others."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    return unknown is not None and unknown in tokenizer(RARE, add_special_tokens=False)["input_ids"]


def added_marks(ids: Sequence[int], bare: Sequence[int]) -> tuple[int, int]:
    """How many tokens were put before and behind a text, from its ids with and without marks.

    >>> added_marks([1, 5, 6, 2], [5, 6])
    (1, 1)
    """
    extra = len(ids) - len(bare)
    front = next((k for k in range(extra + 1) if list(ids[k : k + len(bare)]) == list(bare)), 0)
    return front, extra - front


def once(ids: Sequence[int], bare: Sequence[int]) -> slice:
    """The part of `ids` in which no mark that the text begins or ends with already is put there again.

    >>> once([1, 1, 5], [1, 5]), once([1, 5], [5])
    (slice(1, 3, None), slice(0, 2, None))
    """
    if len(bare) == 0 or len(ids) <= len(bare):
        return slice(0, len(ids))
    front, back = added_marks(ids, bare)
    end = len(ids) - back
    again = front and list(bare[:front]) == list(ids[:front])
    twice = back and list(bare[-back:]) == list(ids[end:])
    return slice(front if again else 0, end if twice else len(ids))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text with the marks this tokenizer puts around it, each once."""
    ids = list(tokenizer(text)["input_ids"])
    if not any(i in special_ids(tokenizer) for i in ids):
        return ids
    return ids[once(ids, tokenizer(text, add_special_tokens=False)["input_ids"])]


def trailing_marks(tokenizer: Any, ids: Sequence[int]) -> int:
    """How many marks at the end of a prompt are those that this tokenizer puts behind every text."""
    if tokenizer is None or not ids or ids[-1] not in special_ids(tokenizer):
        return 0
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    back = added_marks(whole, bare)[1]
    return back if 0 < back < len(ids) and list(ids[-back:]) == list(whole[len(whole) - back :]) else 0


def ordinary_ids(tokenizer: Any, size: int) -> list[int]:
    """The ids below `size` that stand for text: what random tokens are drawn from. Not the unknown token."""
    if tokenizer is None:
        return list(range(size))
    without = special_ids(tokenizer) | {tokenizer.unk_token_id}
    return [i for i in range(min(size, len(tokenizer))) if i not in without]
