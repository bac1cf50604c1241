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
from pellucid.safety.ccs import search
from pellucid.safety.contrast import Seen
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
        reader = ConceptReader("mean", sites=MIDDLE, controls=("text", "form", "random", "shuffled")).fit(
            model, own, test={topic: test}
        )
        found = reader.result_.data.sel(set=topic).pair_accuracy.to_series()
        rows += [(len(test) // 2, name, value) for name, value in found.items()]
        print(topic, reader.site, found.round(3).to_dict(), flush=True)
    for name in dict.fromkeys(r[1] for r in rows):
        mine = [(n, v) for n, row, v in rows if row == name]
        print(
            f"bar 1, three topics held out in turn: {name} {np.average([v for _, v in mine], weights=[n for n, _ in mine]):.3f}"
        )


def kinds(model: pl.Model, data: Path) -> None:
    """Every kind on the same pairs, two of eight topics held out at a time."""
    pairs = statements(data)
    for kind in ("mean", "lda", "logistic", "pca", "pca_centred", "mass_mean", "mlp", "attention"):
        start, controls = (
            time.process_time(),
            ("text", "form", "random", "shuffled", "untrained") if kind == "mean" else (),
        )
        reader = ConceptReader(kind, sites="layers.11:15.resid_post", folds=4, controls=controls).fit(model, pairs)
        shown(f"{kind}, all eight topics held out ({time.process_time() - start:.0f} s)", reader.result_)


def trap(model: pl.Model, data: Path) -> None:
    """Bar 2: planted speaker: truth <= .60, speaker >= .99 at 8 of 10 layers, lower loss; erased: truth >= .80 at layer 12."""
    start = time.process_time()
    reader = ConceptReader("ccs", sites="layers.10:20.resid_post", folds=3, controls=("planted", "shuffled"), draws=2)
    reader.fit(model, statements(data))
    assert reader.trap_ is not None
    shown(f"bar 2, the trap ({time.process_time() - start:.0f} s)", reader.trap_)
    shown("ccs on topics held out", reader.result_)


def speed(model: pl.Model, data: Path) -> None:
    """Bar 3: 30 sites and 10 restarts at once >= 10 times cheaper than one by one, to a loss that is no higher (layer 12)."""
    pairs = statements(data)
    true, false = pairs.couples
    x = Seen.of(model, pairs.prompts, [pl.Site.parse(f"layers.{i}.resid_post") for i in range(30)]).values
    first, second, holds = x[:, true], x[:, false], torch.ones(len(true), dtype=torch.bool)

    def alone(a: torch.Tensor, b: torch.Tensor, seed: int, steps: int) -> float:
        """The search as the paper's code has it: one network, one site, one restart."""
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(a.shape[1], 1), torch.nn.Sigmoid())
        rule, last = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01), 0.0
        for _ in range(steps):
            p, q = net(a), net(b)
            loss = (torch.min(p, q) ** 2).mean() + ((p - (1 - q)) ** 2).mean()
            rule.zero_grad()
            loss.backward()
            rule.step()
            last = float(loss)
        return last

    start = time.process_time()
    search(first, second, holds, steps=100)
    batched = time.process_time() - start
    a, b = (v[12] - v[12].mean(0) for v in (first, second))
    scale = torch.cat([a, b]).square().mean().sqrt()
    start = time.process_time()
    for seed in range(6):
        alone(a / scale, b / scale, seed, 100)
    single = (time.process_time() - start) / 6 * 300
    print(
        f"bar 3: 100 steps of 30 x 10: at once {batched:.2f} s, one by one {single:.1f} s: {single / batched:.1f} times"
    )
    found = search(first[12:13], second[12:13], holds)
    theirs = [alone(a / scale, b / scale, seed, 1000) for seed in range(10)]
    print(
        f"bar 3: lowest loss of 10 restarts at layer 12: at once {float(found.loss[0]):.5f}, one by one {min(theirs):.5f}",
        flush=True,
    )


PARTS: dict[str, Callable[[pl.Model, Path], Any]] = {"truth": truth, "trap": trap, "speed": speed, "kinds": kinds}

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
