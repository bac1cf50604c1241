"""Does the verb agree with its subject? "The key to the cabinets" -> " is", not " are".

A noun of the other number (the attractor) stands between subject and verb: Linzen et al. 2016. The corrupted
prompt changes the number of the subject only. Score: logit(right form) - logit(wrong form). Words are our
own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from pellucid.errors import InputError
from pellucid.tasks.prompts import Draft, Prompts, assemble, words
from pellucid.tasks.tokens import answer_ids

REGULAR = words("""key book car dog cat teacher student doctor friend author farmer singer driver picture
letter door window table chair house garden road bridge river ship train tree flower bird horse king lawyer
guard worker writer painter""")
NOUNS = [(noun, f"{noun}s") for noun in REGULAR] + [("man", "men"), ("woman", "women"), ("child", "children")]
ATTRACTORS = [
    (noun, f"{noun}s") for noun in words("cabinet building table house neighbor teacher wall field tower doctor")
]
PLACES = ("near", "behind", "beside", "next to", "opposite")
VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))


def subject_verb_agreement(
    tokenizer: Any, n: int = 50, seed: int = 0, *, attractor: bool = True, masked: bool = False
) -> Prompts:
    """`n` pairs, half with a singular subject. Spans: subject, and attractor if there is one.

    InputError if fewer than five nouns have a singular and a plural of equal token length here.
    """

    length = {word: len(answer_ids(tokenizer, f" {word}")) for noun in NOUNS for word in noun}
    nouns = [(one, many) for one, many in NOUNS if length[one] == length[many]]
    if len(nouns) < 5:
        raise InputError(f"subject_verb_agreement: only {len(nouns)} nouns are as long in the plural, 5 are needed")
    template = "The {subject} {place} the {attractor}" if attractor else "Today the {subject}"
    drafts = _drafts(random.Random(seed), nouns, template)
    return assemble("subject_verb_agreement", drafts, tokenizer, n, seed=seed, masked=masked)


def _drafts(rng: random.Random, nouns: list[tuple[str, str]], template: str) -> Iterator[Draft]:
    while True:
        noun, attractor, verb = rng.choice(nouns), rng.choice(ATTRACTORS), rng.choice(VERBS)
        number = rng.randrange(2)  # 0 singular, 1 plural
        clean = {"subject": noun[number], "place": rng.choice(PLACES), "attractor": attractor[1 - number]}
        if attractor != noun:
            corrupted = clean | {"subject": noun[1 - number]}
            yield Draft(template, clean, corrupted, [verb[number]], [verb[1 - number]], tail=" a problem.")
