"""Does a fact surface in the lens where causal tracing says it arrives?

For capitals: the log-probability of the capital at the last token in the tuned and in the logit lens, layer by layer, beside
the share of the answer that restoring the residual stream there brings back after the subject was noised (tracing, Meng et
al. 2022). The control is another country's capital in the same lens. Run it as

    python examples/lenses_capitals.py --lens lens.safetensors      # as examples/lenses_tuned.py --keep writes it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import pellucid as pl
from pellucid.causal import tracing
from pellucid.lenses import TunedLens, logit_lens
from pellucid.statistics import interval

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.demo_model import smollm2

CAPITALS = {
    "France": " Paris", "Italy": " Rome", "Japan": " Tokyo", "Germany": " Berlin", "Spain": " Madrid", "Russia": " Moscow",
    "Egypt": " Cairo", "Greece": " Athens", "Austria": " Vienna", "Ireland": " Dublin", "Cuba": " Havana", "Poland": " Warsaw",
}  # fmt: skip
PROMPT = "The capital of {} is the city of"


def climb(curve: np.ndarray) -> float:
    """The layer (linear between layers) from which on a curve has done half of its way from its start to its end."""
    way = (curve - curve[0]) / (curve[-1] - curve[0])
    before = int(np.flatnonzero(way < 0.5)[-1])
    return before + (0.5 - way[before]) / (way[before + 1] - way[before])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lens", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=5, help="of noise")
    options = parser.parse_args()
    model = pl.load(str(smollm2()))
    tuned = TunedLens.load(options.lens)
    countries, capitals = list(CAPITALS), list(CAPITALS.values())
    prompts = [PROMPT.format(c) for c in countries]

    read = {}  # lens -> [fact, layer, (its own capital, the next country's)]
    for name, through in {"tuned": tuned, "logit": None}.items():
        found = logit_lens(model, prompts, targets=capitals, positions=-1, through=through).data
        values = found.target_log_probability.transpose("prompt", "layer", "position", "target").values[:, 1:, 0]
        rows = np.arange(len(prompts))
        read[name] = np.stack([values[rows, :, rows], values[rows, :, (rows + 1) % len(rows)]], -1)
    traced = tracing(model, prompts, capitals, subject=countries, parts=("resid_post",), draws=options.draws).data
    arrival = traced.each.sel(part="resid_post", role="last").values  # [fact, layer]
    arrival = arrival / arrival[:, -1:]

    print("mean over facts, at the last token      traced   log P(capital)        log P(another capital)")
    print("                                        share    tuned    logit        tuned    logit")
    for layer in range(arrival.shape[1]):
        own, other = ([read[n][:, layer, i].mean() for n in ("tuned", "logit")] for i in range(2))
        print(f"after layer {layer:2d}{'':27s}{arrival[:, layer].mean():5.2f}   {own[0]:7.2f}  {own[1]:7.2f}      {other[0]:7.2f}  {other[1]:7.2f}")  # fmt: skip

    halves = {"tracing": np.array([climb(a) for a in arrival])}
    for name, values in read.items():
        gap = values[..., 0] - values[..., 1]  # this capital rather than another: what depends on the subject
        halves[f"{name} lens, capital against another"] = np.array([climb(g) for g in gap])
    print("\nlayer at which half of the way is done, mean over facts and 95 % bootstrap interval")
    for name, layers in halves.items():
        low, high = interval(layers)
        print(f"{name:40s}{layers.mean():6.1f} [{low:.1f}, {high:.1f}]   each: {' '.join(f'{x:.0f}' for x in layers)}")


if __name__ == "__main__":
    main()
