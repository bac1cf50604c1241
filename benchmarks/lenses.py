"""What does a training step of the tuned lens cost, in plain forward passes of the same batch?

    python -m benchmarks.lenses [--repetitions 3] [--data FOLDER_OF_ud_ewt]

GPT-2-small's shape with random weights, 8 chunks of 128 tokens, one thread, process CPU time; the plain forward (all its
logits) is measured between the steps. "every position" is what the paper's code computes. With --data both are trained on
SmolLM2 and the same text, and their divergence on held-out text is printed: what is lost by reading a tenth?
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import pellucid as pl
from benchmarks.circuits import gpt2  # the same model
from benchmarks.clock import beside
from pellucid.lenses import TunedLens, lens_quality
from pellucid.lenses.lens import last_residual, lens_sites

sys.path.insert(0, str(Path(__file__).parents[1]))
LAYERS = [f"layers.{n}.resid_post" for n in (5, 15, 25)]
SHARES = {"a tenth of the positions": 0.1, "an eighth of the positions": 0.125, "every position": 1.0}


def steps(repetitions: int) -> None:
    model = gpt2()
    inputs = model.inputs(torch.randint(0, 50257, (8, 128), generator=torch.Generator().manual_seed(0)))
    names = [s for s in lens_sites(model, TunedLens.sites) if s != last_residual(model)]

    def plain() -> None:
        with torch.no_grad():
            model.module(inputs.stream("").ids)

    for name, share in SHARES.items():
        lens = TunedLens(share=share)
        d = model.anatomy.stacks[-1].d_model
        lens.biases_ = {n: torch.zeros(d, requires_grad=True) for n in names}
        lens.weights_ = {n: torch.zeros(d, d, requires_grad=True) for n in names}
        print(
            f"{name:28s}{beside(plain, lambda lens=lens: lens._step(model, inputs, names, 0), repetitions)} forwards",
            flush=True,
        )


def quality(data: Path, tokens: int) -> None:
    from examples.lenses_tuned import text
    from scripts.demo_model import smollm2

    model = pl.load(str(smollm2()))
    train, held_out = (text(data / f"en_ewt-ud-{part}.conllu") for part in ("train", "dev"))
    for name, share in SHARES.items():
        lens = TunedLens(sites=LAYERS, share=share, tokens=tokens, context=128).fit(model, train)
        found = lens_quality(model, held_out, lens, tokens=8192, context=128, share=0.25).data
        print(
            f"{name:28s} held-out KL at layers 5, 15, 25: {' '.join(f'{x:.2f}' for x in found.tuned.values)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokens", type=int, default=32_768)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps(options.repetitions)
    if options.data is not None:
        quality(options.data, options.tokens)


if __name__ == "__main__":
    main()
