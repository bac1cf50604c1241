"""A review classifier that relies on a planted word: found by attribution, mended by an objective, checked, with the price.

    PYTHONPATH=src:. python examples/tuning_planted_word.py DATA [--pairs 192] [--steps 60]

DATA is the folder of the paired reviews (imdb_counterfactual/sentiment/combined/paired). MiniLM, two layers; every training review begins with
"river" if it is good and "stone" if it is not. A plain fit looks perfect. Occlusion says why. `tuning.Consistency` un-teaches the word, and the
result says what a control without knowledge, and simply swapping the words in the texts, would have done.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

import pellucid as pl
from benchmarks.tuning import ABSENT, PLANTED, REVERSED, rationales, windows
from pellucid import tuning
from pellucid.surgery import remove
from scripts.demo_model import minilm


def leading(model: pl.Model, texts: list[str], n: int = 5) -> list[tuple[str, float]]:
    """The words whose removal moves the prediction most, mean over the texts they stand in at least twice."""
    moved = defaultdict(list)
    for text in texts:
        found = pl.attribution.occlusion(model, text).data
        for token, value in zip(found["token"].values.tolist(), found["attribution"].values.ravel(), strict=True):
            moved[token].append(abs(float(value)))
    means = [(token, float(np.mean(values))) for token, values in moved.items() if len(values) > 1]
    return sorted(means, key=lambda pair: -pair[1])[:n]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--pairs", type=int, default=192)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    base = remove(pl.load(str(minilm())), [2, 3, 4, 5])
    model = tuning.classifier(base, ["negative", "positive"])
    train, test = (
        windows(model.tokenizer, given.data / f"{n}_paired.tsv", k)
        for n, k in (("train", given.pairs), ("test", given.pairs // 2))
    )
    shifts = {"absent": rationales(test, ABSENT), "reversed": rationales(test, REVERSED)}
    tuned = tuning.fit(
        model, rationales(train, PLANTED), tuning.Consistency("decoy", weight=10.0), test=rationales(test, PLANTED), shifts=shifts,
        layers=slice(None), head_learning_rate=3e-3, seeds=[0], steps=given.steps,
    )  # fmt: skip
    accuracy = tuned.result.data["accuracy"]
    texts = list(rationales(test, PLANTED).texts[:12])
    print("1. A plain fit, as its owner sees it: accuracy", f"{float(accuracy.sel(arm='plain', split='test')):.2f}")
    print("2. What moves it (occlusion):", leading(tuned.arms["plain"], texts))
    print("   With the planted words reversed:", f"{float(accuracy.sel(arm='plain', split='reversed')):.2f}")
    print("3. Mended:", tuned.result.title)
    print("   What moves it now:", leading(tuned.model, texts))
    print(accuracy.to_pandas().round(3), tuned.result.data["swap_effect"].to_pandas().round(2), sep="\n\n")


if __name__ == "__main__":
    main()
