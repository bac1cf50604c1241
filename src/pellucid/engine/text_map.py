"""Which characters of a text does each token stand for, and which tokens stand for some characters?

The one place that maps text to tokens. A fast tokenizer says it itself (offset mappings); for a slow one, and for ids that
came without their text, the tokens are decoded one after another and laid over the text, comparing letters only: what a
tokenizer changes (case, accents, width, white space) does not matter. Where that does not work out, nothing is guessed.

Characters are counted in the text as it was given. A token that stands for a part of a character (a byte of an emoji)
covers that whole character, as in offset mappings; a mark that is not in the text covers nothing. No torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from pellucid.engine.marks import once, special_ids
from pellucid.errors import InputError, nearest

Offsets = list[tuple[int, int]]
NO_TOKENIZER = "this model was opened without a tokenizer: give token ids, or open it with tokenizer=..."
BROKEN = "�"  # what decoding shows for bytes that make no character


def legible(text: str) -> str:
    """The text. InputError for half of a character's two UTF-16 units, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start} of a text is half a character ({text[error.start]!a}, a lone surrogate): "
            "expected Unicode text; decode its source with errors='replace'"
        ) from None
    return text


def encode(tokenizer: Any, text: str, *, specials: bool = True) -> tuple[list[int], Offsets]:
    """Token ids and the [start, stop) characters of each; a mark that is not in the text has an empty range.

    InputError if the tokenizer gives no offsets (a slow one) and its tokens do not spell the text.
    """
    if tokenizer is None:
        raise InputError(NO_TOKENIZER)
    fast = getattr(tokenizer, "is_fast", False)
    options: dict[str, Any] = {"return_offsets_mapping": True} if fast else {}
    encoding = tokenizer(legible(text), add_special_tokens=specials, **options)
    ids = list(encoding["input_ids"])
    kept = once(ids, tokenizer(text, add_special_tokens=False)["input_ids"]) if specials else slice(None)
    ids = ids[kept]
    if not fast:
        return ids, laid_over(tokenizer, ids, text)
    return ids, _without_prefix(tokenizer, ids, text, [(a, b) for a, b in encoding["offset_mapping"][kept]])


def _without_prefix(tokenizer: Any, ids: Sequence[int], text: str, offsets: Offsets) -> Offsets:
    """Sentencepiece-like tokenizers put a space of their own before a text and say that it covers the first letter."""
    for k, ((a, b), after) in enumerate(pairwise(offsets)):
        if a < b and after[0] == a and text[a:b].strip() and not tokenizer.decode([ids[k]]).strip():
            offsets[k] = (a, a)
    return offsets


def covering(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """The [first, last + 1) tokens that touch the characters [start, stop); (0, 0) if none does.

    >>> covering([(0, 0), (0, 4), (4, 9), (9, 12)], 5, 9)
    (2, 3)
    """
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


# ---- tokens laid over a text


def letters(text: str, strict: bool = False) -> list[tuple[str, int]]:
    """What is left of a text when white space (and, unless `strict`, case, accents and width) does not count, with places.

    >>> letters("É ｘ")
    [('e', 0), ('x', 2)]
    """
    if strict:
        return [(c, i) for i, c in enumerate(text) if not c.isspace()]
    found = [(c, i) for i, each in enumerate(text) for c in unicodedata.normalize("NFKD", each).casefold()]
    return [(c, i) for c, i in found if not (c.isspace() or unicodedata.category(c) in ("Mn", "Cf"))]


def laid_over(tokenizer: Any, ids: Sequence[int], text: str) -> Offsets:
    """The characters of each token, found by decoding. InputError where the tokens do not spell the text."""
    try:
        return _laid_over(tokenizer, ids, text, True)
    except InputError:
        return _laid_over(tokenizer, ids, text, False)


def _laid_over(tokenizer: Any, ids: Sequence[int], text: str, strict: bool) -> Offsets:
    spelled, marks = letters(text, strict), special_ids(tokenizer)
    unknown = getattr(tokenizer, "unk_token_id", None)
    said = "".join(c for c, _ in spelled)
    covered: list[tuple[int, int]] = []  # in letters
    group: list[
        tuple[int, int]
    ] = []  # tokens that begin a character whose last byte is still to come, counted from `at`
    at = 0  # letters that are used
    guessed: list[int] = []  # unknown words, which cover what turns out to stand before the next known one
    ends = [i for _, i in spelled] + [len(text)]

    def settle(place: int) -> None:
        """What the unknown words cover: [at, place), a word each."""
        words = list(re.finditer(r"\S+", text[ends[at] : ends[place]]))
        if len(words) != len(guessed) > 1:
            raise lost(at)
        for n, k in enumerate(guessed):
            before = (
                [sum(ends[at] + edge > i for _, i in spelled[at:place]) for edge in words[n].span()]
                if words
                else [0, 0]
            )
            covered[k] = (at + before[0], at + before[1]) if len(guessed) > 1 else (at, place)
        guessed.clear()

    def lost(at: int) -> InputError:
        return InputError(
            f"cannot tell which characters the tokens stand for, from {text[ends[at] :][:20]!r} on: name token positions"
        )

    def decoded(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def plain(shown: str) -> str:
        return "".join(c for c, _ in letters(shown, strict))

    for k, token in enumerate(ids):
        if token in marks or token == unknown:
            covered += [(at, at + 1)] * len(group)
            group = []
            name = plain(tokenizer.convert_ids_to_tokens([token])[0])
            size = len(name) if name and said.startswith(name, at) else 0
            if token == unknown and not size:
                guessed.append(len(covered))
            covered.append((at, at + size))
            at += size
            continue
        first = k - len(group)
        alone = first == 0 or ids[first - 1] in marks or ids[first - 1] == unknown
        before = [] if alone else [ids[first - 1]]  # some tokens say that they go on a word only beside another
        shown, base = decoded([*before, *ids[first : k + 1]]), decoded(before) if before else ""
        new = plain(shown)[len(plain(base)) :]
        whole = new.rstrip(BROKEN)
        blank = not str(tokenizer.convert_ids_to_tokens([token])[0]).strip(" ▁Ġ")
        broken = (new != whole and not said.startswith(new, at)) or (shown == base and not blank)
        group.append((group[-1][1] - 1 if group else 0, len(whole) + 1 if broken else len(new)))
        if broken:
            continue
        place = said.find(new, at) if guessed and new else at
        if place < 0 or not said.startswith(new, place):
            raise lost(at)
        if guessed and new:
            settle(place)
        covered += [(place + min(a, len(new)), place + min(b, len(new))) for a, b in group]
        at, group = place + len(new), []
    if guessed:
        settle(len(said))
    covered += [(at, at + 1)] * len(group)
    return [(ends[a], ends[min(b, len(said)) - 1] + 1) if a < min(b, len(said)) else (ends[min(a, len(said))],) * 2
            for a, b in covered]  # fmt: skip


# ---- a text with its tokens


@dataclass(frozen=True)
class TextMap:
    """One prompt: its `text` as given and the ids of its real tokens; `turns` are the parts of a conversation.

    Of ids without text, the text is what they say. `turns` holds (role, start, stop) in characters.
    """

    tokenizer: Any
    ids: tuple[int, ...]
    given: str | None = None
    turns: tuple[tuple[str, int, int], ...] = ()
    known: Offsets | None = None  # offsets that the text alone would not give: of a pair, of what was cut

    @cached_property
    def text(self) -> str:
        if self.given is not None:
            return self.given
        if self.tokenizer is None:
            return " ".join(f"#{i}" for i in self.ids)
        return str(self.tokenizer.decode(list(self.ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @cached_property
    def offsets(self) -> Offsets:
        """The [start, stop) characters of each real token. InputError where that cannot be told."""
        if self.known is not None:
            return self.known
        ids = list(self.ids)
        if self.tokenizer is None:
            return [m.span() for m in re.finditer(r"\S+", self.text)]
        if getattr(self.tokenizer, "is_fast", False):
            for specials in (True, False):
                known, offsets = encode(self.tokenizer, self.text, specials=specials)
                place = next((k for k in range(len(known) - len(ids) + 1) if known[k : k + len(ids)] == ids), None)
                if place is not None:  # a part of them where the text was cut
                    return offsets[place : place + len(ids)]
        return laid_over(self.tokenizer, ids, self.text)

    def tokens(self, start: int, stop: int) -> range:
        """The positions whose tokens touch the characters [start, stop); those inside one token name that token."""
        if not 0 <= start < stop <= len(self.text):
            raise InputError(
                f"characters {start} to {stop} are outside the text, which has {len(self.text)}: expected 0 <= start < stop"
            )
        return range(*covering(self.offsets, start, stop))

    def find(self, wanted: str, inside: bool = True) -> tuple[int, int] | None:
        """The characters of the last occurrence of some text: as whole words, or else `inside` a word; None if there is none.

        Composed and decomposed accents are the same text.
        """
        found = list(occurrences(self.text, wanted))
        whole = [(a, b) for a, b in found if not (joined(self.text, a) or joined(self.text, b))]
        best = whole or (found if inside else [])
        return best[-1] if best else None

    def search(self, pattern: str | re.Pattern[str]) -> tuple[int, int]:
        """The characters of the last match of a regular expression. InputError if none matches."""
        try:
            found = [m.span() for m in re.finditer(pattern, self.text) if m.end() > m.start()]
        except re.error as error:
            raise InputError(f"cannot read the regular expression {pattern!r}: {error}") from error
        if not found:
            shown = pattern if isinstance(pattern, str) else pattern.pattern
            raise InputError(f"nothing in the prompt matches /{shown}/: {self.text[:200]!r}")
        return found[-1]

    def turn(self, role: str, number: int = -1) -> tuple[int, int]:
        """The characters of what a role said in a conversation: its last turn, or the `number`th."""
        said = [(a, b) for name, a, b in self.turns if name == role]
        if not said:
            raise InputError(f"nobody speaks as {role!r} here{nearest(role, dict.fromkeys(t[0] for t in self.turns))}")
        if not -len(said) <= number < len(said):
            raise InputError(f"'{role}[{number}]': {role!r} has {len(said)} turns here, counted from 0")
        return said[number]


def occurrences(text: str, wanted: str) -> Iterable[tuple[int, int]]:
    """Where some text stands, as [start, stop) characters; overlapping places too, composed or not.

    >>> list(occurrences("Café, Cafe\u0301", "Café"))
    [(0, 4), (6, 11)]
    """
    if not wanted:
        return
    spelled = [(c, i) for i, each in enumerate(text) for c in unicodedata.normalize("NFD", each)]
    flat, sought = "".join(c for c, _ in spelled), unicodedata.normalize("NFD", wanted)
    at = flat.find(sought)
    while at >= 0:
        yield spelled[at][1], spelled[at + len(sought) - 1][1] + 1
        at = flat.find(sought, at + 1)


def joined(text: str, at: int) -> bool:
    """Whether the characters on both sides of a place belong to one word: letters, digits and what combines with them.

    >>> joined("don't", 1), joined("a b", 1), joined("नमस्ते", 2)
    (True, False, True)
    """
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    word = [c == "_" or c == "‍" or unicodedata.category(c)[0] in "LNM" for c in (before, after)]
    return all(word) or unicodedata.category(after)[0] == "M"
