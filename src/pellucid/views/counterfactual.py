"""Which other prompt would the model answer differently, if the user names none?

A prompt that asks for a fact of `tasks.RELATIONS` (“The Eiffel Tower is located in the city of”) is asked of another
subject (“The Colosseum ...”) whose own answer the model gives. Otherwise one word of the prompt is replaced by another of the same kind and length in tokens: among the words the answer is most
sensitive to, each is tried with words whose embeddings lie near (for a word of several tokens: with near tokens, drawn
by a seed). Kept is the word whose replacements cost the answer most log-probability on average, and of its
replacements the one that makes another answer of the same kind most likely.

The second finds a contrast that works, not one that means what the reader has in mind: a report says how it was made.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pellucid.engine.given import Pair
from pellucid.engine.inputs import Inputs
from pellucid.engine.marks import special_ids
from pellucid.errors import InputError, PellucidError
from pellucid.tasks.tokens import encode
from pellucid.tasks.world import RELATIONS
from pellucid.views.question import ALONE, Question

WORDS, TRIES, SEED = 5, 16, 0
TOKENS = 2000  # read in all: long prompts are tried with fewer words


@dataclass(frozen=True)
class Word:
    """A word of the prompt: its characters and its tokens, [start, stop) both."""

    text: str
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Made:
    prompt: str
    how: str
    known: bool = False  # it has a meaning of its own, and was not chosen because it works


def make(question: Question) -> Made | None:
    """A counterfactual for the question; None where no word can be replaced or no replacement changes anything."""
    if question.target is None or question.kind in (*ALONE, "label") or isinstance(question.prompt, Pair):
        return None
    return known(question) or searched(question)


def known(question: Question) -> Made | None:
    """The same question about another subject of a relation, where the model gives that subject's own answer."""
    assert question.target is not None
    answered, tokenizer = question.target.text.strip(), question.model.tokenizer
    ids = encode(tokenizer, question.text)[0]
    for relation in RELATIONS.values():
        for subject, answer in relation.pairs:
            match = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", question.text)
            word = match and answered and answer.startswith(answered) and _word(question, match)
            if not word:
                continue
            # a name that says its answer (the Sydney Opera House) would be copied, not known
            others = [(o, its) for o, its in relation.pairs if not its.startswith(answered) and its not in o]
            asked = [(text, o, its) for o, its in others if (text := _aligned(question, ids, word, o))]
            p = _answers(question, [text for text, _, _ in asked]) if asked else torch.zeros(0, 1)
            said = [tokenizer.decode([i]).strip() for i in p.argmax(-1).tolist()]
            right = [i for i, (_, _, its) in enumerate(asked) if said[i] and its.startswith(said[i])]
            if right:
                text, other, its = asked[max(right, key=lambda i: float(p[i].max()))]
                return Made(
                    text,
                    f"“{subject}” was replaced by “{other}”, whose own answer, “{its}”, the model gives",
                    known=True,
                )
    return None


def searched(question: Question) -> Made | None:
    """One word among those the answer rests on, replaced by a word of its kind."""
    assert question.target is not None
    vocabulary = Vocabulary.of(question)
    rows = max(8, TOKENS // len(question.tokens))
    count = max(1, min(WORDS, rows // TRIES))
    tries = min(TRIES, rows // count)
    # not the word the answer is read after: replacing it would only show the last step
    inner = [w for w in words_of(question) if not w.first <= question.position < w.last]
    some = sorted(inner, key=_sensitivity(question), reverse=True)[:count]
    best: tuple[float, list[str], Tensor, Word] | None = None
    for word in some:
        texts = list(islice(_replaced(question, word, vocabulary), tries))
        if not texts:
            continue
        p = _answers(question, texts)
        drop = -float(p[:, question.target.id].clamp_min(1e-12).log().mean())
        if best is None or drop > best[0]:
            if _best(question, p, vocabulary) is None and best is not None:
                continue
            best = (drop, texts, p, word)
    if best is None:
        return None
    _, texts, p, word = best
    chosen = _best(question, p, vocabulary)
    chosen = int(p[:, question.target.id].argmin()) if chosen is None else chosen
    if float(p[chosen, question.target.id]) > 0.8 * question.target.probability:
        return None
    new = _word_of(texts[chosen], question.text, word)
    return Made(
        texts[chosen],
        f"“{word.text}” was replaced by “{new}”, found among replacements of {len(some)} words and chosen because it changes the answer",
    )


def words_of(question: Question) -> list[Word]:
    """The words of the prompt that have tokens of their own."""
    return [word for match in re.finditer(r"[^\W_]+", question.text) if (word := _word(question, match))]


def _word(question: Question, match: re.Match[str]) -> Word | None:
    _, offsets = encode(question.model.tokenizer, question.text)
    tokens = [i for i, (a, b) in enumerate(offsets) if a < match.end() and b > match.start()]
    inside = tokens and offsets[tokens[-1]][1] == match.end() and offsets[tokens[0]][0] >= match.start() - 1
    return Word(match[0], match.start(), match.end(), tokens[0], tokens[-1] + 1) if inside else None


def _aligned(question: Question, ids: list[int], word: Word, other: str) -> str | None:
    """The prompt, of these `ids`, with `other` in the word's place, if it is cut into as many tokens and alike everywhere else."""
    text = question.text[: word.start] + other + question.text[word.stop :]
    new = encode(question.model.tokenizer, text)[0]
    same = len(new) == len(ids) and new[: word.first] == ids[: word.first] and new[word.last :] == ids[word.last :]
    return text if same else None


def _sensitivity(question: Question) -> Any:
    """How strongly the answer reacts to a word's embeddings: the size of the gradient there."""
    site = f"{question.prefix}embed"
    target = question.target
    assert target is not None

    def answer(logits: Tensor) -> Tensor:
        return logits[:, question.position_in(logits)].float().log_softmax(-1)[:, target.id]

    size = question.model.run(question.inputs, keep=[site], grad_of=answer).grad(site)[0].norm(dim=-1)
    return lambda word: float(size[word.first : word.last].norm())


def _replaced(question: Question, word: Word, vocabulary: Vocabulary) -> Iterator[str]:
    """Prompts with another word in its place that are cut into as many tokens, and alike everywhere else."""
    ids = encode(question.model.tokenizer, question.text)[0]
    near = [vocabulary.near(i) for i in ids[word.first : word.last]]
    if not all(near):
        return
    draw = random.Random(SEED)
    tried = [[n] for n in near[0]] if len(near) == 1 else ([draw.choice(n) for n in near] for _ in range(4 * TRIES))
    found = set()
    for bodies in tried:
        text = _aligned(question, ids, word, "".join(bodies))
        if text and text not in found:
            found.add(text)
            yield text


def _answers(question: Question, texts: list[str]) -> Tensor:
    """Probabilities [text, vocabulary] of the answer."""
    model, rows = question.model, max(1, 1024 // len(question.tokens))
    found = []
    for i in range(0, len(texts), rows):
        inputs = model.inputs(texts[i : i + rows])
        some = {"logits_to_keep": -question.last_first} if question.kind == "next token" else {}
        with torch.no_grad():
            logits = model.run({**inputs.tensors, **some}).logits
        found.append(logits[:, question.position_in(logits)].float().softmax(-1))
    return torch.cat(found)


def _best(question: Question, p: Tensor, vocabulary: Vocabulary) -> int | None:
    """The replacement after which another answer of the target's kind leads most clearly."""
    assert question.target is not None
    scores = [
        float(row[top] - row[question.target.id]) if vocabulary.alike(top, question.target.id) else -1.0
        for row, top in zip(p, p.argmax(-1).tolist(), strict=True)
    ]
    best = max(range(len(scores)), key=scores.__getitem__)
    return best if scores[best] > 0 else None


def _word_of(text: str, prompt: str, word: Word) -> str:
    return text[word.start : len(text) - (len(prompt) - word.stop)]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a vocabulary by kind (starts a word, capital, letters, digits) and by embedding."""

    bodies: list[str]
    kinds: list[tuple[bool, ...]]
    embeddings: Tensor

    @classmethod
    def of(cls, question: Question) -> Vocabulary:
        try:
            weight = question.model.module.get_input_embeddings().weight  # type: ignore[operator]
        except (AttributeError, NotImplementedError) as error:
            raise InputError("this model has no table of input embeddings to find near words in") from error
        pieces = question.model.tokenizer.convert_ids_to_tokens(range(len(question.model.tokenizer)))
        pieces = [str(p or "") for p in pieces][: len(weight)]
        bodies = [re.sub(r"^(##|[▁Ġ])|</w>$", "", p) for p in pieces]
        kinds: list[tuple[bool, ...]] = [
            (
                p.startswith(("▁", "Ġ")),
                p.startswith("##"),
                p.endswith("</w>"),
                b[:1].isupper(),
                b.isalpha(),
                b.isdigit(),
                len(b) > 2,
            )
            for p, b in zip(pieces, bodies, strict=True)
        ]
        return cls(bodies, kinds, weight.detach())

    def alike(self, a: int, b: int) -> bool:
        return a != b and self.kinds[a][:-1] == self.kinds[b][:-1]

    def near(self, i: int) -> list[str]:
        """Bodies of the tokens of the same kind whose embeddings point most nearly the same way."""
        same = [
            j
            for j, kind in enumerate(self.kinds)
            if kind == self.kinds[i] and self.bodies[j].lower() != self.bodies[i].lower()
        ]
        if not same or not self.bodies[i].isalnum():
            return []
        close = torch.cosine_similarity(self.embeddings[same].float(), self.embeddings[i].float()[None])
        return [self.bodies[same[int(j)]] for j in close.argsort(descending=True)[:TRIES]]


def made(question: Question) -> Made | None:
    """`make`, but None where the model or its tokenizer does not allow it: a report goes on without."""
    try:
        return make(question)
    except (PellucidError, RuntimeError):  # torch's own: no gradient through this model's code
        return None


# ---- prompts that have nothing to do with this one

TEXTS = (
    "The two of them walked along the river in the evening and talked about the boats that had come in that week.",
    "If the water is too cold for the yeast, the dough will rise slowly, and the bread needs an hour more in the oven.",
    "She opened the old letter again, read it twice, and put it back between the books on the lowest shelf.",
)


def unrelated(question: Question) -> list[Inputs]:
    """One prompt of equal length from each of `TEXTS`, special tokens left in their places.

    They are the controls of a report: what a method finds on them, or with their states, it does not find because of what
    this prompt says.
    """
    tokenizer, ids = question.model.tokenizer, question.source.ids[0].tolist()
    special = special_ids(tokenizer)
    made = []
    for text in TEXTS:
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
        fresh = iter(words * (1 + len(ids) // max(1, len(words))))
        made.append(question.model.inputs([[i if i in special else next(fresh) for i in ids]]))
    return made
