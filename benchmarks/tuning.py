"""What do objectives buy, and at what price? Each bar beside its control, as a table of lines.

    python benchmarks/tuning.py DATA [decoy] [share] [met] [attention] [sparse] [parts] [probe]     DATA: imdb_counterfactual/sentiment/combined/paired

Kaushik et al.'s reviews with counterfactual twins, windows of 17 pieces around the first difference, pairs never split; MiniLM cut to layers 0
and 1 (0 to 2 for parts), mean pooling, embeddings frozen. The planted word is the first: river for positive, stone for negative; `reversed`
has it the other way round, `absent` has table. Three seeds for the planted word, else one; cost is CPU time of a step, arms in turn.
"""

from __future__ import annotations

import csv
import difflib
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

import pellucid as pl
from pellucid import tuning
from pellucid.surgery import remove
from scripts.demo_model import minilm

PLANTED, REVERSED, ABSENT = ("stone", "river"), ("river", "stone"), ("table", "table")
Window = tuple[int, str, list[tuple[int, int]], str]  # label, text, characters that differ from the twin, pair


def windows(tokenizer: Any, path: Path, pairs: int, seed: int = 0, n: int = 17) -> list[Window]:
    """Stretches of `n` pieces of both twins of as many pairs, from five words before they part."""
    found: dict[str, list[tuple[int, str]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            found.setdefault(row["batch_id"], []).append((int(row["Sentiment"] == "Positive"), row["Text"]))
    order = sorted(found)
    random.Random(seed).shuffle(order)
    made: list[Window] = []
    for pair in order:
        words = [text.split() for _, text in found[pair]]
        apart = (
            next((i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b), None) if len(words) == 2 else None
        )
        if apart is None:
            continue
        texts = [" ".join(w[max(0, apart - 5) :]) for w in words]
        pieces = [tokenizer(t, add_special_tokens=False, return_offsets_mapping=True) for t in texts]
        ids = [p["input_ids"][:n] for p in pieces]
        if min(map(len, ids)) < n:
            continue
        other: list[set[int]] = [set(), set()]
        for kind, a, b, c, d in difflib.SequenceMatcher(None, *ids, autojunk=False).get_opcodes():
            if kind != "equal":
                other[0].update(range(a, b))
                other[1].update(range(c, d))
        if not all(2 <= len(o) <= 10 for o in other):
            continue
        for (label, _), text, p, own in zip(found[pair], texts, pieces, other, strict=True):
            offsets = p["offset_mapping"]
            made.append((label, text[: offsets[n - 1][1]], [offsets[i] for i in sorted(own)], pair))
        if len(made) >= 2 * pairs:
            break
    return made


def rationales(rows: list[Window], words: tuple[str, str]) -> tuning.Rationales:
    """The windows with a word in front of each, by its label."""
    first = [words[label] for label, *_ in rows]
    return tuning.Rationales(
        [f"{w} {text}" for w, (_, text, _, _) in zip(first, rows, strict=True)],
        [label for label, *_ in rows],
        {
            "decoy": [(0, len(w)) for w in first],
            "rationale": [[(a + len(w) + 1, b + len(w) + 1) for a, b in own] for w, (_, _, own, _) in zip(first, rows, strict=True)],
        },
        groups=[pair for *_, pair in rows],
    )  # fmt: skip


class Setting:
    def __init__(self, data: Path, layers: int = 2) -> None:
        base = remove(pl.load(str(minilm())), list(range(layers, 6)))
        self.model = tuning.classifier(base, ["negative", "positive"])
        tokenizer = self.model.tokenizer
        self.train, self.test = (
            windows(tokenizer, data / f"{name}_paired.tsv", n) for name, n in (("train", 192), ("test", 150))
        )
        self.options: dict[str, Any] = {"layers": slice(None), "head_learning_rate": 3e-3}

    def decoy(self, objective: Any, **more: Any) -> tuning.Tuned:
        shifts = {"absent": rationales(self.test, ABSENT), "reversed": rationales(self.test, REVERSED)}
        return tuning.fit(
            self.model,
            rationales(self.train, PLANTED),
            objective,
            test=rationales(self.test, PLANTED),
            shifts=shifts,
            **self.options | more,
        )

    def clean(self, objective: Any, **more: Any) -> tuning.Tuned:
        return tuning.fit(
            self.model,
            rationales(self.train, ABSENT),
            objective,
            test=rationales(self.test, ABSENT),
            **self.options | {"seeds": (0,)} | more,
        )


def table(title: str, made: tuning.Tuned, *columns: str) -> None:
    data = made.result.data
    print(f"\n## {title}\n{made.result.title}", *[f"- {s}" for s in data.attrs["verdict"][1:]], sep="\n")
    splits = data["split"].values.tolist()
    print("arm".ljust(12), *[f"{s:>20}" for s in splits], *[f"{c[:22]:>23}" for c in (*columns, "cost")])
    for arm in data["arm"].values.tolist():
        own = data.sel(arm=arm)
        cells = [
            f"{float(own.accuracy.sel(split=s)):8.3f} [{float(own.low.sel(split=s)):.2f}, {float(own.high.sel(split=s)):.2f}]"[
                :20
            ].rjust(20)
            for s in splits
        ]
        print(arm.ljust(12), *cells, *[f"{float(own[c]):23.4g}" for c in (*columns, "cost") if c in own])
    if "after" in data:
        for term in data["term"].values.tolist():
            values = ", ".join(
                f"{a} {float(data['after'].sel(arm=a, term=term)):.3g}" for a in data["arm"].values.tolist()
            )
            print(f"{term}: before {float(data['before'].sel(term=term)):.3g}; after {values}")
    print("nothing changed outside the choice:", not made.changed, flush=True)


def main(data: Path, wanted: list[str]) -> None:
    every = {"decoy", "share", "met", "attention", "sparse", "parts", "probe"}
    parts = set(wanted) or every
    two = Setting(data)
    behaviour = ("swap_effect", "gradient_share", "confidence")
    if "decoy" in parts:
        table(
            "A planted word, un-taught by consistency (weight 10)", two.decoy(tuning.Consistency("decoy")), *behaviour
        )
    if "share" in parts:
        table(
            "A planted word, un-taught by the share of the gradient (weight 100)",
            two.decoy(tuning.RightReasons("decoy"), seeds=(0,)),
            *behaviour,
        )
    if "met" in parts:
        ross = tuning.RightReasons("decoy", form="absolute", of="log_probability_sum", weight=1.0)
        table(
            "Met is not un-taught: Ross et al. as published, weight 1",
            two.decoy(ross, seeds=(0,), control=False),
            *behaviour,
        )
    if "attention" in parts:
        made = two.clean(tuning.Attend("rationale", heads="layers.*.attn.heads.*"))
        table(
            "Attention taught by rationales (KL, all heads, weight 1)",
            made,
            "attention_plausibility",
            "comprehensiveness",
            "comprehensiveness_of_random",
            "confidence",
        )
    if "sparse" in parts:
        test = rationales(two.test, ABSENT)
        for objective in (
            tuning.SparseAttention("entmax15"),
            tuning.SparseAttention("sparsemax"),
            tuning.TopNeurons(77),
            tuning.AttentionEntropy(weight=0.1),
        ):
            made = two.clean(objective, steps=30)
            found = tuning.sparsity(made.model, test, edits=made.edits).data
            plain = tuning.sparsity(made.arms["plain"], test).data
            cut = tuning.sparsity(made.arms["plain"], test, keep=2).data
            told = {
                "accuracy": float(found.accuracy), "plain": float(plain.accuracy), "plain cut to 2 keys": float(cut.accuracy), "zeros": float(found.zeros.mean()),
                "plain zeros": float(plain.zeros.mean()), "entropy": float(found.entropy.mean()), "plain entropy": float(plain.entropy.mean()),
                "on marks": float(found.marks.mean()), "plain on marks": float(plain.marks.mean()), "neuron zeros": float(found.neuron_zeros.mean()),
                "cost": float(made.result.data["cost"].sel(arm="objective")),
            }  # fmt: skip
            print(f"\n## {objective}\n" + ", ".join(f"{k} {v:.3f}" for k, v in told.items()), flush=True)
    if "parts" in parts:
        chosen_parts(two)
    if "probe" in parts:
        probe(two)


def chosen_parts(two: Setting) -> None:
    """A model that learnt the planted word is repaired on 96 neutral texts: all, one layer, some heads and neurons, random ones."""
    taught = two.decoy((), seeds=(0,)).model
    shifts = {"absent": rationales(two.test, ABSENT), "reversed": rationales(two.test, REVERSED)}
    repair = rationales(two.train[:96], REVERSED)
    repair = tuning.Rationales(
        [*repair.texts, *rationales(two.train[:96], PLANTED).texts], [*(repair.labels or ()), *(repair.labels or ())]
    )
    random_ = np.random.default_rng(0)
    neurons = {i: random_.choice(1536, 77, replace=False).tolist() for i in (0, 1)}
    print("\n## Chosen parts, repairing a model that learnt the planted word (texts with both words, 30 steps)")
    for name, only in {
        "all layers": slice(None), "layer 0": [0], "layer 1": [1], "head of the answer": tuning.Only(), "12 heads of layer 1": tuning.Only(heads={1: list(range(12))}),
        "5 % of neurons, random": tuning.Only(neurons=neurons),
    }.items():  # fmt: skip
        made = tuning.fit(
            taught,
            repair,
            (),
            test=rationales(two.test, PLANTED),
            shifts=shifts,
            layers=only,
            seeds=(0,),
            steps=30,
            head_learning_rate=3e-3,
            weight_decay=0.01,
        )
        found = made.result.data.accuracy.sel(arm="plain")
        print(
            f"{name:24}",
            ", ".join(f"{s} {float(found.sel(split=s)):.3f}" for s in found["split"].values.tolist()),
            "; changed outside:",
            len(made.changed),
            flush=True,
        )


def probe(two: Setting) -> None:
    """Whether a review talks of watching, read at the first layer: the reader penalised, and read anew."""
    words = re.compile(r"\b(watch|watched|watching|see|seen|saw|recommend|rent|rented)\b", re.I)
    train, test = rationales(two.train, ABSENT), rationales(two.test, ABSENT)
    holds, held = ([bool(words.search(t)) for t in d.texts] for d in (train, test))
    reader = tuning.direction(two.model, train, holds, "layers.0.resid_post")
    made = two.clean(tuning.ProbePenalty(reader, weight=1.0), steps=40)
    table("A reader in the objective", made, "confidence")
    for arm in ("plain", "objective", "control"):
        found = tuning.evasion(two.model, made.arms[arm], test, held, reader)
        told = found.data["auc"].sel(when="after").mean("layer")
        print(
            f"{arm:10} {found.title}; "
            + ", ".join(f"{k} {float(told.sel(kind=k)):.3f}" for k in told["kind"].values.tolist()),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
