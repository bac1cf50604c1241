"""Attention moved as far as it goes while a sentiment classifier's prediction stays: what do rollout, flow and
gradients say?

    python examples/sentiment_classifier.py --data DATA --out sentiment-minilm
    python examples/attention_adversarial.py --data DATA --model sentiment-minilm [--reviews 10]

The reviews are the shortest of the test split. For each, adversarial attention is searched (all layers, output within
0.01) and every ranking of tokens is computed before and after: Kendall's tau between the two, the overlap of their
five highest tokens, and how well the ranking finds the words that were edited in the review's counterfactual (area
under the ROC curve; .5 is chance).
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import warnings
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau
from sklearn.metrics import roc_auc_score

import pellucid
from pellucid.attention import adversarial_attention, edits
from pellucid.attention.correlation import token_scores
from pellucid.attention.patterns import special
from pellucid.statistics import interval

MEASURES = ("last layer", "all layers", "rollout", "flow", "norms", "relevance")


def edited(text: str, other: str) -> list[tuple[int, int]]:
    """The characters of the words of `text` that are not in the other version."""
    words = [m.span() for m in re.finditer(r"\S+", text)]
    blocks = difflib.SequenceMatcher(None, text.split(), other.split(), autojunk=False).get_opcodes()
    return [words[i] for kind, a, b, _, _ in blocks if kind != "equal" for i in range(a, b)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reviews", type=int, default=10)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--epsilon", type=float, default=0.01)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from sentiment_classifier import reviews

    warnings.simplefilter("ignore", UserWarning)
    model = pellucid.load(options.model)
    texts, _ = reviews(options.data, "test")
    shortest = sorted(range(len(texts)), key=lambda i: len(texts[i]))[: options.reviews]
    moved, taus, overlaps, aucs = [], [], [], []
    for i in shortest:
        text, inputs = texts[i], model.inputs(texts[i])
        found = adversarial_attention(model, text, epsilon=options.epsilon, steps=options.steps)
        before, after = token_scores(model, inputs, MEASURES), token_scores(model, inputs, MEASURES, edits(found))
        usable = np.flatnonzero(~special(model, inputs.stream("")))
        offsets = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        spans = edited(text, texts[i ^ 1])
        causes = np.array([any(a < stop and b > start for start, stop in spans) for a, b in offsets])[usable]
        moved.append([float(found[name]) for name in ("divergence", "largest", "moved_tv", "probability")])
        names = list(before)
        taus.append([kendalltau(before[n][usable], after[n][usable]).statistic for n in names])
        tops = [[set(usable[np.argsort(-s[n][usable])[:5]]) for s in (before, after)] for n in names]
        overlaps.append([len(a & b) / 5 for a, b in tops])
        if causes.any() and not causes.all():
            aucs.append([[roc_auc_score(causes, s[n][usable]) for s in (before, after)] for n in names])
        far, largest, off, p = moved[-1]
        print(
            f"{len(usable)} tokens: JSD {far:.3f} (largest row {largest:.3f}), prediction {p:.3f} moved by {off:.4f}",
            flush=True,
        )
    far, largest, off, _ = np.mean(moved, 0)
    most = max(m[2] for m in moved)
    print(
        f"mean of {len(moved)} reviews: JSD {far:.3f} of at most .693, prediction moved by {off:.4f}, at most {most:.4f}"
    )
    print("| ranking of tokens | tau before/after | top 5 kept | finds edited words before | after |")
    print("|---|---|---|---|---|")
    for i, name in enumerate(names):
        cells = [shown(np.array(taus)[:, i]), shown(np.array(overlaps)[:, i])]
        cells += [shown(np.array(aucs)[:, i, side]) for side in (0, 1)]
        print(f"| {name} | {' | '.join(cells)} |")


def shown(values: np.ndarray) -> str:
    """The mean over reviews with its bootstrap interval."""
    low, high = interval(values, 0)
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
