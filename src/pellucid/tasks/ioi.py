"""Who receives it? "When Mary and John went to the store, John gave a drink to" -> " Mary".

The indirect object (IO) is the name said once; the subject is said twice (S1, S2). Score: logit(IO) -
logit(S). Wang et al. 2023, "Interpretability in the Wild". Names, places and templates are our own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

from pellucid.errors import InputError, among
from pellucid.tasks.prompts import Draft, Prompts, assemble, words
from pellucid.tasks.tokens import answer_ids

NAMES = words("""Mary John James Anna Peter Sarah Robert Linda David Emma Michael Laura Thomas Alice Daniel
Julia Paul Kate Mark Helen George Susan Kevin Jane Andrew Rachel Martin Claire Simon Lucy Jack Grace Adam Ruth
Henry Amy Frank Maria Charles Rose William Karen Steven Lisa Richard Nancy Jason Diana Brian Sophie Eric Carol
Scott Ellen Patrick Martha Alan Betty Luke Victoria""")
PLACES = words("store park school market station library garden hospital office beach museum restaurant")
THINGS = [f"a {thing}" for thing in words("drink book letter key ring ball gift map ticket flower")]
TEMPLATES = (
    "When {A} and {B} went to the {place}, {S2} gave {thing} to",
    "After {A} and {B} met at the {place}, {S2} handed {thing} to",
    "While {A} and {B} were walking to the {place}, {S2} showed {thing} to",
    "Yesterday, {A} and {B} had a long day at the {place}, and {S2} passed {thing} to",
    "Then {A} and {B} left the {place} together, and {S2} offered {thing} to",
)


def indirect_objects(
    tokenizer: Any,
    n: int = 50,
    seed: int = 0,
    *,
    corruption: Literal["swap", "names"] = "swap",
    masked: bool = False,
) -> Prompts:
    """`n` pairs in both name orders (IO first or S first). Spans: IO, S1, S2, place, thing.

    corruption "swap": only S2 changes, to the indirect object's name, which turns the answer around.
    corruption "names": three unrelated names stand in the corrupted prompt, which has no answer then.
    InputError if this tokenizer has fewer than five names of one token.
    """
    if not among(corruption, Literal["swap", "names"]):
        raise InputError(f"corruption {corruption!r}: expected 'swap' or 'names'")
    names = [name for name in NAMES if len(answer_ids(tokenizer, f" {name}")) == 1]
    if len(names) < 5:
        raise InputError(f"indirect_objects: {len(names)} of {len(NAMES)} names are one token here, 5 are needed")
    drafts = _drafts(random.Random(seed), names, corruption)
    return assemble("indirect_objects", drafts, tokenizer, n, seed=seed, masked=masked)


def _drafts(rng: random.Random, names: list[str], corruption: str) -> Iterator[Draft]:
    while True:
        io, s, *others = rng.sample(names, 5)
        first, second = rng.choice((("{IO}", "{S1}"), ("{S1}", "{IO}")))
        template = rng.choice(TEMPLATES).replace("{A}", first).replace("{B}", second)
        rest = {"place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        clean = {"IO": io, "S1": s, "S2": s, **rest}
        corrupted = clean | ({"S2": io} if corruption == "swap" else dict(zip(("IO", "S1", "S2"), others, strict=True)))
        yield Draft(template, clean, corrupted, [f" {io}"], [f" {s}"])
