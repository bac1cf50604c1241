"""What do single neurons of SmolLM2 and MiniLM respond to, and which of them tell parts of speech apart?

    python examples/neurons_harvest.py --data FOLDER_OF_ud_ewt [--model smollm2] [--texts 2500] [--keep FOLDER] [--html FILE]

Harvests every neuron of every layer over sentences of the training set. Three neurons whose largest activations are
nearly all on one word are shown (one from each third of the layers); whether they tell that word from others is measured
on the development set, with its interval, beside the best of as many shuffles. Then every neuron is scored for every part
of speech. With --html the pages are written to one file; with --keep harvests are kept, and continued if interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import pellucid as pl
from pellucid.neurons import Harvest, harvest, neuron_page, neuron_selectivity
from pellucid.neurons.contexts import apart
from pellucid.neurons.shelf import where
from pellucid.probing import Treebank
from pellucid.views import save_html

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.demo_model import minilm, smollm2

MODELS = {"smollm2": smollm2, "minilm": minilm}
HELD_OUT = 400  # sentences of the development set
TAGGED = 300  # sentences scored for parts of speech
RARE = 12  # a word must stand so often in the held-out sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=[*MODELS, "both"], default="both")
    parser.add_argument("--texts", type=int, default=2500)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--html", type=Path)
    options = parser.parse_args()
    train = Treebank.read(options.data / "en_ewt-ud-train.conllu", options.texts)
    dev = Treebank.read(options.data / "en_ewt-ud-dev.conllu", HELD_OUT)
    shown: list[Any] = []
    for name in MODELS if options.model == "both" else [options.model]:
        model = pl.load(str(MODELS[name]()))
        start = time.process_time()
        folder = None if options.keep is None else options.keep / name
        texts = [sentence.text for sentence in train.sentences]
        found = harvest(model, texts, path=folder, skip=int(name == "smollm2"))  # its first token is a sink
        print(
            f"{name}: {found.count} tokens, {sum(len(t.top) for t in found.tallies.values())} neurons, {time.process_time() - start:.0f} s CPU",
            flush=True,
        )
        shown += [*three(model, found, dev), parts_of_speech(model, train)]
    if options.html is not None:
        print("wrote", save_html(options.html, *shown, title="Neurons of SmolLM2 and MiniLM"))


def three(model: pl.Model, found: Harvest, dev: Treebank) -> Iterator[Any]:
    """Pages of three neurons, with what their word does to them in other texts."""
    counts = Counter(word.form.lower() for sentence in dev.sentences for word in sentence.words)
    words = {word for word, n in counts.items() if n >= RARE and word.isalpha() and len(word) > 2}
    layers, taken = len(found.names), set()
    for third in range(3):
        names = found.names[third * layers // 3 : (third + 1) * layers // 3]
        share, unit, word = max(purest(model, found, names, words - taken), key=lambda each: each[0])
        taken.add(word)
        labels = [word if form.form.lower() == word else "other" for s in dev.sentences for form in s.words]
        spans = dev.spans
        told = neuron_selectivity(model, spans.texts, spans.where, labels, unit, draws=200).data.sel(concept=word)
        print(
            f"\n{unit}: {100 * share:.0f} % of its {found.plan.top} largest activations are on {word!r}, which is {share_of(dev, word):.1f} % of words"
        )
        print(
            f"  in other texts: AUROC {float(told.held_out[0]):.3f} [{float(told.low[0]):.3f}, {float(told.high[0]):.3f}], after a shuffle {float(told.shuffled):.3f} at best; F1 {float(told.f1[0]):.2f}"
        )
        page = neuron_page(model, found, unit)
        for moment in apart(found.top(unit))[:5]:
            print(f"  {moment.value:7.2f}  {context(model, found, moment)}")
        for relation, other, value in zip(
            page.relation.values, page.neighbour.values, page.similarity.values, strict=True
        ):
            print(f"  nearest by {relation}: {other[0]} ({value[0]:.2f})")
        if "raised_token" in page.data:
            print(
                f"  raises {' '.join(map(repr, page.raised_token.values[:6]))}; lowers {' '.join(map(repr, page.lowered_token.values[:6]))}"
            )
        yield page


def purest(model: pl.Model, found: Harvest, names: list[str], words: set[str]) -> Iterator[tuple[float, str, str]]:
    """The most frequent word at each neuron's largest activations: its share among them (by as many texts), unit, word."""
    text: dict[int, str] = {}
    rows = [found.tokens(i) for i in range(len(found.shelf))]
    for name in names:
        prompts, positions = where(found.tally(name).places)
        for n, (mine, at) in enumerate(zip(prompts.tolist(), positions.tolist(), strict=True)):
            ids = [rows[p][i] for p, i in zip(mine, at, strict=True)]
            for token in ids:
                text.setdefault(token, model.tokenizer.decode([token]).strip().lower())
            word, count = Counter(text[i] for i in ids).most_common(1)[0]
            if word in words:
                share = min(count, len(set(mine))) / len(ids)
                yield share + 1e-6 * distance(found, name, n), f"{name}.{n}", word


def distance(found: Harvest, name: str, n: int) -> float:
    """How far the smallest of the largest activations is from the mean, in standard deviations."""
    return float((found.tally(name).top[n, -1] - found.mean(name)[n]) / found.std(name)[n].clamp_min(1e-9))


def share_of(bank: Treebank, word: str) -> float:
    forms = [w.form.lower() for s in bank.sentences for w in s.words]
    return 100 * forms.count(word) / len(forms)


def context(model: pl.Model, found: Harvest, moment: Any) -> str:
    ids = found.tokens(moment.prompt)
    before, own, after = (model.tokenizer.decode(part) for part in (ids[max(0, moment.position - 8) : moment.position], ids[moment.position : moment.position + 1], ids[moment.position + 1 : moment.position + 5]))  # fmt: skip
    return f"{before}[{own.strip()}]{after}".replace("\n", " ")


def parts_of_speech(model: pl.Model, bank: Treebank) -> Any:
    """Every neuron scored for every universal part of speech, beside shuffled labels."""
    bank = Treebank(bank.sentences[:TAGGED])
    start = time.process_time()
    labels = np.array([word.upos for sentence in bank.sentences for word in sentence.words])
    frequent = [label for label, n in zip(*np.unique(labels, return_counts=True), strict=True) if n >= 60]
    kept = np.flatnonzero(np.isin(labels, frequent))
    spans = bank.spans
    places = [spans.where[i] for i in kept]
    found = neuron_selectivity(model, spans.texts, places, labels[kept].tolist(), draws=100)
    data = found.data
    print(f"\n{len(places)} words, {data.sizes['unit']} neurons: {time.process_time() - start:.0f} s CPU")
    print("tag       words  best neuron                  AUROC  on other texts           F1   shuffled  p < .05")
    for i, tag in enumerate(data.concept.values):
        row, unit = data.isel(concept=i), str(data.found.values[i, 0])
        mine = row.sel(unit=unit)
        print(
            f"{tag:8s}{int(row.examples):7d}  {unit:27s}{float(mine.auroc):7.3f}  {float(row.held_out[0]):.3f} [{float(row.low[0]):.3f}, {float(row.high[0]):.3f}]{float(mine.f1):7.2f}{float(row.shuffled):10.3f}{int(row.significant):9d}"
        )
    return found


if __name__ == "__main__":
    main()
