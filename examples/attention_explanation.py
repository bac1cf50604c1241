"""Is attention an explanation of what a sentiment classifier decides? Five tests on film reviews.

    python examples/sentiment_classifier.py --data DATA --out sentiment-minilm
    python examples/attention_explanation.py --data DATA --model sentiment-minilm [--only erasure agreement]

Permuted and uniform attention (Jain and Wallace), zeroing in ranked order (Serrano and Smith), agreement with
gradients and leave-one-out, and the trained controls of Wiegreffe and Pinter: uniform attention, the diagnostic
classifier, adversarial training. For the trained ones reviews are cut after 40 words.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import pellucid
from pellucid.attention import (
    adversarial_training,
    attention_correlation,
    attention_diagnostic,
    attention_erasure,
    permuted_attention,
    uniform_attention,
)


def permutation(model: pellucid.Model, data: Data) -> None:
    each = [permuted_attention(model, text, draws=8) for text in data.short[:10]]
    print("permuted attention, median change of the prediction (total variation), mean of 10 reviews")
    print("  by layer " + " ".join(f"{x:.3f}" for x in np.mean([r.change.values for r in each], 0)))
    print("  uniform  " + " ".join(f"{x:.3f}" for x in np.mean([r.uniform.values for r in each], 0)))
    permuted, uniform = (np.mean([r[name] for r in each]) for name in ("all", "all_uniform"))
    print(f"  all layers permuted {permuted:.3f}, uniform {uniform:.3f}")


def erasure(model: pellucid.Model, data: Data) -> None:
    erased = attention_erasure(model, data.short, points=16)
    print(f"share of keys to zero before the decision flips, {len(data.short)} reviews")
    for row in erased.to_frame("fraction", "low", "high", "never").itertuples():
        print(f"  {row.order:10} {row.fraction:.2f} [{row.low:.2f}, {row.high:.2f}], never flips {row.never:.2f}")


def agreement(model: pellucid.Model, data: Data) -> None:
    found = attention_correlation(model, data.short)
    print(f"Kendall's tau with gradient x embedding, and with leave-one-out, {len(data.short)} reviews")
    for name in found.measure.values:
        cells = []
        for other in found.reference.values:
            tau, low, high = (float(found[v].sel(measure=name, reference=other)) for v in ("tau", "low", "high"))
            cells.append("" if np.isnan(tau) else f"{tau:+.2f} [{low:+.2f}, {high:+.2f}]")
        print(f"  {name:11} {cells[0]:22} {cells[1]}")


def diagnostic(model: pellucid.Model, data: Data) -> None:
    found = attention_diagnostic(model, *data.train, *data.test, measure="last layer")
    print(f"token classifier by guide, {len(data.train[0])} reviews to train on, {len(data.test[0])} to test")
    for row in found.to_frame("accuracy", "low", "high", "lead", "lead_low", "lead_high").itertuples():
        accuracy = f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]"
        print(f"  {row.guide:9} {accuracy}, over uniform {row.lead:+.3f} [{row.lead_low:+.3f}, {row.lead_high:+.3f}]")


def uniform(model: pellucid.Model, data: Data) -> None:
    found = uniform_attention(model, *data.train, *data.test, epochs=3, learning_rate=5e-5)
    print("accuracy of the model with its own and with uniform attention, as it is and trained on")
    for row in found.to_frame("accuracy", "low", "high").itertuples():
        print(f"  {row.attention:7} {row.training:7} {row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]")


def training(model: pellucid.Model, data: Data) -> None:
    texts, held_out = data.train[0][:100], data.test[0][:50]
    found = adversarial_training(
        model, texts, held_out, strengths=(0, 0.3, 1, 3), epochs=2, learning_rate=1e-3, batch=4,
        parameters=("*.query.*", "*.key.*"),
    )  # fmt: skip
    print(f"queries and keys trained to answer the same and attend elsewhere, {len(held_out)} held-out reviews")
    for row in found.to_frame("js", "js_low", "js_high", "tv", "tv_low", "tv_high", "same").itertuples():
        attention = f"JSD {row.js:.3f} [{row.js_low:.3f}, {row.js_high:.3f}]"
        prediction = (
            f"prediction moved {row.tv:.3f} [{row.tv_low:.3f}, {row.tv_high:.3f}], same decision {row.same:.2f}"
        )
        print(f"  strength {row.strength}: {attention}, {prediction}")


PARTS = {p.__name__: p for p in (permutation, erasure, agreement, diagnostic, uniform, training)}


@dataclass(frozen=True)
class Data:
    """Short whole reviews of the test split; and cut ones with their labels."""

    short: list[str]
    train: tuple[list[str], list[int]]
    test: tuple[list[str], list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reviews", type=int, default=20)
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from sentiment_classifier import reviews

    model = pellucid.load(options.model)
    train, test = (reviews(options.data, split) for split in ("train", "test"))
    short = sorted(test[0], key=len)[: options.reviews]
    data = Data(short, _cut(*train, options.train), _cut(*test, 150))
    for name in options.only:
        PARTS[name](model, data)
        print(f"  ({time.process_time():.0f} s of CPU so far)", flush=True)


def _cut(texts: list[str], labels: list[int], n: int) -> tuple[list[str], list[int]]:
    """The first `n` reviews, their first 40 words."""
    return [" ".join(text.split()[:40]) for text in texts[:n]], labels[:n]


if __name__ == "__main__":
    main()
