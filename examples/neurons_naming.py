"""What are single neurons of SmolLM2 about, and is what we say of them true?

Reads English sentences once (a harvest), then, for neurons drawn at random from three layers,

* describes each by counting and scores the description on held-out text, beside the descriptions of other neurons and beside
  random directions of the same layers; then the same with SmolLM2 itself as the one who describes;
* explains all neurons of these layers by formulas of parts of speech and dependency relations, beside shifted firings;
* clusters a layer by activation and by weights, beside shuffled features;
* searches for texts that activate some of them most, beside blind search and the corpus.

    python examples/neurons_naming.py --data FOLDER_OF_ud_ewt [--judge]

`--judge` also lets SmolLM2 judge descriptions by detection and fuzzing (some minutes more).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

import pellucid as pl
from pellucid.neurons import (
    Beam,
    Concepts,
    Description,
    Exchanges,
    Formula,
    Harvest,
    ModelExplainer,
    ModelJudge,
    UnitClusters,
    UnitContexts,
    UnitVectors,
    activating_inputs,
    compositional,
    describe,
    harvest,
    random_directions,
    read_contexts,
    score_descriptions,
    unit_clusters,
)
from pellucid.neurons.compositional import firings
from pellucid.neurons.shelf import where
from pellucid.probing import Treebank
from pellucid.results import Result
from pellucid.tasks.tokens import covering, encode

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.demo_model import smollm2

LAYERS = (3, 10, 17)
SAMPLE = 12_000


def named(model: pl.Model, found: Harvest, each: int) -> list[UnitContexts]:
    """Describe neurons and random directions, score both; returns the neurons, the best described first."""
    rng = np.random.default_rng(0)
    neurons = [f"layers.{layer}.mlp.neurons.{n}" for layer in LAYERS for n in rng.permutation(1536)[:each]]
    random = [f"random {layer}.{n}" for layer in LAYERS for n in range(each // 2)]
    contexts = read_contexts(model, found, [*neurons, *random])
    said = describe(contexts)
    n = len(neurons)
    own = score_descriptions(contexts[:n], said[:n])
    for title, scores in (
        (f"{n} neurons, described by counting", own),
        (f"{len(random)} random directions, likewise", score_descriptions(contexts[n:], said[n:])),
    ):
        table(title, scores)
    for layer in LAYERS:
        here = own.data.isel(unit=[i for i, u in enumerate(neurons) if u.startswith(f"layers.{layer}.")])
        print(f"  layer {layer}: simulation {float(here.score.sel(test='simulation').mean()):.2f}, "
              f"beats others {float((here.gain.sel(test='simulation') > 0).mean()):.0%}")  # fmt: skip
    order = np.argsort(-own.score.sel(test="simulation").values)
    for i in order[:12]:
        row = own.data.isel(unit=int(i))
        scores = " ".join(f"{float(row.score.sel(test=t)):.2f}" for t in row.test.values)
        print(f"  {neurons[i]:28s} {scores}  {str(row.description.values)[:110]}")
    return [contexts[i] for i in order]


def table(title: str, scores: Result) -> None:
    print(f"\n{title}: mean score, of other descriptions, share that beats these (surely)")
    for test in scores.test.values:
        row = scores.data.sel(test=test)
        print(f"  {test:11s} {float(row.score.mean()):.3f}  others {float(row.control.mean()):.3f}  "
              f"beats {float(row.beats):.0%} ({float(row.beats_surely):.0%})")  # fmt: skip


def by_model(model: pl.Model, contexts: list[UnitContexts], judge: bool) -> None:
    """SmolLM2 as explainer, judged by its words; and as a judge of descriptions by counting."""
    for shown in (0, 8):
        said = describe(contexts, ModelExplainer(model, contexts=shown))
        title = f"{len(contexts)} of the best described neurons, described by SmolLM2 from words and {shown} contexts"
        table(title, score_descriptions(contexts, said))
        for unit, description in list(zip(contexts, said, strict=True))[:4]:
            print(f"  {unit.unit:28s} {description.text[:100]}")
    if judge:
        few = contexts[:6]
        counted: list[Description] = describe(few)
        tests = ("detection", "fuzzing")
        scores = score_descriptions(few, counted, ModelJudge(model), draws=1, tests=tests)
        table("6 of them, described by counting, with SmolLM2 as judge", scores)


def labelled(model: pl.Model, bank: Treebank) -> tuple[list[list[str]], list[list[str]]]:
    """Part of speech and dependency relation of every token of every sentence; "" where there is no word."""
    tags, relations = [], []
    for sentence in bank.sentences:
        _, offsets = encode(model.tokenizer, sentence.text)
        tag, relation = [""] * len(offsets), [""] * len(offsets)
        for word in sentence.words:
            for i in range(*covering(offsets, word.start, word.stop)):
                tag[i], relation[i] = word.upos, word.deprel.partition(":")[0]
        tags.append(tag)
        relations.append(relation)
    return tags, relations


def one_by_one(fire: np.ndarray, concepts: Concepts, beam: Beam) -> float:
    """The same search for one neuron, formula by formula: what the batched one is timed against. Its best IoU."""
    level: list[Formula] = [Formula(name) for name in concepts.names]
    best = 0.0
    for length in range(1, beam.length + 1):
        overlap = []
        for formula in level:
            holds = formula.holds(concepts)
            overlap.append(float((holds & fire).sum() / max(1, (holds | fire).sum())))
        best = max(best, max(overlap) * beam.penalty ** (length - 1))
        kept = [level[i] for i in np.argsort(overlap)[::-1][: beam.width]]
        level = [
            f.then(operation, name) for f in kept for operation in ("OR", "AND", "AND NOT") for name in concepts.names
        ]
    return best


def explained(model: pl.Model, found: Harvest, bank: Treebank) -> None:
    """Formulas of parts of speech and relations for all neurons of the layers."""
    places, _ = found.sample(f"layers.{LAYERS[0]}.mlp.neurons")
    order = places.argsort().numpy()  # in the order of the text: firings are shifted along it
    prompt, position = (x.numpy()[order] for x in where(places))
    tags, relations = labelled(model, bank)
    concepts = Concepts.labels([tags[p][i] for p, i in zip(prompt, position, strict=True)], least=30)
    concepts += Concepts.labels(
        [relations[p][i] for p, i in zip(prompt, position, strict=True)], least=30, prefix="dep:"
    )
    beam = Beam(3, 5)
    print(
        f"\ncompositional explanations: {len(prompt)} tokens, {len(concepts.names)} concepts, neurons that fire on 5 %"
    )
    for layer in LAYERS:
        site, began = f"layers.{layer}.mlp.neurons", time.process_time()
        active = found.sample(site)[1].numpy()[order]
        made = compositional(
            active, concepts, quantile=0.95, groups=prompt, beam=beam, units=[f"{site}.{n}" for n in range(1536)]
        ).data
        spent = time.process_time() - began
        bound = float(made.control_held_out.quantile(0.99))
        print(f"  layer {layer:2d}: IoU {float(made.iou.mean()):.3f}, held out {float(made.held_out.mean()):.3f}; shifted "
              f"{float(made.control.mean()):.3f}, held out {float(made.control_held_out.mean()):.3f}; "
              f"{float((made.low > bound).mean()):.0%} of neurons surely above 99 % of the shifted ones "
              f"({2 * active.shape[1] * len(concepts.names) / spent:.0f} concepts x neurons a second)", flush=True)  # fmt: skip
        for i in np.argsort(-made.held_out.values)[:3]:
            row = made.isel(unit=int(i))
            print(
                f"    {i:5d}  {float(row.held_out):.2f} [{float(row.low):.2f}, {float(row.high):.2f}]  {row.formula.item()}"
            )
    half = Concepts(concepts.names, concepts.masks[::2])  # as many tokens as are searched on above
    began = time.process_time()
    for n in range(3):
        one_by_one(firings(active, 0.95)[::2, n], half, beam)
    speed = 3 * len(concepts.names) / (time.process_time() - began)
    print(f"  one neuron and one formula at a time: {speed:.0f} concepts x neurons a second")


def clustered(model: pl.Model, found: Harvest) -> None:
    site = f"layers.{LAYERS[1]}.mlp.neurons"
    print(f"\nclusters of {site}: silhouette (chance), stability (chance)")
    for vectors in (UnitVectors.activations(found, [site]), UnitVectors.weights(model, site),
                    UnitVectors.weights(model, site, "input")):  # fmt: skip
        made = unit_clusters(vectors, UnitClusters(16, "kmeans"), draws=2).data
        print(f"  {vectors.source:15s} {float(made.silhouette):+.3f} ({float(made.silhouette_chance):+.3f})   "
              f"{float(made.stability):.3f} ({float(made.stability_chance):+.3f})  sizes {made['size'].values.tolist()}", flush=True)  # fmt: skip


def searched(model: pl.Model, units: list[str], texts: list[str]) -> None:
    print("\ninputs of 8 tokens: activation found, against blind exchanges, random texts (as many evaluations), corpus")
    for unit in units:
        for fluency in (0.0, 0.5):
            made = activating_inputs(model, unit, length=8, steps=16, restarts=2, fluency=fluency, texts=texts,
                                     exchanges=Exchanges(trials=24))  # fmt: skip
            at = made.data.isel(restart=0)
            controls = ", ".join(
                f"{name} {float(made.control_activation.sel(control=name)):.2f}" for name in made.control.values
            )
            print(f"  {unit} fluency {fluency}: {float(at.activation):.2f} at {float(at.nats):.1f} nats {at.text.item()!r}; {controls}",
                  flush=True)  # fmt: skip
            if not fluency:
                print(f"    corpus: {made.control_text.sel(control='corpus').item()[-100:]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--neurons", type=int, default=60, help="of each layer")
    parser.add_argument("--judge", action="store_true")
    options = parser.parse_args()
    model = pl.load(str(smollm2()))
    bank = Treebank.read(options.data / "en_ewt-ud-train.conllu", options.sentences, words=(5, 60))
    texts = [sentence.text for sentence in bank.sentences]
    began = time.process_time()

    def spent(what: str) -> None:
        print(f"[{what}: {time.process_time() - began:.0f} s of CPU so far]", flush=True)

    sites = [f"layers.{layer}.mlp.neurons" for layer in LAYERS]
    directions = [
        random_directions(model, site, options.neurons // 2, seed=layer, name=f"random {layer}")
        for layer, site in zip(LAYERS, sites, strict=True)
    ]
    found = harvest(model, texts, [*sites, *directions], top=40, sample=SAMPLE, skip=1)
    print(f"{found.count} tokens of {len(texts)} sentences, layers {LAYERS}")
    spent("harvest")
    best = named(model, found, options.neurons)
    spent("naming")
    by_model(model, best[:12], options.judge)
    spent("naming by model")
    explained(model, found, bank)
    spent("compositional")
    clustered(model, found)
    spent("clusters")
    units = [next(c.unit for c in best if c.unit.startswith(f"layers.{layer}.")) for layer in LAYERS[:2]]
    searched(model, units, texts[:300])
    spent("search")


if __name__ == "__main__":
    main()
