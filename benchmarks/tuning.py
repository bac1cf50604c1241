"""What do objectives buy, and at what price? Each bar beside its control, as a table of lines.

    python benchmarks/tuning.py DATA [decoy] [share] [met] [positive] [masked] [attention] [pooled] [sparse] [parts] [weights] [routing] [probe] [frontier] [second] [costs] [share=WEIGHT]

    DATA: imdb_counterfactual/sentiment/combined/paired

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
from dataclasses import replace
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
            "window": [(len(w) + 1, len(w) + 1 + len(text)) for w, (_, text, _, _) in zip(first, rows, strict=True)],
        },
        groups=[pair for *_, pair in rows],
    )  # fmt: skip


class Setting:
    def __init__(self, data: Path, layers: int = 2, dev: bool = False, pooling: Any = "mean") -> None:
        base = remove(pl.load(str(minilm())), list(range(layers, 6)))
        self.model = tuning.classifier(base, ["negative", "positive"], pooling=pooling)
        tokenizer = self.model.tokenizer
        self.train, self.test = (
            windows(tokenizer, data / f"{name}_paired.tsv", n) for name, n in (("train", 192), ("test", 150))
        )
        self.dev = windows(tokenizer, data / "dev_paired.tsv", 150) if dev else []
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
    every = {
        "decoy",
        "share",
        "met",
        "positive",
        "masked",
        "attention",
        "pooled",
        "sparse",
        "parts",
        "weights",
        "routing",
        "probe",
        "frontier",
        "second",
    }
    parts = set(wanted) or every
    two = Setting(data)
    behaviour = ("swap_effect", "gradient_share", "confidence")
    if "decoy" in parts:
        table(
            "A planted word, un-taught by consistency (weight 10)", two.decoy(tuning.Consistency("decoy")), *behaviour
        )
    if "share" in parts:
        table(
            "A planted word, un-taught by the share of the gradient (weight 300, tried on validation texts: share=300)",
            two.decoy(tuning.RightReasons("decoy", weight=300.0)),
            *behaviour,
        )
    if "met" in parts:
        ross = {"form": "absolute", "of": "log_probability_sum"}
        for name, weight, more in (("Ross et al. as published", 1, ross), ("Ross et al.", 30, ross), ("Ross et al.", 1000, ross), ("the share", 10, {})):  # fmt: skip
            made = two.decoy(tuning.RightReasons("decoy", weight=float(weight), **more), seeds=(0,), control=False)
            table(f"Met is not un-taught: {name}, weight {weight}", made, *behaviour)
    if "positive" in parts:  # three seeds; the weight is the evidence's
        made = two.decoy(tuning.RightReasons("rationale", form="outside", weight=10.0))
        table("These are the reasons (positive form, weight 10)", made, *behaviour)
    if "masked" in parts:
        made = two.decoy(tuning.Consistency("decoy", by="mask"), seeds=(0,))
        table("Consistency with the word masked instead of exchanged (weight 10)", made, *behaviour)
    if "pooled" in parts:  # only attention writes the first token's state
        cls = Setting(data, pooling="cls")
        made = cls.clean(tuning.Attend("rationale", heads="layers.*.attn.heads.*"))
        table(
            "Attention taught by rationales, the first token pooled (KL, all heads, weight 1)",
            made,
            "attention_plausibility",
            "confidence",
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
        sparse(Setting(data, 4))
    if "parts" in parts:
        chosen_parts(two)
    if "weights" in parts:
        found = tuning.weight_sparsity(
            two.model, rationales(two.train, ABSENT), test=rationales(two.test, ABSENT), shares=(0.5, 0.8, 0.9, 0.95), **two.options
        )  # fmt: skip
        print(f"\n## Weights that are 0\n{found.title}", found.data["accuracy"].to_pandas().round(3), found.data["zeros"].to_pandas().round(4), sep="\n", flush=True)  # fmt: skip
    if "routing" in parts:
        routing(Setting(data, 4))
    if "probe" in parts:
        probe(Setting(data, 4))
    if "frontier" in parts:
        shifts = {"absent": rationales(two.test, ABSENT), "reversed": rationales(two.test, REVERSED)}
        found = tuning.frontier(
            two.model, rationales(two.train, PLANTED), tuning.Consistency("decoy"), weights=(0.1, 1, 10), test=rationales(two.test, PLANTED),
            shifts=shifts, seeds=(0,), **two.options,
        )  # fmt: skip
        print(f"\n## Frontier\n{found.title}", found.data.to_dataframe().round(3), sep="\n", flush=True)
    for part in wanted:  # share=300: the weight of the share, on validation texts
        if part.startswith("share="):
            dev = Setting(data, dev=True)
            dev.test = dev.dev
            made = dev.decoy(tuning.RightReasons("decoy", weight=float(part[6:])), seeds=(0,), control=False)
            table(f"The share of the gradient, weight {part[6:]}, on validation texts", made, *behaviour)
    if "costs" in wanted:
        costs(two)
    if "second" in parts:
        second(two)


def sparse(four: Setting) -> None:
    """Attention and neurons of layers 2 and 3 of 4, the lower ones frozen, 30 steps."""
    test = rationales(four.test, ABSENT)
    for objective in (
        tuning.SparseAttention("entmax15", layers=[2, 3]),
        tuning.SparseAttention("sparsemax", layers=[2, 3]),
        tuning.TopNeurons(77, layers=[2, 3]),
        tuning.AttentionEntropy([2, 3], weight=0.1),
        tuning.AttentionEntropy(heads=["layers.3.attn.heads.*"], weight=10.0),
    ):
        made = four.clean(objective, steps=30, layers=[2, 3], head_learning_rate=1e-2, control=False)
        found = tuning.sparsity(made.model, test, edits=made.edits).data.sel(layer=[2, 3])
        plain = tuning.sparsity(made.arms["plain"], test).data.sel(layer=[2, 3])
        cut = tuning.sparsity(made.arms["plain"], test, keep=2).data
        told = {
            "accuracy": float(found.accuracy),
            "plain": float(plain.accuracy),
            "plain cut to 2 keys": float(cut.accuracy),
        }
        for name in ("zeros", "entropy", "marks", "neuron_zeros", "one_hot"):
            told |= {name: float(found[name].mean()), f"plain {name}": float(plain[name].mean())}
        told["cost"] = float(made.result.data["cost"].sel(arm="objective"))
        print(f"\n## {objective}\n" + ", ".join(f"{k} {v:.3f}" for k, v in told.items()), flush=True)


def chosen_parts(two: Setting) -> None:
    """A model that learnt the planted word is repaired on texts with both words: found, random, least, the head alone, all."""
    taught = two.decoy((), seeds=(0,)).model
    shifts = {"absent": rationales(two.test, ABSENT), "reversed": rationales(two.test, REVERSED)}
    both = [rationales(two.train[:96], words) for words in (REVERSED, PLANTED)]
    repair = tuning.Rationales([t for d in both for t in d.texts], [y for d in both for y in d.labels or ()])
    for what, share in (("layers", 0.5), ("heads", 0.25), ("neurons", 0.05)):
        made = tuning.compare_parts(
            taught, repair, what=what, share=share, test=rationales(two.test, PLANTED), shifts=shifts, seeds=(0,), steps=30, head_learning_rate=3e-3,
        )  # fmt: skip
        found = made.result.data
        print(f"\n## Chosen {what}: repairing a model that learnt the planted word (30 steps)\n{made.result.title}; found {made.only['found'].layers if what == 'layers' else ''}")  # fmt: skip
        print(
            found["accuracy"].to_pandas().round(3),
            found[["trained", "changed", "cost"]].to_dataframe().round(2),
            sep="\n",
            flush=True,
        )


VIEWING = re.compile(r"\b(watch|watched|watching|see|seen|saw|recommend|recommended|rent|rented|view|viewing)\b", re.I)


def probe(four: Setting) -> None:
    """Whether a review talks of watching, read at layer 2 of 4 (layers 2 and 3 trained): penalised, unlearnt, learnt along; read anew."""
    train, test = rationales(four.train, ABSENT), rationales(four.test, ABSENT)
    train = replace(train, properties={"viewing": [bool(VIEWING.search(t)) for t in train.texts]})
    held = [bool(VIEWING.search(t)) for t in test.texts]
    test = replace(test, properties={"viewing": held})
    reader = tuning.direction(four.model, train, list(train.properties["viewing"]), "layers.2.resid_post")
    options: dict[str, Any] = {"steps": 40, "layers": [2, 3], "seeds": (0,), "head_learning_rate": 1e-2, "test": test}
    print(f"\n## A reader in the objective: {sum(held)} of {len(held)} test texts talk of viewing", flush=True)
    for objective in (
        tuning.ProbePenalty(reader, weight=1.0),
        tuning.Unlearn("viewing", "layers.2.resid_post", weight=1.0),
        tuning.Unlearn("viewing", "layers.2.resid_post", how="means", weight=10.0),
        tuning.ProbeTask("viewing", "layers.2.resid_post", weight=1.0),
    ):
        made = tuning.fit(four.model, train, objective, **options)
        for arm in made.arms if isinstance(objective, tuning.ProbePenalty) else ("objective", "control"):
            found = tuning.evasion(four.model, made.arms[arm], test, held, reader)
            told = found.data["auc"].sel(when="after")
            kinds = ", ".join(
                f"{k} {'/'.join(f'{float(v):.3f}' for v in told.sel(kind=k))}" for k in told["kind"].values.tolist()
            )
            accuracy = float(made.result.data.accuracy.sel(arm=arm)[0])
            same = found.data["same"].values
            print(f"{type(objective).__name__:12} {getattr(objective, 'how', ''):9} {arm:9} task {accuracy:.3f}; same reader {same[0]:.3f} -> {same[1]:.3f}; anew {kinds} (before {float(found.data['auc'].sel(when='before').max()):.3f}); {found.title}", flush=True)  # fmt: skip


def routing(four: Setting) -> None:
    """Two questions on one trunk (sentiment, viewing talk), each over classes of its own, one half of the neurons of layers 2 and 3 for each, the rest frozen."""
    rows = {name: (four.train if name == "train" else four.test) for name in ("train", "test")}
    drawn = np.random.default_rng(0)
    half = {i: drawn.permutation(1536) for i in (2, 3)}
    parts = {name: tuning.Only(neurons={i: own[k * 768 : (k + 1) * 768].tolist() for i, own in half.items()}) for k, name in enumerate(("sentiment", "viewing"))}  # fmt: skip
    made: dict[str, tuning.Rationales] = {}
    questions = {"sentiment": ["bad", "good"], "viewing": ["no viewing", "viewing"]}
    for name, windows_ in rows.items():
        texts = [(f"table {t}", questions["sentiment"][label], "sentiment") for label, t, *_ in windows_]
        talk = [(f"table {t}", questions["viewing"][bool(VIEWING.search(t))], "viewing") for _, t, *_ in windows_]
        yes, no = ([x for x in talk if x[1] == y] for y in reversed(questions["viewing"]))
        balanced = yes + no[: len(yes)]
        texts += balanced * (round(len(windows_) / len(balanced)) if name == "train" else 1)
        made[name] = tuning.Rationales(
            [t for t, *_ in texts],
            [y for _, y, _ in texts],
            properties={"topic": [z for *_, z in texts]},
            among=[questions[z] for *_, z in texts],
        )
    base = four.model.module.trunk
    model = tuning.classifier(
        pl.load(base, tokenizer=four.model.tokenizer), [*questions["sentiment"], *questions["viewing"]]
    )
    both = tuning.Only(neurons={i: list(range(1536)) for i in (2, 3)})
    options: dict[str, Any] = {"steps": 40, "layers": both, "seeds": (0,), "learning_rate": 1e-3, "head_learning_rate": 1e-2, "weight_decay": 0.0, "batch": 24, "test": made["test"], "control": False}  # fmt: skip
    fitted = tuning.fit(model, made["train"], tuning.Route("topic", parts), **options)
    print(f"\n## Gradient routing: {fitted.result.title}", f"cost {float(fitted.result.data['cost'].sel(arm='objective')):.2f}, changed outside {len(fitted.changed)}")  # fmt: skip
    for arm in ("objective", "plain"):
        found = tuning.parts_off(fitted.arms[arm], made["test"], "topic", parts)
        print(
            f"{'routed' if arm == 'objective' else 'not routed'}: {found.title}",
            found.data["accuracy"].to_pandas().round(3),
            sep="\n",
            flush=True,
        )


def costs(two: Setting) -> None:
    """A step of every objective over one of plain training (CPU time, in turn, medians of three), eager attention."""
    from pellucid.tuning.data import Encoded
    from pellucid.tuning.fit import Fit, Settings, timed

    sys.modules["pellucid.tuning.fit"].TURNS = 3  # type: ignore[attr-defined]
    two.model.module.trunk.set_attn_implementation("eager")
    train = rationales(two.train, PLANTED)
    train = replace(train, properties={"viewing": [bool(VIEWING.search(t)) for t in train.texts]})
    settings = Settings(two.model, Encoded(two.model, train), slice(None), 60, 16, 1, 3e-4, 3e-3, 0.01, 5, 1.0)
    site = "layers.1.resid_post"
    halves = {v: tuning.Only(neurons={1: range(k, k + 768)}) for k, v in ((0, True), (768, False))}
    arms: dict[str, Any] = {
        "plain": (), "augmentation": tuning.Augment("decoy"), "consistency": tuning.Consistency("decoy"), "share": tuning.RightReasons("decoy"),
        "share, finite": tuning.RightReasons("decoy", path="finite"), "attention taught": tuning.Attend("rationale"), "entropy": tuning.AttentionEntropy(),
        "neurons L1": tuning.NeuronL1(), "entmax": tuning.SparseAttention("entmax15"), "top neurons": tuning.TopNeurons(77), "weights L1": tuning.WeightL1(),
        "locality": tuning.Locality(), "property along": tuning.ProbeTask("viewing", site), "unlearnt": tuning.Unlearn("viewing", site),
        "routed": tuning.Route("viewing", halves), "bottleneck": tuning.Bottleneck(), "selection": tuning.Select(warm=0, within="window"),
    }  # fmt: skip
    fits = {name: Fit(settings, own if own == () else (own,), 0) for name, own in arms.items()}
    found = timed(fits, "plain")
    print("\n## Cost of a step over plain, eager: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True)


def second(two: Setting) -> None:
    """Cost of one step with gradients of gradients over one of plain training, each kernel against its own, arms in turn."""
    from pellucid.tuning.data import Encoded
    from pellucid.tuning.fit import Fit, Settings, timed

    for kernel in ("eager", "sdpa"):
        two.model.module.trunk.set_attn_implementation(kernel)
        encoded = Encoded(two.model, rationales(two.train, PLANTED))
        settings = Settings(two.model, encoded, slice(None), 60, 16, 1, 3e-4, 3e-3, 0.01, 5, 1.0)
        arms = {"plain": (), "share": (tuning.RightReasons("decoy"),), "consistency": (tuning.Consistency("decoy"),), "integrated": (tuning.RightReasons("decoy", through="integrated"),), "expected": (tuning.RightReasons("decoy", through="expected"),), "attend": (tuning.Attend("rationale"),)}  # fmt: skip
        found = timed({name: Fit(settings, own, 0) for name, own in arms.items()}, "plain")
        print(
            f"\n## Cost of a step over plain, {kernel}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
