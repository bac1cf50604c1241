"""Do a few neurons of SmolLM2 hold a fact?

For facts the model knows, finds the knowledge neurons that several wordings share (Dai et al. 2022), switches them off and
doubles them, and asks the fact, a wording that was not used, and unrelated facts again; beside as many random neurons of
the same layers and as many of the most active ones. Run it as

    python examples/neurons_knowledge.py --data FOLDER_OF_relations_lre [--facts 24]

or without --data on the facts of pellucid.tasks.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

import pellucid as pl
from pellucid.metrics import probability
from pellucid.neurons import chosen, knowledge_attribution, knowledge_effect, knowledge_neurons
from pellucid.results import Result
from pellucid.tasks.tokens import answer_ids

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.demo_model import smollm2

KNOWN = 0.2  # of the probability, and the first choice, on two wordings at least


@dataclass(frozen=True)
class Fact:
    relation: str
    wordings: tuple[str, ...]
    answer: str


def lre(folder: Path) -> Iterator[Fact]:
    """Facts of relations_lre: each subject in every wording of its relation."""
    for file in sorted((folder / "data" / "factual").glob("*.json")):
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


def known(model: pl.Model, fact: Fact) -> list[str]:
    """The wordings in which the model gives the answer first."""
    if len(answer_ids(model.tokenizer, fact.answer)) > 1 or len(fact.wordings) < 3:
        return []
    found = []
    for wording in fact.wordings:
        run = model.run(wording)
        p = float(model.score(run, probability(fact.answer))[0])
        if p >= KNOWN and int(run.logits[0, -1].argmax()) == answer_ids(model.tokenizer, fact.answer)[0]:
            found.append(wording)
    return found


def facts(model: pl.Model, source: Iterator[Fact], wanted: int) -> list[tuple[Fact, list[str]]]:
    """At most four facts of a relation, no two with one answer."""
    every = list(source)
    random.Random(0).shuffle(every)
    kept: list[tuple[Fact, list[str]]] = []
    for fact in every:
        alike = [f for f, _ in kept if f.relation == fact.relation]
        if len(alike) >= 4 or any(f.answer == fact.answer for f, _ in kept):
            continue
        wordings = known(model, fact)
        if len(wordings) >= 3:
            kept.append((fact, wordings))
        if len(kept) == wanted:
            break
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--facts", type=int, default=24)
    options = parser.parse_args()
    model = pl.load(str(smollm2()))
    began = time.process_time()
    kept = facts(model, own() if options.data is None else lre(options.data), options.facts)
    print(
        f"{len(kept)} facts known in three wordings or more ({time.process_time() - began:.0f} s of CPU to find them)",
        flush=True,
    )

    rows = []  # fact, where, group, factor -> change
    for number, (fact, wordings) in enumerate(kept):
        used, kept_out = wordings[:-1], wordings[-1]
        each = [knowledge_attribution(model, w, fact.answer, progress=False) for w in used]
        together = Result(
            xr.concat([e.data for e in each], dim="prompt"), kind="knowledge attribution", provenance=each[0].provenance
        )
        found = knowledge_neurons(together)
        neurons = chosen(found)
        far = [f for f in kept if f[0].relation != fact.relation]
        other, other_wordings = far[number % len(far)] if far else kept[(number + 1) % len(kept)]
        asked = {
            "fact": (used[0], fact.answer),
            "other wording": (kept_out, fact.answer),
            "unrelated": (other_wordings[0], other.answer),
        }
        effects = {
            w: knowledge_effect(model, p, a, neurons, seed=number, progress=False).data for w, (p, a) in asked.items()
        }
        rows.append({w: e.effect.values for w, e in effects.items()})
        off = effects["fact"].effect.sel(factor=0.0)
        print(f"{fact.relation[:22]:22s} {used[0][-44:]:>44s}{fact.answer:12s} {neurons}  off {float(off.sel(group='neurons')):+.2f} "
              f"random {float(off.sel(group='random')):+.2f} most active {float(off.sel(group='most active')):+.2f}", flush=True)  # fmt: skip

    print(f"\nchange of the log-odds (nats), mean over {len(rows)} facts with 95 % bootstrap intervals")
    draws = np.random.default_rng(0).integers(len(rows), size=(1000, len(rows)))
    for where in ("fact", "other wording", "unrelated"):
        values = np.stack([row[where] for row in rows])  # [fact, group, factor]
        low, high = np.quantile(values[draws].mean(1), [0.025, 0.975], axis=0)
        for f, factor in enumerate(("suppressed", "amplified")):
            shown = [
                f"{g} {values[:, i, f].mean():+.2f} [{low[i, f]:+.2f}, {high[i, f]:+.2f}]"
                for i, g in enumerate(("knowledge", "random", "most active"))
            ]
            print(f"{where:14s}{factor:11s} {'  '.join(shown)}")
    print(f"{time.process_time() - began:.0f} s of CPU in all")


if __name__ == "__main__":
    main()
