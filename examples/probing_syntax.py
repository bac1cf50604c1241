"""At which layers does MiniLM know parts of speech, dependency relations and dependency arcs?

    python examples/probing_syntax.py --data FOLDER [--model MODEL] [--sentences 1200] [--only order,probes,...]

FOLDER holds a Universal Dependencies treebank (en_ewt-ud-train.conllu). Parts: "order", edge probing and the expected layer
of the three; "probes", a linear probe on each layer, and its selectivity; "bits", description lengths; "trees", structural
probes; "erase", part of speech erased by LEACE against a random subspace of the same rank; "random", the same probes on
random weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import pellucid
from pellucid.probing import (
    Features,
    Leace,
    LogisticProbe,
    Protocol,
    RandomSubspace,
    Treebank,
    beside_random,
    edge_probing,
    online_code,
    probe,
    read,
    selectivity,
    structural,
    variational_code,
)
from pellucid.probing.splits import Scores, held_out, interval

PARTS = ("order", "probes", "bits", "trees", "erase", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--sentences", type=int, default=1200)
    parser.add_argument("--only", default=",".join(PARTS))
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import minilm

    model = pellucid.load(options.model or minilm())
    file = next(iter(sorted(options.data.glob("*train.conllu"))), None)
    if file is None:
        parser.error(f"{options.data} holds no *train.conllu")
    bank = Treebank.read(file, options.sentences, words=(4, 40))
    features = read(model, bank.spans)
    print(f"{len(bank)} sentences, {len(bank.spans)} words; layers {', '.join(features.layers)}", flush=True)
    asked = options.only.split(",")
    for part, show in (("order", order), ("probes", probes), ("bits", bits), ("trees", trees), ("erase", erase)):
        if part in asked:
            print(f"\n== {part}", flush=True)
            show(features, bank)
    if "random" in asked:
        found = beside_random(model, bank.tags().sample(4000), protocol=Protocol(seeds=1))
        print("\n== random\npart of speech minus that on random weights, by layer:", row(found.gain))
        print("on random weights:", row(found.random))


def row(values: object) -> str:
    return "  ".join(f"{v:6.3f}" for v in np.asarray(values))


def order(features: Features, bank: Treebank) -> None:
    found = {}
    arcs = bank.arcs()
    arcs = arcs[(np.arange(len(arcs)) + np.arange(len(arcs)) // 2) % 2 == 0]  # of every word one pair
    for examples in (bank.tags(fine=True), bank.relations(subtypes=True), arcs):
        each = found[examples.name] = edge_probing(features, examples, test=0.3, seeds=3)
        print(
            f"{examples.name}: expected layer {each['expected_layer'].item():.2f} "
            f"[{each['expected_low'].item():.2f}, {each['expected_high'].item():.2f}], "
            f"centre of gravity {each['centre_of_gravity'].item():.2f}; cumulative accuracy {row(each.accuracy)}",
            flush=True,
        )
    first, *others = found.items()
    for name, each in others:
        later = each.expected_draws.values - first[1].expected_draws.values  # the same texts in both
        low, high = interval(later)
        print(f"{name} is {later.mean():.2f} layers [{low:.2f}, {high:.2f}] after {first[0]}")


def probes(features: Features, bank: Treebank) -> None:
    for examples in (bank.tags(), bank.relations(), bank.arcs()):
        examples = examples.sample(6000 if examples.second is None else 3000)
        found = probe(features, examples, protocol=Protocol(seeds=1))
        best = int(np.argmax(found.accuracy.values))
        print(f"{examples.name}: accuracy by layer {row(found.accuracy)}; most at layer {found.layer.values[best]} "
              f"[{found.low.values[best]:.3f}, {found.high.values[best]:.3f}]; majority {found['majority'].item():.3f}", flush=True)  # fmt: skip
    found = selectivity(features, bank.tags().sample(6000), protocol=Protocol(seeds=1))
    print(f"part of speech: control task {row(found.control)}")
    print(f"selectivity {row(found.selectivity)}, low {row(found.low)}, high {row(found.high)}", flush=True)


def bits(features: Features, bank: Treebank) -> None:
    for examples in (bank.tags(), bank.relations()):
        examples = examples.sample(4000 if examples.second is None else 2000)
        online = online_code(features, examples, seeds=2)
        print(f"{examples.name}: uniform code {online['uniform'].item() / 1000:.1f} kbit")
        print(f"  online, kbit          {row(online.bits / 1000)}   compression {row(online.compression)}   "
              f"of the control {row(online.control_compression)}", flush=True)  # fmt: skip
        variational = variational_code(features, examples)
        print(f"  variational, kbit     {row(variational.bits / 1000)}   compression {row(variational.compression)}   "
              f"of the control {row(variational.control_compression)}", flush=True)  # fmt: skip
        best = int(np.argmin(online.bits.values))
        print(f"  bits per label at layer {online.layer.values[best]} after ... labels: " + ", ".join(
            f"{s}: {b:.2f}" for s, b in zip(online.sent.values[:-1], online.curve.values[best, 1:], strict=True)))  # fmt: skip


def trees(features: Features, bank: Treebank) -> None:
    found = structural(features, bank, epochs=10)
    print(f"UUAS {row(found.uuas)} (joining neighbours: {found['neighbours'].item():.3f})")
    print(
        f"distances, Spearman {row(found.distance_spearman)}; depths {row(found.depth_spearman)}; root {row(found.root_accuracy)}"
    )


def erase(features: Features, bank: Treebank) -> None:
    examples = bank.tags()
    labels, groups = examples.labels, examples.texts
    held = held_out(groups, 0.25, 0)
    names, counts = np.unique(labels[~held], return_counts=True)
    print(f"saying {names[counts.argmax()]} is right for {(labels[held] == names[counts.argmax()]).mean():.3f}")
    for layer, name in enumerate(features.layers):
        x = features.of(examples, layer)
        eraser = Leace().fit(x[~held], labels[~held])
        found = {}
        for kind, each in (
            ("before", None), ("LEACE", eraser), (f"random, rank {eraser.rank}", RandomSubspace(eraser.rank).fit(x[~held]))
        ):  # fmt: skip
            kept = x if each is None else each.transform(x)
            fitted = LogisticProbe(l2=100.0).fit(kept[~held], labels[~held])
            right = np.full((1, 1, len(examples)), np.nan)
            right[..., held] = fitted.predict(kept[held]) == labels[held]
            scores = Scores(right, groups)
            low, high = interval(scores.draws())
            found[kind] = f"{kind} {scores.mean()[0]:.3f} [{low[0]:.3f}, {high[0]:.3f}]"
        print(f"layer {name}: " + ", ".join(found.values()), flush=True)


if __name__ == "__main__":
    main()
