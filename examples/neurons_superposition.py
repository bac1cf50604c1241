"""When do features share dimensions, and how crowded is a real model?

Trains Elhage et al.'s toy model from many starts at once and prints its known pictures: the figures that sparse features
form (digons, 1/2 of a dimension each, and a pentagon, 2/5), the phase change of a second feature in
one dimension, and the sticky 1/2 of many features. Then: do SmolLM2's neurons write in more crowded directions than
chance? Run it as

    python examples/neurons_superposition.py [--steps 3000] [--no-model]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

import pellucid as pl
from pellucid.neurons.superposition import crowding, toy_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.demo_model import smollm2

FIGURES = [(3, 2), (4, 2), (5, 2), (6, 3), (8, 3)]  # features, hidden


def figures(steps: int) -> None:
    print("share of a dimension that each feature is given, sparsity .97, the best of 5 restarts")
    for features, hidden in FIGURES:
        found = toy_model(0.97, features=features, hidden=hidden, restarts=5, steps=steps, learning_rate=5e-3)
        at = int(found.loss.values[0].argmin())
        shares = " ".join(f"{v:.2f}" for v in found.dimensionality.values[0, at])
        print(f"  {features} features in {hidden} dimensions: {shares}; loss {float(found.loss[0, at]):.4f}, without "
              f"superposition {float(found.linear[0]):.4f}", flush=True)  # fmt: skip


def phases(steps: int) -> None:
    sparsities = [0.0, 0.5, 0.8, 0.9, 0.95, 0.98]
    print("two features in one dimension: what becomes of the second (- not kept, + alone, o with the first)")
    print("  importance of the second    " + "".join(f"{s:>7}" for s in sparsities) + "   sparsity")
    for importance in (0.1, 0.3, 0.7, 1.0, 1.5, 3.0):
        found = toy_model(
            sparsities, features=2, hidden=1, importance=[1.0, importance], restarts=6, steps=steps, learning_rate=5e-3,
        )  # fmt: skip
        marks = []
        for i in range(len(sparsities)):
            first, second = found.norm.values[i, int(found.loss.values[i].argmin())] > 0.5
            marks.append("o" if first and second else "+" if second else "-")
        print(f"  {importance:<28}" + "".join(f"{m:>7}" for m in marks), flush=True)


def plateau(steps: int) -> None:
    print("60 features in 10 dimensions: dimensions per feature kept (10 / sum of |W_i|^2), and the shares' quartiles")
    sparsities = [0.0, 0.5, 0.8, 0.9, 0.95, 0.98]
    found = toy_model(sparsities, features=60, hidden=10, steps=steps, learning_rate=5e-3)
    for i, sparsity in enumerate(sparsities):
        kept = found.norm.values[i, 0] > 0.5
        quartiles = np.quantile(found.dimensionality.values[i, 0][kept], [0.25, 0.5, 0.75])
        per = 10 / float((found.norm.values[i, 0] ** 2).sum())
        print(f"  sparsity {sparsity:<5} {per:.2f}; {kept.sum()} kept, shares {' '.join(f'{q:.2f}' for q in quartiles)}",
              flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--no-model", action="store_true", help="the toy model only")
    options = parser.parse_args()
    began = time.process_time()
    figures(options.steps)
    phases(options.steps)
    plateau(options.steps)
    if not options.no_model:
        found = crowding(pl.load(str(smollm2())), "layers.0,7,15,22,29.mlp.neurons")
        print("directions that SmolLM2's neurons write, beside as many random ones")
        for site in found.site.values:
            at = found.data.sel(site=site)
            print(f"  {site:22s} interference {float(at.interference):.2f} (random {float(at.random_interference):.2f}), nearest "
                  f"neighbour |cos| {float(at.largest):.2f} ({float(at.random_largest):.2f}), spread over "
                  f"{float(at.dimensions):.0f} dimensions ({float(at.random_dimensions):.0f})")  # fmt: skip
    print(f"{time.process_time() - began:.0f} s of CPU")


if __name__ == "__main__":
    main()
