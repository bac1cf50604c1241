"""What does the model know about the world? "The capital of France is the city of" -> " Paris".

Each relation is a template and a list of (subject, object). The corrupted prompt asks the same of another
subject of equal token length, whose object is the wrong answer. Score: logit(object) - logit(other object).
The lists are our own.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pellucid.errors import InputError, nearest
from pellucid.tasks.prompts import Draft, Prompts, assemble, rows
from pellucid.tasks.tokens import answer_ids

# country, capital, main language, continent
COUNTRIES = rows("""France,Paris,French,Europe
Germany,Berlin,German,Europe
Italy,Rome,Italian,Europe
Spain,Madrid,Spanish,Europe
Portugal,Lisbon,Portuguese,Europe
Greece,Athens,Greek,Europe
Poland,Warsaw,Polish,Europe
Austria,Vienna,German,Europe
Hungary,Budapest,Hungarian,Europe
Sweden,Stockholm,Swedish,Europe
Norway,Oslo,Norwegian,Europe
Denmark,Copenhagen,Danish,Europe
Finland,Helsinki,Finnish,Europe
Ireland,Dublin,English,Europe
England,London,English,Europe
Russia,Moscow,Russian,Europe
Ukraine,Kiev,Ukrainian,Europe
Romania,Bucharest,Romanian,Europe
Bulgaria,Sofia,Bulgarian,Europe
Serbia,Belgrade,Serbian,Europe
Croatia,Zagreb,Croatian,Europe
Japan,Tokyo,Japanese,Asia
China,Beijing,Chinese,Asia
Thailand,Bangkok,Thai,Asia
Vietnam,Hanoi,Vietnamese,Asia
Turkey,Ankara,Turkish,Asia
Iran,Tehran,Persian,Asia
Iraq,Baghdad,Arabic,Asia
Syria,Damascus,Arabic,Asia
Lebanon,Beirut,Arabic,Asia
Pakistan,Islamabad,Urdu,Asia
Bangladesh,Dhaka,Bengali,Asia
Nepal,Kathmandu,Nepali,Asia
Afghanistan,Kabul,Persian,Asia
Egypt,Cairo,Arabic,Africa
Libya,Tripoli,Arabic,Africa
Kenya,Nairobi,Swahili,Africa
Ghana,Accra,English,Africa
Senegal,Dakar,French,Africa
Morocco,Rabat,Arabic,Africa
Cuba,Havana,Spanish,North America
Canada,Ottawa,English,North America
Peru,Lima,Spanish,South America
Chile,Santiago,Spanish,South America""")

LANDMARKS = rows("""Eiffel Tower,Paris
Louvre,Paris
Colosseum,Rome
Trevi Fountain,Rome
Brandenburg Gate,Berlin
Reichstag,Berlin
Kremlin,Moscow
Bolshoi Theatre,Moscow
Acropolis,Athens
Parthenon,Athens
Statue of Liberty,New York
Empire State Building,New York
Golden Gate Bridge,San Francisco
Space Needle,Seattle
Willis Tower,Chicago
Buckingham Palace,London
British Museum,London
Tower Bridge,London
Sagrada Familia,Barcelona
Prado Museum,Madrid
Charles Bridge,Prague
Sydney Opera House,Sydney
Burj Khalifa,Dubai
Forbidden City,Beijing
Blue Mosque,Istanbul
Hagia Sophia,Istanbul
Rijksmuseum,Amsterdam
Anne Frank House,Amsterdam
Vasa Museum,Stockholm
Little Mermaid,Copenhagen
Schonbrunn Palace,Vienna""")

OPPOSITES = rows("""hot,cold
big,small
up,down
left,right
good,bad
fast,slow
old,new
light,dark
happy,sad
rich,poor
strong,weak
open,closed
early,late
full,empty
high,low
hard,soft
wet,dry
loud,quiet
long,short
thick,thin
clean,dirty
inside,outside
push,pull
love,hate
true,false
north,south
east,west
near,far
first,last
alive,dead""")


@dataclass(frozen=True)
class Relation:
    """`template` has the gap {subject} and ends where the object follows."""

    template: str
    pairs: list[tuple[str, str]]


RELATIONS = {
    "capital": Relation("The capital of {subject} is the city of", [(row[0], row[1]) for row in COUNTRIES]),
    "language": Relation("The main language spoken in {subject} is", [(row[0], row[2]) for row in COUNTRIES]),
    "continent": Relation("The country of {subject} is on the continent of", [(row[0], row[3]) for row in COUNTRIES]),
    "landmark": Relation("The {subject} is located in the city of", [(row[0], row[1]) for row in LANDMARKS]),
    "opposite": Relation("The opposite of {subject} is", [p for a, b in OPPOSITES for p in ((a, b), (b, a))]),
}


def capitals(tokenizer: Any, n: int = 50, seed: int = 0, *, single_token: bool = True, masked: bool = False) -> Prompts:
    """`facts(tokenizer, "capital", ...)`."""
    return facts(tokenizer, "capital", n, seed, single_token=single_token, masked=masked)


def facts(
    tokenizer: Any,
    relation: str,
    n: int = 50,
    seed: int = 0,
    *,
    single_token: bool = True,
    masked: bool = False,
) -> Prompts:
    """`n` pairs of one relation: capital, language, continent, landmark or opposite. Span: subject.

    single_token=False also takes objects of several tokens; such prompts have `prompts.single_token` False
    and are scored by sequence, on `prompts.teacher_forced()`. InputError for an unknown relation, or if too
    few facts fit.
    """
    if relation not in RELATIONS:
        raise InputError(f"no relation {relation!r}{nearest(relation, RELATIONS)}")
    template, pairs = RELATIONS[relation].template, RELATIONS[relation].pairs
    usable = [(s, o) for s, o in pairs if not single_token or len(answer_ids(tokenizer, f" {o}")) == 1]
    alike: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for subject, obj in usable:
        alike[len(answer_ids(tokenizer, f" {subject}"))].append((subject, obj))
    partners = [(a, b) for group in alike.values() for a in group for b in group if a[1] != b[1]]
    if not partners:
        advice = "; try single_token=False" if single_token else ""
        raise InputError(f"{relation}: of {len(pairs)} facts {len(usable)} fit, no two with subjects alike{advice}")
    random.Random(seed).shuffle(partners)
    name = f"facts: {relation}"
    drafts = _drafts(template, partners)
    return assemble(name, drafts, tokenizer, n, seed=seed, masked=masked, single_token=single_token)


def _drafts(template: str, partners: list[tuple[tuple[str, str], tuple[str, str]]]) -> Iterator[Draft]:
    for (subject, answer), (other, wrong) in partners:
        yield Draft(template, {"subject": subject}, {"subject": other}, [f" {answer}"], [f" {wrong}"])
