"""Several prompts in one call against a loop over them: every attribution method on MiniLM, 32 sentences of mixed length.

    python -m benchmarks.attribution_batch [method ...]

Prints CPU seconds of both, their ratio, and how far the numbers are apart, relative to the largest. A loop over a method that
perturbs is batched already, prompt by prompt: one call spares it little more than the calls' own cost.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np

import pellucid as pl
from benchmarks.measuring import cpu
from tests.models import minilm_path

WORDS = [
    "a",
    "man",
    "is",
    "eating",
    "food",
    "in",
    "the",
    "park",
    "while",
    "two",
    "dogs",
    "run",
    "after",
    "an",
    "old",
    "red",
    "ball",
    "that",
    "nobody",
    "threw",
    "and",
    "it",
    "rains",
]
LENGTHS = [3, 5, 4, 8, 6, 12, 5, 22, 7, 4, 9, 15, 6, 5, 11, 18] * 2
SENTENCES = [" ".join(WORDS[(3 * i) % 11 :][:n] or WORDS[:n]).capitalize() + "." for i, n in enumerate(LENGTHS)]
TARGET = "Someone is having a meal outdoors."
OPTIONS: dict[str, dict[str, object]] = {
    "smoothgrad": {"draws": 8},
    "lime": {"draws": 64},
    "integrated_gradients": {"steps": 8},
    "expected_gradients": {"references": SENTENCES[:4], "draws": 8},
    "kernel_shap": {"draws": 64},
    "shapley": {"draws": 4},
    "exact_shapley": {"players": [(1, 2), (2, 3), (3, 4)]},
    "owen": {"draws": 2},
    "partition": {"evaluations": 40},
}


def main(names: list[str]) -> None:
    model = pl.load(minilm_path())
    target = pl.attribution.similarity(TARGET)
    print(f"{'method':22} {'loop':>7} {'one call':>9} {'ratio':>6} {'apart':>9}")
    for name in names or pl.attribution.METHODS:
        method, options = pl.attribution.METHODS[name], OPTIONS.get(name, {})

        def loop(method=method, options=options):  # type: ignore[no-untyped-def]
            return [method(model, text, target, **options) for text in SENTENCES]

        with pl.quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few steps are enough to time them
            try:
                method(model, SENTENCES[:2], target, **options)
            except pl.errors.Refused as why:
                print(f"{name:22} refused: {why}")
                continue
            slow, alone = cpu(loop)
            fast, together = cpu(lambda: method(model, SENTENCES, target, **options))  # noqa: B023
        pairs = [(a.data.attribution.values, b.data.attribution.values) for a, b in zip(alone, together, strict=True)]
        apart = max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(a).max() for a, _ in pairs)
        print(f"{name:22} {slow:7.2f} {fast:9.2f} {slow / fast:6.2f} {apart:9.1e}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
