"""Which years are later? "The war lasted from the year 1732 to the year 17" -> "33" ... "99".

Hanna et al. 2023, "How does GPT-2 compute greater-than?": the score is the probability of all later years
minus that of all others; the corrupted prompt starts in the year 01, so that every later year is right. Event
nouns are our own.

Tokenizers cut numbers differently, so the answer takes the first form that this one has as single tokens:

    two digits    "... 1732 to the year 17" -> "45"
    whole years   "... 1732 to the year"    -> " 1745"
    three digits  "... 732 to the year "    -> "745"      (digits in threes, the space a token of its own)
    one digit     "... 1732 to the year 17" -> "4"        (decades: the starting one counts for neither side)
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pellucid.errors import InputError
from pellucid.tasks.prompts import Draft, Prompts, assemble, words
from pellucid.tasks.tokens import continuation

EVENTS = words("""war siege reign campaign drought truce voyage strike rebellion dynasty plague famine
alliance project festival expedition occupation trial exile revolution""")


@dataclass(frozen=True)
class Form:
    """How years are written and asked for: `end` closes the prompt, `answer` is what may follow."""

    century: str
    end: str
    answer: str  # a format of the year within its century
    decades: bool = False

    @property
    def template(self) -> str:
        return "The {event} lasted from the year {century}{year} to the year" + self.end

    def value(self, year: int) -> int:
        return year // 10 if self.decades else year

    def choices(self) -> dict[int, str]:
        return {v: self.answer.format(v) for v in range(10 if self.decades else 100)}


def _forms(century: int) -> list[Form]:
    two = str(century)
    return [
        Form(two, f" {two}", "{:02d}"),
        Form(two, "", f" {two}{{:02d}}"),
        Form(two[-1], " ", f"{two[-1]}{{:02d}}"),
        Form(two, f" {two}", "{}", decades=True),
    ]


def greater_than(tokenizer: Any, n: int = 50, seed: int = 0, *, century: int = 17, masked: bool = False) -> Prompts:
    """`n` pairs. Spans: event, century, year (its last two digits; like century where years are whole).

    InputError if this tokenizer has years in none of the four forms (masked: as whole years).
    """
    if not 11 <= century <= 19:
        raise InputError(f"century {century}: expected the first two digits of a year, 11 to 19")
    for form in _forms(century)[1:2] if masked else _forms(century):
        known = _known(form, tokenizer)
        if masked or len(known) * 2 > len(form.choices()):
            drafts = _drafts(random.Random(seed), form, known)
            score = "probability_difference"
            return assemble("greater_than", drafts, tokenizer, n, seed=seed, masked=masked, score=score)
    raise InputError("greater_than: no years, three digits, two digits or digits are single tokens here")


def _known(form: Form, tokenizer: Any) -> dict[int, str]:
    """The choices that are one known token at the end of the prompt."""
    head = form.template.format(event="war", century=form.century, year="32")
    cut = {value: continuation(tokenizer, head, answer) for value, answer in form.choices().items()}
    fits = [value for value, ids in cut.items() if len(ids) == 1 and ids != [tokenizer.unk_token_id]]
    return {value: form.choices()[value] for value in fits}


def _drafts(rng: random.Random, form: Form, known: dict[int, str]) -> Iterator[Draft]:
    starts = [y for y in range(2, 98) if min(known, default=99) < form.value(y) < max(known, default=0)]
    while starts:
        year = rng.choice(starts)
        start = form.value(year)
        later = [text for value, text in known.items() if value > start]
        rest = [text for value, text in known.items() if value < start + (not form.decades)]
        clean = {"event": rng.choice(EVENTS), "century": form.century, "year": f"{year:02d}"}
        yield Draft(form.template, clean, clean | {"year": "01"}, later, rest)
