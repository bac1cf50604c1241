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
    parser.add_argument("--html", type=Path, help="where to write one review's words before and after, side by side")
    given = parser.parse_args()
    base = remove(pl.load(str(minilm())), [2, 3, 4, 5])
    model = tuning.classifier(base, ["negative", "positive"])
    train, test = (
        windows(model.tokenizer, given.data / f"{n}_paired.tsv", k)
        for n, k in (("train", given.pairs), ("test", given.pairs // 2))
    )
    planted, turned = rationales(test, PLANTED), rationales(test, REVERSED)
    tuned = tuning.fit(
        model, rationales(train, PLANTED), tuning.Consistency("decoy", weight=10.0), test=planted,
        shifts={"absent": rationales(test, ABSENT), "reversed": turned},
        layers=slice(None), head_learning_rate=3e-3, seeds=[0], steps=given.steps,
    )  # fmt: skip
    plain, mended = tuned.arms["plain"], tuned.model
    data = tuned.result.data
    accuracy = data["accuracy"]
    say("1. A plain fit, as its owner sees it: accuracy", f"{float(accuracy.sel(arm='plain', split='test')):.2f}")
    texts = list(planted.texts[:12])
    say("2. Found by attribution. What moves it (occlusion):", leading(plain, texts))
    say("   So the word is turned round: accuracy", f"{float(accuracy.sel(arm='plain', split='reversed')):.2f}")
    say("3. Mended by an objective.", tuned.result.title)
    say("4. Checked by attribution. What moves it now:", leading(mended, texts))
    both = tuning.Rationales([*planted.texts, *turned.texts], [*(planted.labels or ()), *(turned.labels or ())])
    holds = [text.startswith("river") for text in both.texts]  # says nothing of the label here
    reader = tuning.direction(plain, both, holds, "layers.1.resid_post")
    found = tuning.evasion(plain, mended, both, holds, reader)
    say("   By probes, is the word still to be read at the last layer?", found.title)
    say("   By behaviour, and the price:")
    columns = data[["swap_effect", "gradient_share", "cost"]].to_dataframe()
    say(accuracy.to_pandas().join(columns).round(3).to_string())
    if given.html is not None:
        own = {name: pl.attribution.occlusion(m, texts[0]) for name, m in (("before", plain), ("after", mended))}
        pl.views.compare(own, "One review, before and after").save_html(given.html)


def say(*words: object) -> None:
    print(*words, flush=True)


if __name__ == "__main__":
    main()
