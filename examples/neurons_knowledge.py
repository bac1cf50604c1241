"""Do a few neurons of SmolLM2 hold a fact?

For facts the model knows, finds the knowledge neurons that several wordings share and other facts do not (Dai et al. 2022),
switches them off and doubles them, and asks the fact, a wording that was not used, and unrelated facts again; beside as
many random neurons of the same layers and as many of the most active ones. Unrelated are facts of relations that have no
answer in common with this one's (a capital and a company's seat are both cities); those asked again were not among those
the neurons were chosen against. Run it as

    python examples/neurons_knowledge.py --data FOLDER_OF_relations_lre [--facts 30]

or without --data on the facts of pellucid.tasks.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

import pellucid as pl
from pellucid.metrics import probability, rank
from pellucid.neurons import knowledge_attribution, knowledge_effect, knowledge_neurons
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.tasks.tokens import answer_ids

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.demo_model import smollm2

KNOWN = 0.2  # of the probability, and the first choice, in three wordings at least
TRIED = 100  # facts of each relation
KEPT = 6  # of each relation
BATCH = 64
UNRELATED = 4  # facts asked beside each fact


@dataclass(frozen=True)
class Fact:
    relation: str
    wordings: tuple[str, ...]
    answer: str


def lre(folder: Path) -> Iterator[Fact]:
    """Facts of relations_lre: each subject in every wording of its relation."""
    for file in sorted(f for kind in ("factual", "commonsense") for f in (folder / "data" / kind).glob("*.json")):
        relation = json.loads(file.read_text())
        wordings = [*relation["prompt_templates"], *relation["prompt_templates_zs"]]
        wordings = [w for w in dict.fromkeys(wordings) if w.count("{}") == 1]
        for sample in relation["samples"]:
            yield Fact(relation["name"], tuple(w.format(sample["subject"]) for w in wordings), f" {sample['object']}")


def own() -> Iterator[Fact]:
    templates = (
        "The capital of {} is",
        "{}'s capital city is",
        "The capital city of {} is the city of",
        "The seat of government of {} is the city of",
    )
    for country, capital in (
        ("France", "Paris"),
        ("Italy", "Rome"),
        ("Japan", "Tokyo"),
        ("Spain", "Madrid"),
        ("Germany", "Berlin"),
        ("Russia", "Moscow"),
    ):
        yield Fact("capital", tuple(t.format(country) for t in templates), f" {capital}")


def known(model: pl.Model, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Of (prompt, answer): does the model give the answer first, and with some conviction?"""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))  # alike in length: little padding
    right = [False] * len(pairs)
    for start in tqdm(range(0, len(order), BATCH), desc="which facts are known", unit="batch"):
        at = order[start : start + BATCH]
        prompts, answers = [pairs[i][0] for i in at], [pairs[i][1] for i in at]
        run = model.run(prompts)
        ranks, sure = model.score(run, rank(answers)).tolist(), model.score(run, probability(answers)).tolist()
        for i, place, p in zip(at, ranks, sure, strict=True):
            right[i] = place == 0 and p >= KNOWN
    return right


def facts(model: pl.Model, every: Sequence[Fact], wanted: int) -> list[tuple[Fact, list[str]]]:
    """Facts known in three wordings or more: at most KEPT of a relation, no two with one answer."""
    tried: dict[str, list[Fact]] = {}
    every = [f for f in every if len(f.wordings) >= 3 and len(answer_ids(model.tokenizer, f.answer)) == 1]
    random.Random(0).shuffle(every)
    for fact in every:
        if len(tried.setdefault(fact.relation, [])) < TRIED:
            tried[fact.relation].append(fact)
    pairs = [(f, w) for of in tried.values() for f in of for w in f.wordings]
    right = known(model, [(w, f.answer) for f, w in pairs])
    wordings: dict[Fact, list[str]] = {}
    for (fact, wording), is_known in zip(pairs, right, strict=True):
        if is_known:
            wordings.setdefault(fact, []).append(wording)
    kept: list[tuple[Fact, list[str]]] = []
    for fact in (f for f in every if len(wordings.get(f, [])) >= 3):  # in the order drawn
        alike = [f for f, _ in kept if f.relation == fact.relation]
        if len(alike) < KEPT and all(f.answer != fact.answer for f, _ in kept):
            kept.append((fact, wordings[fact]))
    return kept[:wanted]


def others(kept: list[tuple[Fact, list[str]]], number: int, every: Sequence[Fact]) -> tuple[list[int], list[int]]:
    """Of one fact: the known facts of other relations that have answers in common with its own, and of those that do not."""
    answers: dict[str, set[str]] = {}
    for fact in every:
        answers.setdefault(fact.relation, set()).add(fact.answer)
    own = kept[number][0].relation
    rest = [i for i, (f, _) in enumerate(kept) if f.relation != own]
    random.Random(number).shuffle(rest)
    near = [i for i in rest if answers[kept[i][0].relation] & answers[own]]
    return near, [i for i in rest if i not in near]


def attributed(model: pl.Model, fact: Fact, wordings: Sequence[str]) -> Result:
    return joined([knowledge_attribution(model, w, fact.answer) for w in wordings])


def joined(each: Sequence[Result]) -> Result:
    """One result of several: they differ in length, so each was asked alone."""
    data = xr.concat([e.data for e in each], dim="prompt")
    return Result(data, kind="knowledge attribution", provenance=each[0].provenance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--facts", type=int, default=30)
    options = parser.parse_args()
    model = pl.load(str(smollm2()))
    began = time.process_time()
    every = list(own() if options.data is None else lre(options.data))
    kept = facts(model, every, options.facts)
    print(
        f"{len(kept)} facts known in three wordings or more ({time.process_time() - began:.0f} s of CPU to find them)",
        flush=True,
    )

    attributions = [attributed(model, fact, wordings[:-1]) for fact, wordings in tqdm(kept, unit="fact")]
    rows = []  # fact, where, group, factor -> change
    for number, (fact, wordings) in enumerate(kept):
        near, far = others(kept, number, every)
        far = far or [i for i in range(len(kept)) if i != number]
        unrelated, against = far[:UNRELATED], far[UNRELATED:] + near
        contrast = joined([attributions[i] for i in against]) if against else None
        neurons = knowledge_neurons(attributions[number], others=contrast).neurons.values.tolist()
        if not neurons:
            print(
                f"{fact.relation[:22]:22s} {wordings[0][-44:]:>44s}{fact.answer:12s} none that other facts do not have"
            )
            continue
        asked = {
            "fact": (wordings[:-1], fact.answer),
            "other wording": (wordings[-1], fact.answer),
            "unrelated": ([kept[i][1][0] for i in unrelated], [kept[i][0].answer for i in unrelated]),
        }
        effects = {w: knowledge_effect(model, p, a, neurons, seed=number).data for w, (p, a) in asked.items()}
        rows.append({w: e.effect.values for w, e in effects.items()})
        off = effects["fact"].effect.sel(factor=0.0)
        print(f"{fact.relation[:22]:22s} {wordings[0][-44:]:>44s}{fact.answer:12s} {neurons}  off {float(off.sel(group='neurons')):+.2f} "
              f"random {float(off.sel(group='random')):+.2f} most active {float(off.sel(group='most active')):+.2f}", flush=True)  # fmt: skip

    print(f"\nchange of the log-odds (nats), mean over {len(rows)} facts with 95 % bootstrap intervals")
    for where in ("fact", "other wording", "unrelated"):
        values = np.stack([row[where] for row in rows])  # [fact, group, factor]
        low, high = interval(values)
        for f, factor in enumerate(("suppressed", "amplified")):
            shown = [
                f"{g} {values[:, i, f].mean():+.2f} [{low[i, f]:+.2f}, {high[i, f]:+.2f}]"
                for i, g in enumerate(("knowledge", "random", "most active"))
            ]
            print(f"{where:14s}{factor:11s} {'  '.join(shown)}")
    print(f"{time.process_time() - began:.0f} s of CPU in all")


if __name__ == "__main__":
    main()
