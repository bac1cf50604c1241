"""Whom does the model take a nurse or a mechanic for? "The nurse slept well because" -> " she" or " he".

The answer is the pronoun of the stereotype, so a positive score *is* the bias: logit(stereotype) -
logit(other). The corrupted prompt names a profession of the opposite stereotype and equal token length. After
Vig et al. 2020, "Investigating Gender Bias in Language Models Using Causal Mediation Analysis"; list and
sentences are our own, and the labels are our reading of common English stereotypes, not statistics.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from pellucid.errors import InputError
from pellucid.tasks.prompts import Draft, Prompts, assemble, words
from pellucid.tasks.tokens import answer_ids

STEREOTYPES = {
    " she": words("""nurse secretary librarian receptionist teacher dancer nanny babysitter housekeeper
    hairdresser maid cleaner dietitian midwife typist florist stylist cashier tutor singer model cook"""),
    " he": words("""mechanic carpenter engineer soldier plumber electrician farmer pilot butcher miner builder
    sailor boxer guard lawyer surgeon banker programmer driver president captain fisherman coach boss"""),
}
EVENTS = (
    "slept well",
    "was late again",
    "left the meeting early",
    "smiled at everyone",
    "could not come today",
    "called a friend",
)


def gendered_professions(tokenizer: Any, n: int = 50, seed: int = 0, *, masked: bool = False) -> Prompts:
    """`n` pairs, half from each stereotype. Spans: profession, event.

    InputError if no profession has one of the opposite stereotype with equal token length.
    """
    lengths = {p: len(answer_ids(tokenizer, f" {p}")) for ps in STEREOTYPES.values() for p in ps}
    opposite = {
        (pronoun, p): [q for q in STEREOTYPES[other] if lengths[q] == lengths[p]]
        for pronoun, other in ((" she", " he"), (" he", " she"))
        for p in STEREOTYPES[pronoun]
    }
    if not any(opposite.values()):
        raise InputError("gendered_professions: no two professions of opposite stereotype have equal token length")
    drafts = _drafts(random.Random(seed), opposite)
    return assemble("gendered_professions", drafts, tokenizer, n, seed=seed, masked=masked)


def _drafts(rng: random.Random, opposite: dict[tuple[str, str], list[str]]) -> Iterator[Draft]:
    while True:
        pronoun = rng.choice((" she", " he"))
        profession, partners = rng.choice([(p, q) for (side, p), q in opposite.items() if side == pronoun and q])
        clean = {"profession": profession, "event": rng.choice(EVENTS)}
        corrupted = clean | {"profession": rng.choice(partners)}
        other = " he" if pronoun == " she" else " she"
        yield Draft("The {profession} {event} because", clean, corrupted, [pronoun], [other], tail=" was happy.")
