"""Prompts for mediation from a list of professions of your own: whose pronoun does the model expect?

A list is a mapping {"nurse": " she"}, or a JSON file with one, or with rows [profession, definitional, stereotypical] as the
debiaswe and Vig et al. (2020) lists have them (positive: male). There the stereotype is the answer, and professions that are
gendered by definition (beyond .75) or without stereotype are left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pellucid.errors import InputError
from pellucid.tasks import Draft, Prompts, assemble
from pellucid.tasks.professions import EVENTS
from pellucid.tasks.tokens import answer_ids

Swap = Literal["gender", "opposite"]
GENDER_WORDS = {" she": "woman", " he": "man"}


def profession_prompts(
    tokenizer: Any, professions: Mapping[str, str] | str | Path, n: int = 50, *, swap: Swap = "gender", seed: int = 0
) -> Prompts:
    """`n` pairs, half of each stereotype: "The nurse slept well because", answer " she", wrong " he".

    The corrupted prompt names "man" (Vig et al.'s set-gender: the word of the other gender), or with `swap="opposite"` a
    profession of the opposite stereotype. Professions without a counterpart of equal token length are left out.
    InputError for a file that holds no such list.

    >>> profession_prompts(tokenizer, {"nurse": " she", "mechanic": " he"}, 4)
    <Prompts professions, gender swapped: 4 pairs; 'The mechanic slept well because' / 'The woman slept well because', ' he' against ' she'>
    """
    stereotypes = professions if isinstance(professions, Mapping) else read_professions(professions)
    drafts = _drafts(random.Random(seed), dict(stereotypes), swap, tokenizer)
    return assemble(f"professions, {swap} swapped", drafts, tokenizer, n, seed=seed)


def read_professions(path: str | Path) -> dict[str, str]:
    """{profession: " she" or " he"} from a file. InputError if it is missing or has another form."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read professions from {str(path)!r}: {error}") from None
    if isinstance(rows, dict):
        return {str(name): f" {str(pronoun).strip()}" for name, pronoun in rows.items()}
    if not all(isinstance(row, list) and len(row) >= 3 for row in rows):
        raise InputError(f"{str(path)!r} is no list of professions: expected rows [name, definitional, stereotypical]")
    return {
        str(name).replace("_", " "): " he" if stereotype > 0 else " she"
        for name, definitional, stereotype in (row[:3] for row in rows)
        if abs(definitional) <= 0.75 and stereotype
    }


def _drafts(rng: random.Random, stereotypes: dict[str, str], swap: Swap, tokenizer: Any) -> Iterator[Draft]:
    lengths = {p: len(answer_ids(tokenizer, f" {p}")) for p in (*stereotypes, *GENDER_WORDS.values())}
    partners: dict[str, dict[str, list[str]]] = {" she": {}, " he": {}}
    for profession, pronoun in stereotypes.items():
        other = " he" if pronoun == " she" else " she"
        choices = [GENDER_WORDS[other]] if swap == "gender" else [p for p, s in stereotypes.items() if s == other]
        found = [p for p in choices if lengths[p] == lengths[profession]]
        if found:
            partners[pronoun][profession] = found
    if not all(partners.values()):
        raise InputError(
            "the list has no profession of one stereotype with a counterpart of equal token length: add some"
        )
    while True:
        pronoun = rng.choice((" she", " he"))
        profession, choices = rng.choice(list(partners[pronoun].items()))
        clean = {"profession": profession, "event": rng.choice(EVENTS)}
        corrupted = clean | {"profession": rng.choice(choices)}
        other = " he" if pronoun == " she" else " she"
        yield Draft("The {profession} {event} because", clean, corrupted, [pronoun], [other])
