"""Bars 1 to 4 and 16 of the evidence on beliefs, each beside its control.

    python benchmarks/safety_beliefs.py --data /work/shared/data [--only truth trap speed honesty auditor]

Statements: 219 pairs of a true and a false completion of eight factual relations of LRE (Hernandez et al. 2024), the false one
another object of the relation. SmolLM2-135M-Instruct, one thread, seed 0; times are CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pellucid as pl
from pellucid.safety import ConceptReader, Statements
from scripts.demo_model import smollm2

RELATIONS = {
    "country_capital_city": 24, "country_language": 24, "country_largest_city": 24, "city_in_country": 27,
    "country_currency": 30, "food_from_country": 30, "landmark_in_country": 30, "product_by_company": 30,
}  # fmt: skip
MIDDLE = "layers.8:21.resid_post"


def facts(data: Path) -> list[tuple[str, str, str, str]]:
    """(stem, true, false, topic): the false one is drawn from the other objects of the relation."""
    rng, found = np.random.default_rng(0), []
    for name, n in RELATIONS.items():
        relation = json.loads((data / f"relations_lre/data/factual/{name}.json").read_text())
        objects = sorted({s["object"] for s in relation["samples"]})
        for s in relation["samples"][:n]:
            other = rng.choice([o for o in objects if o != s["object"]])
            found.append((relation["prompt_templates"][0].format(s["subject"]), s["object"], str(other), name))
    return found


def statements(data: Path) -> Statements:
    given = facts(data)
    return Statements.paired(
        [f"{s} {t}." for s, t, _, _ in given], [f"{s} {f}." for s, _, f, _ in given], [t for *_, t in given]
    )


def shown(title: str, result: pl.results.Result) -> None:
    print(f"\n## {title}\n{result.title}\n{result.data.to_dataframe().round(3).to_string()}", flush=True)


HELD = ("country_capital_city", "city_in_country", "country_currency")  # 24, 27 and 30 pairs


def truth(model: pl.Model, data: Path) -> None:
    """Bar 1: >= .88 of pairs, random <= .68, shuffled <= .60; and over all eight topics."""
    pairs, rows = statements(data), []
    for topic in HELD:
        own, test = pairs[pairs.topics != topic], pairs[pairs.topics == topic]
        for kind in ("mean", "lda", "logistic", "pca", "mass_mean"):
            controls = ("text", "form", "random", "shuffled") if kind == "mean" else ()
            reader = ConceptReader(kind, sites=MIDDLE, controls=controls).fit(model, own, test={topic: test})
            found = reader.result_.data.sel(set=topic).pair_accuracy.to_series()
            rows += [(len(test) // 2, name, value) for name, value in found.items()]
            print(topic, kind, reader.site, found.round(3).to_dict(), flush=True)
    for name in dict.fromkeys(r[1] for r in rows):
        mine = [(n, v) for n, row, v in rows if row == name]
        print(
            f"bar 1, three topics held out in turn: {name} {np.average([v for _, v in mine], weights=[n for n, _ in mine]):.3f}"
        )
    start = time.process_time()
    reader = ConceptReader("mean", sites=MIDDLE, folds=8).fit(model, pairs)
    shown(f"each of all eight topics held out ({time.process_time() - start:.0f} s)", reader.result_)


PARTS: dict[str, Callable[[pl.Model, Path], Any]] = {"truth": truth}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(PARTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with pl.quiet():
        opened = pl.load(smollm2())
        for part in given.only:
            PARTS[part](opened, given.data)
