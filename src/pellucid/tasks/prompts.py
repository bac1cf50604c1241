"""Which two prompts differ in exactly one fact, for this tokenizer?

`Prompts` holds pairs of a clean and a corrupted prompt of equal token length, which differ only where
intended, with the right and wrong answers of the clean one and named token spans. A task is a stream of
`Draft`s; `assemble` keeps those that the tokenizer cuts alike. `Prompts.from_pairs` checks pairs of your own.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from pellucid.errors import InputError
from pellucid.tasks.tokens import continuation, covering, encode, pieces

if TYPE_CHECKING:
    import pandas as pd

    from pellucid.metrics import Metric

Span = tuple[int, int]
Answer = str | list[str]
LISTS = ("clean", "corrupted", "answers", "wrong", "answer_ids", "wrong_ids")


@dataclass(frozen=True)
class Prompts:
    """Aligned pairs of prompts, one list entry per pair; `prompts[3]` and `prompts[3:6]` are Prompts again.

    clean, corrupted: texts of equal token length, with the special tokens this tokenizer adds by default.
    answers, wrong: what should and should not follow the clean prompt (or fill its mask): a text or several.
    answer_ids, wrong_ids: their token ids in that place, [pair][alternative][token].
    spans: name -> [first, last + 1) tokens per pair, special tokens counted, padding not; the same in both.
    position: where the answer is read, counted from the end: -1, or the mask. A causal model whose tokenizer
        ends every text with a special token needs `metric(position=-2)`.
    """

    name: str
    clean: list[str]
    corrupted: list[str]
    answers: list[Answer]
    wrong: list[Answer]
    answer_ids: list[list[list[int]]] = field(repr=False)
    wrong_ids: list[list[list[int]]] = field(repr=False)
    spans: dict[str, list[Span]] = field(repr=False)
    seed: int | None = None
    position: int = -1
    score: str = "logit_difference"
    forced: bool = False

    @classmethod
    def from_pairs(
        cls,
        clean: Sequence[str],
        corrupted: Sequence[str],
        answers: Sequence[Answer],
        wrong: Sequence[Answer],
        tokenizer: Any,
        *,
        name: str = "pairs",
    ) -> Prompts:
        """Your own pairs, checked; put the mask token where a masked model should answer.

        The span "changed" covers the tokens that differ. InputError names the first pair that does not align,
        both lengths and the tokens from the first difference on.
        """
        sizes = {len(clean), len(corrupted), len(answers), len(wrong)}
        if len(sizes) > 1 or sizes == {0}:
            raise InputError(
                f"got {len(clean)} clean, {len(corrupted)} corrupted, {len(answers)} answers, {len(wrong)} "
                "wrong: expected one of each per pair"
            )
        pairs = [
            cls(name, [a], [b], [right], [bad], [_ids(right, a, b, tokenizer)], [_ids(bad, a, b, tokenizer)],
                {"changed": [_changed(i, a, b, tokenizer)]}, position=_position(a, tokenizer))
            for i, (a, b, right, bad) in enumerate(zip(clean, corrupted, answers, wrong, strict=True))
        ]  # fmt: skip
        return _joined(pairs)

    def __repr__(self) -> str:
        """The first pair, and how many there are: a task of 1,000 prompts is not for a terminal."""
        first = (
            f"; {self.clean[0]!r} / {self.corrupted[0]!r}, {self.answers[0]!r} against {self.wrong[0]!r}"
            if self.clean
            else ""
        )
        return f"<Prompts {self.name}: {len(self)} pairs{first}>"

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, which: int | slice) -> Prompts:
        if isinstance(which, int):
            which = range(len(self))[which]  # IndexError past the end, which also ends a for loop
            which = slice(which, which + 1)
        cut: dict[str, Any] = {name: getattr(self, name)[which] for name in LISTS}
        return replace(self, **cut, spans={name: span[which] for name, span in self.spans.items()})

    @property
    def place(self) -> int | None:
        """`position` where it was chosen; None for the default, which is where the model answers such prompts."""
        return None if self.position == -1 else self.position

    @property
    def single_token(self) -> bool:
        """Whether every answer, right or wrong, is one token in its place."""
        return all(len(ids) == 1 for ids in chain.from_iterable(self.answer_ids + self.wrong_ids))

    def teacher_forced(self) -> Prompts:
        """The same pairs with the clean answer appended to both prompts, for answers of several tokens."""
        if self.forced or self.position != -1 or any(len(ids) != 1 for ids in self.answer_ids):
            raise InputError("expected causal prompts with one right answer each that are not yet forced")
        texts = [answer if isinstance(answer, str) else answer[0] for answer in self.answers]
        clean = [prompt + text for prompt, text in zip(self.clean, texts, strict=True)]
        corrupted = [prompt + text for prompt, text in zip(self.corrupted, texts, strict=True)]
        return replace(self, clean=clean, corrupted=corrupted, forced=True)

    def metric(self, position: int | None = None) -> Metric:
        """The natural score of this task on its clean answers, read at `position` (default: `self.position`).

        Answers of several tokens are scored as a sequence, on the prompts that `teacher_forced()` returns.
        """
        from pellucid import metrics

        if self.forced:
            return metrics.sequence_log_probability([ids[0] for ids in self.answer_ids])
        if not self.single_token:
            raise InputError(f"{self.name}: some answers have several tokens, use prompts.teacher_forced()")
        right = [[ids[0] for ids in each] for each in self.answer_ids]
        wrong = [[ids[0] for ids in each] for each in self.wrong_ids]
        make: Callable[..., Metric] = getattr(metrics, self.score)
        return make(right, wrong, position=self.place if position is None else position)

    def table(self) -> pd.DataFrame:
        """One row per pair: clean, corrupted, answers, wrong, and every span."""
        import pandas as pd

        texts = {name: getattr(self, name) for name in ("clean", "corrupted", "answers", "wrong")}
        return pd.DataFrame({**texts, **self.spans})


@dataclass(frozen=True)
class Draft:
    """A pair before any tokenizer has seen it: both sides fill the gaps of `template`; a gap becomes a span.

    `tail` is what follows the answer where it is masked; a causal prompt ends before the answer.
    """

    template: str
    clean: dict[str, str]
    corrupted: dict[str, str]
    answers: list[str]
    wrong: list[str]
    tail: str = "."


def assemble(
    name: str,
    drafts: Iterator[Draft],
    tokenizer: Any,
    n: int,
    *,
    seed: int,
    masked: bool = False,
    single_token: bool = True,
    score: str = "logit_difference",
) -> Prompts:
    """The first `n` distinct drafts that this tokenizer aligns and whose answers it can express.

    InputError if the stream (or a patience of 40 drafts per prompt) ends before, with what was in the way.
    """
    if n < 1:
        raise InputError(f"{name}: asked for {n} prompts, expected at least 1")
    if masked and not tokenizer.mask_token:
        raise InputError(f"{name}: masked=True needs a mask token, and this tokenizer has none: leave it out")
    if masked and not single_token:
        raise InputError(f"{name}: one mask holds one token: use single_token=True with masked=True")
    found: dict[tuple[str, str], Prompts] = {}
    rejected: Counter[str] = Counter()
    for _, draft in zip(range(400 + 40 * n), drafts, strict=False):
        pair = _pair(draft, tokenizer, masked=masked, single_token=single_token)
        if isinstance(pair, str):
            rejected[pair] += 1
        else:
            found[pair.clean[0], pair.corrupted[0]] = pair
        if len(found) == n:
            return _joined(list(found.values()), name=name, seed=seed, score=score)
    causes = ", ".join(f"{count} {cause}" for cause, count in rejected.most_common()) or "no more candidates"
    raise InputError(f"{name}: this tokenizer allows only {len(found)} of {n} prompts ({causes}); ask for fewer")


def words(text: str) -> list[str]:
    """A word list, parted by spaces or lines."""
    return text.split()


def rows(table: str) -> list[tuple[str, ...]]:
    """The lines of a word list, their columns parted by commas."""
    return [tuple(line.strip().split(",")) for line in table.splitlines()]


def fill(template: str, values: dict[str, str]) -> tuple[str, dict[str, Span]]:
    """The filled template, and the characters of every gap.

    >>> fill("The {noun} sat", {"noun": "cat"})
    ('The cat sat', {'noun': (4, 7)})
    """
    text, places = "", {}
    for literal, gap, _, _ in string.Formatter().parse(template):
        text += literal
        if gap:
            places[gap] = (len(text), len(text) + len(values[gap]))
            text += values[gap]
    return text, places


def _pair(draft: Draft, tokenizer: Any, *, masked: bool, single_token: bool) -> Prompts | str:
    """One aligned pair, or the reason why this draft is none."""
    after = f" {tokenizer.mask_token}{draft.tail}" if masked else ""
    head, places = fill(draft.template + after, draft.clean)
    other, other_places = fill(draft.template + after, draft.corrupted)
    ids, offsets = encode(tokenizer, head)
    other_ids, other_offsets = encode(tokenizer, other)
    spans = {gap: covering(offsets, *place) for gap, place in places.items()}
    other_spans = {gap: covering(other_offsets, *place) for gap, place in other_places.items()}
    if len(ids) != len(other_ids) or spans != other_spans:
        return "of unequal token length"
    changed = [span for gap, span in spans.items() if draft.clean[gap] != draft.corrupted[gap]]
    meant = {i for span in changed for i in range(*span)}
    differ = {i for i, (a, b) in enumerate(zip(ids, other_ids, strict=True)) if a != b}
    if not differ or not differ <= meant:
        return "not differing just where intended"
    if any(tokenizer.unk_token_id in side[slice(*span)] for span in spans.values() for side in (ids, other_ids)):
        return "with an unknown word"
    try:
        right, wrong = (_ids(answers, head, other, tokenizer) for answers in (draft.answers, draft.wrong))
    except InputError:
        return "with an unknown answer"
    if single_token and any(len(each) > 1 for each in right + wrong):
        return "with an answer of several tokens"
    if any(each in wrong for each in right):
        return "with answers alike for it"
    texts: list[Answer] = [side[0] if len(side) == 1 else side for side in (draft.answers, draft.wrong)]
    marks, position = {gap: [span] for gap, span in spans.items()}, _position(head, tokenizer)
    return Prompts("", [head], [other], texts[:1], texts[1:], [right], [wrong], marks, position=position)


def _joined(pairs: list[Prompts], **common: Any) -> Prompts:
    """Many Prompts of one pair as one."""
    if len({pair.position for pair in pairs}) > 1:
        raise InputError("the mask is not equally far from the end in all prompts: end them alike")
    joined: dict[str, Any] = {name: [x for pair in pairs for x in getattr(pair, name)] for name in LISTS}
    spans = {gap: [pair.spans[gap][0] for pair in pairs] for gap in pairs[0].spans}
    return replace(pairs[0], **joined, **common, spans=spans)


def _position(prompt: str, tokenizer: Any) -> int:
    """Where the answer is read, from the end: the mask if there is one, otherwise the last token."""
    ids, _ = encode(tokenizer, prompt)
    return ids.index(tokenizer.mask_token_id) - len(ids) if tokenizer.mask_token_id in ids else -1


def _ids(answers: Answer, clean: str, corrupted: str, tokenizer: Any) -> list[list[int]]:
    """The token ids of each answer in its place. InputError if one has no tokens of its own there."""
    return [
        _own(answer, clean, corrupted, tokenizer) for answer in ([answers] if isinstance(answers, str) else answers)
    ]


def _own(answer: str, clean: str, corrupted: str, tokenizer: Any) -> list[int]:
    mask = tokenizer.mask_token or "\0"
    head, masked, tail = clean.partition(mask)
    if masked and head.endswith(" "):
        head, answer = head.rstrip(" "), " " + answer.lstrip(" ")
    ids = continuation(tokenizer, head, answer, tail)
    if masked and len(ids) > 1:
        raise InputError(f"{answer!r} is {len(ids)} tokens, and one mask holds one: choose a shorter answer")
    if len(ids) > 1 and ids != continuation(tokenizer, corrupted, answer):
        ids = []
    if not ids or tokenizer.unk_token_id in ids:
        cut = " ".join(map(repr, pieces(tokenizer, head + answer + tail, specials=False)[-4:]))
        raise InputError(
            f"{answer!r} has no tokens of its own after {head!r} (cut as ... {cut}); start it with a space"
        )
    return ids


def _changed(i: int, clean: str, corrupted: str, tokenizer: Any) -> Span:
    """The tokens of pair `i` from the first to the last that differ."""
    (a, _), (b, _) = encode(tokenizer, clean), encode(tokenizer, corrupted)
    if a == b:
        raise InputError(f"pair {i}: the clean and the corrupted prompt are the same {len(a)} tokens")
    differ = [j for j, (x, y) in enumerate(zip_longest(a, b)) if x != y]
    if len(a) == len(b):
        return differ[0], differ[-1] + 1
    near = slice(max(differ[0] - 1, 0), differ[0] + 3)
    cut = [" ".join(map(repr, pieces(tokenizer, text)[near])) for text in (clean, corrupted)]
    raise InputError(
        f"pair {i} does not align: clean has {len(a)} tokens and corrupted {len(b)}; "
        f"from token {differ[0]} on clean is ... {cut[0]} ... and corrupted ... {cut[1]} ...; "
        "choose words of equal token length"
    )
